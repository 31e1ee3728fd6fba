"""`flash-mla bench prefix`: its options, and what it prints; the measuring is in `flash_mla.bench.prefix`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from .options import Json, Output, device_of, dtype_of, numbers_of, stop
from .progress import bars
from .results import Out, deliver

__all__ = ["prefix"]


def prefix(
    model: Annotated[
        str, typer.Option(help="Hub id, path, or random weights: v2-lite, glm-4.7-flash, minicpm3, tiny.")
    ] = "tiny",
    prefix: Annotated[str, typer.Option(help="Tokens that are stored, with commas between.")] = "1024,4096",
    question: Annotated[int, typer.Option(min=1, help="Tokens of the prompt behind the prefix.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate and compare.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each way; the figure is their median.")] = 5,
    store: Annotated[
        str | None, typer.Option(help="Folder or URI of fsspec to store in; left as it was. Default: a temporary one.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Also draw the times, as this PNG.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time to the first token of a prompt, computed whole and with its beginning loaded from a PrefixStore."""
    from ..bench.plots import draw_prefix, require_matplotlib
    from ..bench.prefix import measure
    from ..bench.report import machine
    from ..bench.shapes import build_model
    from ..cache import PrefixStore
    from .tables import prefix_table

    where, kind, lengths = device_of(device), dtype_of(dtype, device), numbers_of(prefix, "--prefix")
    if plot is not None and plot.suffix != ".png":
        raise typer.BadParameter(f"must end in .png, got {plot}", param_hint="--plot")
    with tempfile.TemporaryDirectory() as temporary, bars(as_json, during_measurement=True) as step:
        try:
            if plot is not None:
                require_matplotlib("flash-mla bench prefix")  # before minutes are spent
            loaded = build_model(model, dtype=kind, device=where, attn_implementation="flash_mla")
            prefixes = PrefixStore(store or temporary, loaded)
        except (ImportError, OSError, ValueError) as error:
            stop(f"{type(error).__name__}: {error}")
        head = machine(where)
        results, failed = measure(
            model,
            loaded,
            prefixes,
            lengths,
            question=question,
            new_tokens=new_tokens,
            rounds=rounds,
            report=lambda line: typer.echo(line, err=True),
            progress=lambda done, total: step("lengths", done, total),
        )
    rows = [result.to_json() for result in results]
    if rows:
        Output(as_json).show(prefix_table(rows, head["device"]))
    for name, error_text in failed.items():
        typer.echo(f"not measured: {name}: {error_text}", err=True)
    report = {
        **head,
        "what": "first token with and without a stored prefix; method: flash_mla.bench.prefix",
        "store": store,
        "rows": rows,
        "not_measured": failed,
    }
    stem = f"prefix-{Path(model).name}-p{'-'.join(map(str, lengths))}"
    deliver(report, stem, out, as_json)
    if plot is not None and rows:
        typer.echo(f"wrote {draw_prefix(report, plot)}", err=as_json)
    # In lower precision the batch of tokens rounds, and a tie may fall elsewhere.
    differ = [row["prefix"] for row in rows if row["identical_tokens"] < new_tokens] if kind == torch.float32 else []
    for length in differ:
        typer.echo(f"FAILED: prefix {length}: in float32 warm tokens must be those of the cold prompt", err=True)
    if failed or differ:
        raise typer.Exit(1)

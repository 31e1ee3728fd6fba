"""The commands and their options; what they do lives beside this file, and in `quality`, `outliers` and `bench`."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .bench_commands import bench
from .options import Json, console, device_of, dtype_of, stop
from .serve import serve

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Paged latent cache and absorbed MLA decode.")
app.add_typer(bench, name="bench")
app.command()(serve)


class Stored(str, Enum):
    """How pages hold tokens: as FP8 rows, or as the model computes."""

    fp8 = "fp8"
    model = "model"


class Native(str, Enum):
    """Names of native attention implementations that `verify` compares with."""

    eager = "eager"
    sdpa = "sdpa"


class Backend(str, Enum):
    """Names of backends that `env` can insist on."""

    cuda = "cuda"
    triton = "triton"
    torch = "torch"


@app.command()
def env(
    require: Annotated[
        Backend | None, typer.Option(help="A backend that has to run on a device of this machine; else exit code 6.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Versions, GPU, which backend would run and why the others would not, and what shadows this package.

    Exit codes: 0, nothing is wrong (a machine without a GPU is not wrong); 3, something else named flash_mla is in the
    way; 4, this Transformers does not know the name; 5, compiled kernels are out of date, or missing on a Hopper GPU;
    6, the required backend does not run here; 7, a device that no backend takes. Of several, the first in this order.
    """
    from .env import environment, problems, show

    report = environment()
    found = problems(report, None if require is None else require.value)
    code = found[0]["exit_code"] if found else 0
    if as_json:
        typer.echo(json.dumps({**report, "problems": found, "exit_code": code}, indent=1))
    else:
        show(report, console)
    for problem in found:
        typer.echo(f"WRONG ({problem['exit_code']}): {problem['what']}", err=True)
    raise typer.Exit(code)


@app.command()
def verify(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub id, path, or random weights: v2-lite, glm-4.7-flash, minicpm3, tiny. With -layer after it, of "
            "these and v3: one attention layer on latents with outlier columns."
        ),
    ],
    cache: Annotated[Stored, typer.Option(help="Rows of the pages; fp8 measures model as well.")] = Stored.fp8,
    reference: Annotated[Native, typer.Option(help="Native attention to compare with.")] = Native.eager,
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text. Default: one that is built in.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one forward first, 256; of a layer, in the cache, 1024.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are decoded one by one and compared.")] = 128,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least share of equal top-1 tokens; below it the exit code is 1.")
    ] = None,
    max_perplexity_change: Annotated[
        float | None, typer.Option(min=0, help="Largest relative change either way; 0.01 = 1%. Above it: exit code 1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and token ids.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Default: bfloat16 on a GPU and of a layer, float32 on a CPU.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What the paged cache does to logits: one text through native attention and through pages, token by token."""
    from . import verify as commands

    where = device_of(device)
    try:
        layer = commands.layer_shape(model)
        if layer is not None:
            bounds = min_agreement is not None or max_perplexity_change is not None
            if text is not None or bounds:
                raise ValueError(
                    "flash-mla verify: a layer has no text and no tokens: --text, --min-agreement and "
                    f"--max-perplexity-change are for a model, got {model}"
                )
            kind = dtype_of(dtype or "bfloat16", device)
            report = commands.verify_layer(model, layer, prompt_tokens or 1024, kind, where, seed, quiet=as_json)
        else:
            report = commands.verify_model(
                model,
                cache=cache.value,
                reference=reference.value,
                text=text,
                prompt_tokens=prompt_tokens or 256,
                new_tokens=new_tokens,
                dtype=dtype_of(dtype, device),
                device=where,
                seed=seed,
                quiet=as_json,
            )
    except (ImportError, OSError, ValueError) as error:
        stop(f"{type(error).__name__}: {error}")
    failed = [] if layer is not None else commands.failures(report, min_agreement, max_perplexity_change)
    if as_json:
        typer.echo(json.dumps({**report, "failed": failed}, indent=1, allow_nan=False))
    elif layer is not None:
        commands.show_layer(report, console)
    else:
        commands.show_model(report, console)
    for line in failed:
        typer.echo(f"FAILED: {line}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Hub id, path, or a shape: v2-lite, glm-4.7-flash, minicpm3, tiny.")],
    ctx: Annotated[int, typer.Option(min=1, help="Tokens per row, new ones included.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    gpu_mem: Annotated[float | None, typer.Option(min=0, help="GiB of one GPU: what fits beside the weights.")] = None,
    reserve: Annotated[float | None, typer.Option(min=0, help="GiB of it kept free. Default: a tenth.")] = None,
    weights: Annotated[
        float | None, typer.Option(min=0, help="GiB of weights, if quantised or spread over GPUs. Default: counted.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of weights and cache. Default: the config's, or bfloat16.")] = None,
    as_json: Json = False,
) -> None:
    """Bytes of a model's weights and of its cache by format, and the batch and context that fit; loads no weights."""
    from . import estimate as commands

    kind = None if dtype is None else dtype_of(dtype, None)
    try:
        found = commands.estimate(
            model,
            commands.read_config(model),
            ctx=ctx,
            batch=batch,
            dtype=kind,
            gpu_mem=gpu_mem,
            reserve=reserve,
            weights=weights,
        )
    except (ImportError, OSError, ValueError) as error:
        stop(f"{type(error).__name__}: {error}")
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
    else:
        commands.show(found, console)


@app.command()
def cost(
    report: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON of `flash-mla bench generate`.")],
    price_per_hour: Annotated[float, typer.Option(help="Of the machine that it was measured on, in dollars.")],
    utilization: Annotated[
        float, typer.Option(help="Share of the paid time in which the machine computes like this.")
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Dollars per million tokens, of prompt and generated, native beside ours; from what was measured and a price.

    A second costs price / 3600 / utilization. Per million tokens: prompt = second * TTFT / tokens of all prompts;
    decode = second * time of a late step / batch; generated = second * time of the whole call / generated tokens;
    blended = the same over prompt and generated tokens.
    """
    from . import cost as commands

    try:
        found = commands.cost(report, price_per_hour, utilization)
    except (OSError, ValueError) as error:
        stop(f"{type(error).__name__}: {error}")
    if as_json:
        typer.echo(json.dumps(found, indent=1, allow_nan=False))
    else:
        commands.show(found, console)

"""What `flash-mla cost` works out: dollars per million tokens from a report of `flash-mla bench generate` and a price.

Of a row with `batch` rows of `prompt` tokens, `new_tokens` each, at `second = price per hour / 3600 / utilization`:

    prompt     second * ttft_s             / (batch * prompt)           the time to the first token, over its prompt
    decode     second * decode_ms / 1000   / batch                      one late step, which gives every row a token
    generated  second * wall_s             / (batch * new_tokens)       the whole call: what generated tokens cost when
                                                                        they have to pay for their prompt as well
    blended    second * wall_s             / (batch * (prompt + new_tokens))

each times a million, with wall_s = batch * new_tokens / tokens_per_s: the measured seconds of the call. `prompt` and
`decode` are what two prices, one for input and one for output, would have to cover; `generated` and `blended` depend on
how long the measured prompt was.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from ..bench.context import way_of_row
from .tables import new_table

__all__ = ["FIGURES", "cost", "show"]

FIGURES = ("prompt", "decode", "generated", "blended")
COMPARED = ("decode", "generated")  # printed beside native; --json has all four
WHAT = "generate(), greedy"  # how `what` of such a report begins
NUMBERS = ("batch", "prompt", "new_tokens", "ttft_s", "decode_ms", "tokens_per_s")
LABELS = ("attn", "model", "cache", "dtype")


def cost(file: Path, price_per_hour: float, utilization: float = 1.0) -> dict[str, Any]:
    """Dollars (or whatever the price is in) per million tokens.

    Args:
        file: JSON that `flash-mla bench generate` wrote.
        price_per_hour: of the machine that the report was measured on.
        utilization: share of the time that is paid for in which it computes like this.
    Returns: device, date and `rows`: what each measured, `per_million` by figure (see the module), and `over_native`,
        the same figures over those of the first other attention at the same model, cache, batch, prompt and number of
        new tokens (None for a row that is not ours, or without one beside it).
    Raises: ValueError: no such report, or numbers that cannot be. OSError: no such file.
    """
    if not (price_per_hour > 0 and math.isfinite(price_per_hour)):
        raise ValueError(f"flash-mla cost: the price per hour must be above 0, got {price_per_hour}")
    if not 0 < utilization <= 1:
        raise ValueError(f"flash-mla cost: the utilization must be above 0 and at most 1, got {utilization}")
    report = _read(file)
    second = price_per_hour / 3600 / utilization
    rows = []
    for row in report["rows"]:
        wall_s = row["batch"] * row["new_tokens"] / row["tokens_per_s"]
        prompts, generated = row["batch"] * row["prompt"], row["batch"] * row["new_tokens"]
        per_token = {
            "prompt": second * row["ttft_s"] / prompts,
            "decode": second * row["decode_ms"] / 1000 / row["batch"],
            "generated": second * wall_s / generated,
            "blended": second * wall_s / (prompts + generated),
        }
        rows.append(
            {
                **{name: row[name] for name in (*LABELS, *NUMBERS)},
                "cache_dtype": row.get("cache_dtype"),
                "wall_s": wall_s,
                "per_million": {name: value * 1e6 for name, value in per_token.items()},
            }
        )
    for row in rows:
        native = next((other for other in rows if other["attn"] != "flash_mla" and _same_work(row, other)), None)
        row["over_native"] = None
        if row["attn"] == "flash_mla" and native is not None:
            ours, theirs = row["per_million"], native["per_million"]
            row["over_native"] = {"attn": native["attn"], **{name: ours[name] / theirs[name] for name in FIGURES}}
    return {
        "report": str(file),
        "device": report["device"],
        "date": report["date"],
        "price_per_hour": price_per_hour,
        "utilization": utilization,
        "rows": rows,
    }


def _same_work(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[name] == other[name] for name in ("model", "cache", "dtype", "batch", "prompt", "new_tokens"))


def _read(file: Path) -> dict[str, Any]:
    """A report of `flash-mla bench generate`, with every number that is used.

    Raises: ValueError: what keeps the file from being one.
    """

    def wrong(why: str) -> ValueError:
        return ValueError(f"flash-mla cost: {file} must be JSON of `flash-mla bench generate`: {why}")

    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise wrong(f"it is not JSON ({error})") from None
    if not isinstance(report, dict) or not isinstance(report.get("what"), str):
        raise wrong("it does not say what was measured")
    if not report["what"].startswith(WHAT):
        raise wrong(f"it is about {report['what']!r}")
    for name in ("device", "date"):
        if not isinstance(report.get(name), str):
            raise wrong(f"it has no {name}")
    rows = report.get("rows")
    if not isinstance(rows, list) or not rows:
        raise wrong("it has no rows")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise wrong(f"row {number} is no object")
        for name in LABELS:
            if not isinstance(row.get(name), str):
                raise wrong(f"row {number} must say its {name}, got {row.get(name)!r}")
        for name in NUMBERS:
            value = row.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise wrong(f"row {number} must have {name} above 0, got {value!r}")
    return report


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `cost` returned."""
    compared = any(row["over_native"] for row in found["rows"])
    columns = ("model", "attn", "cache", "batch", "prompt tokens", "new tokens")
    used = "" if found["utilization"] == 1 else f", {found['utilization']:.0%} of the time"
    table = new_table(
        f"$ per million tokens at {found['price_per_hour']:g} per hour{used}: {found['device']}, measured "
        f"{found['date'][:10]}",
        (*columns, *FIGURES, *(tuple(f"{name} / native" for name in COMPARED) if compared else ())),
        3,
    )
    for row in found["rows"]:
        counts = (str(row[name]) for name in ("batch", "prompt", "new_tokens"))
        cells = [Path(row["model"]).name, way_of_row(row), row["cache"], *counts]
        cells += [f"{row['per_million'][name]:.4g}" for name in FIGURES]
        if compared:
            over = row["over_native"]
            cells += ["-"] * len(COMPARED) if over is None else [f"{over[name]:.3f}" for name in COMPARED]
        table.add_row(*cells)
    table.caption = (
        "prompt: time to the first token over prompt tokens; decode: one step over the batch; generated: the whole "
        "call over generated tokens; blended: the whole call over all tokens"
    )
    console.print(table)

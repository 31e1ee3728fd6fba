"""What `flash-mla verify` loads, feeds and prints; the measuring is done by `quality` and `outliers`."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from ..bench.report import machine
from ..bench.shapes import NAMED, build_model, layer_config
from ..outliers import LayerShape, layer_errors
from ..quality import REFERENCE, require_paged, verify
from .estimate import read_config
from .progress import bars
from .tables import new_table

__all__ = ["OUTLIERS", "TEXT", "failures", "layer_shape", "show_layer", "show_model", "verify_layer", "verify_model"]

# How much larger the outlier columns of `verify ...-layer` are than the others.
OUTLIERS = (1, 20, 50, 1000, 10000, 100000)
LAYER = "-layer"

# 385 words: whatever the tokenizer, enough for the default prompt of 256 and 128 decoded tokens.
TEXT = """\
A lighthouse keeper in the last century had three duties that never changed. He lit the lamp half an hour before \
sunset, he trimmed the wicks every four hours so that the flame stayed clear of smoke, and he wrote down the weather \
in a bound book, even on days when there was none to speak of. The lamp itself was small. What carried its light for \
twenty miles was the lens around it, a beehive of glass prisms taller than a man, each ground to bend a ray by the \
right amount so that all of them left the tower level with the sea. Keepers polished the prisms in the morning with \
a soft cloth and rouge, and they hung curtains over the windows by day, because the same lens that threw the light \
out at night would have gathered the sun and set fire to the room.

The books are still useful. Because every station noted wind, pressure and cloud at the same hours, and because the \
men who kept them were punished for gaps, they form one of the longest unbroken records of weather over the open \
coast. Researchers who copy the entries into tables have found storms that no newspaper reported, and a slow drift \
in the date of the first winter gale. They have also found mistakes: a barometer that was read from the wrong side \
for eleven years, a keeper who wrote the same temperature on every Sunday, a week of fine weather invented to cover \
an absence. Such errors can usually be corrected, since the next tower along the shore saw the same sky. Two \
witnesses who made their notes without speaking to each other are worth more than one who is never wrong, and a \
number that is checked against another number is the beginning of a measurement. When the lamps were replaced by \
electric ones, the last keepers asked to be allowed to go on with the books. Some of them did so for years, unpaid, \
until the towers were locked and the instruments carried away to museums, where visitors now look at the great \
lenses and ask how bright the bulb is. The answer disappoints them, for it is no brighter than the lamp over a \
kitchen table, and the rest was done by glass.
"""


# --- a model ----------------------------------------------------------------------------------------------------------


def _token_ids(model: str, vocab_size: int, text: Path | None, count: int, seed: int) -> tuple[torch.Tensor, str]:
    """int64 `[1, count]` and where they are from: a text, or random ids where there is no tokenizer.

    Raises: ValueError: the text is too short, or there is none to tokenize it.
    """
    tokenizer, reason = None, "a random shape has none"
    if model not in NAMED:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
    if tokenizer is None:
        if text is not None:
            raise ValueError(f"flash-mla verify: --text needs a tokenizer: {model}: {reason}")
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(min(16, vocab_size - 1), vocab_size, (1, count), generator=generator), "random token ids"
    words = TEXT if text is None else text.read_text(encoding="utf-8")
    ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < count:
        raise ValueError(
            f"flash-mla verify: needs a text of {count} tokens (--prompt-tokens + --new-tokens + 1), got "
            f"{ids.shape[1]} from {text or 'the built-in text'}"
        )
    return ids[:, :count], str(text) if text is not None else "built-in text"


def verify_model(
    model: str,
    *,
    cache: str,
    reference: str,
    text: Path | None,
    prompt_tokens: int,
    new_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    quiet: bool,
) -> dict[str, Any]:
    """`quality.verify` on a model that is loaded here, as plain values; figures that are not finite are None.

    Raises: ValueError, OSError, ImportError: before the weights are loaded, of the config or the text; or of loading.
    """
    config = read_config(model)
    require_paged(config)
    vocab_size = config.get_text_config(decoder=True).vocab_size
    ids, source = _token_ids(model, vocab_size, text, prompt_tokens + new_tokens + 1, seed)
    if ids.max() >= vocab_size:
        raise ValueError(f"flash-mla verify: the model has {vocab_size} tokens, its tokenizer gave {int(ids.max())}")
    torch.manual_seed(seed)
    with bars(quiet) as step:
        loaded = build_model(model, dtype=dtype, device=device, attn_implementation=reference)
        found = verify(loaded, ids.to(device), prompt_tokens, cache=cache, reference=reference, progress=step)
    return {
        **machine(device),
        "what": "logits of a given text, decoded token by token; method: flash_mla.quality",
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "text": source,
        "random_weights": model in NAMED,
        **{key: _finite(value) for key, value in asdict(found).items()},
    }


def _finite(value: Any) -> Any:
    """Plain values with None for what JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failures(report: dict[str, Any], min_agreement: float | None, max_perplexity_change: float | None) -> list[str]:
    """What of the asked cache is out of bounds against the reference, one line each; empty: nothing.

    Logits that are not finite fail without any bound, those of the reference too: nothing is compared there.
    """
    asked = report["runs"][-1]
    (found,) = (one for one in report["differences"] if (one["run"], one["against"]) == (asked["name"], REFERENCE))
    failed = [
        f"{run['name']}: NaN or infinite logits at {run['nonfinite']} of {report['positions']} positions"
        for run in report["runs"]
        if run["nonfinite"]
    ]
    if min_agreement is not None and not found["agreement"] >= min_agreement:
        failed.append(f"{asked['name']}: top-1 agreement must be at least {min_agreement}, is {found['agreement']:.4f}")
    change = found["perplexity_change"]
    if max_perplexity_change is not None and (change is None or abs(change) > max_perplexity_change):
        failed.append(
            f"{asked['name']}: perplexity may change by {max_perplexity_change:.4%}, changed by "
            + ("a number that is not finite" if change is None else f"{change:+.4%}")
        )
    return failed


def _number(value: float | None, pattern: str) -> str:
    return "not finite" if value is None else format(value, pattern)


def show_model(report: dict[str, Any], console: Console) -> None:
    """Print what `verify_model` returned."""
    table = new_table(
        f"{report['model']}: {report['positions']} positions after {report['prompt_tokens']}, {report['text']}, "
        f"{report['dtype']}, {report['device']}",
        ("run", "attention", "cache", "B/token", "perplexity", "nats/token"),
        3,
    )
    for run in report["runs"]:
        size, nats = f"{run['bytes_per_token']:,}", _number(run["nats_per_token"], ".5f")
        table.add_row(run["name"], run["attn"], run["cache"], size, _number(run["perplexity"], ".5g"), nats)
    table.caption = "B/token: a position in all layers with latents"
    console.print(table)
    columns = (
        "run",
        "against",
        "top-1 equal",
        "perplexity",
        "KL nats",
        "max |d|",
        "mean |d|",
        "max / std",
        "mean / std",
    )
    table = new_table("differences", columns, 2)
    for row in report["differences"]:
        table.add_row(
            row["run"],
            row["against"],
            f"{row['agreement']:.2%}",
            _number(row["perplexity_change"], "+.4%"),
            *(_number(row[key], ".2e") for key in ("kl", "max_abs", "mean_abs", "max_relative", "mean_relative")),
        )
    table.caption = "d: of logits; std: of the logits of `against` over the vocabulary"
    console.print(table)
    for run in report["runs"][1:]:
        counts = {**run["paths"], **run["backends"]}
        typer.echo(f"{run['name']}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    if report["random_weights"]:
        typer.echo(
            "random weights: differences are of rounding; agreement and perplexity are not those of a trained model"
        )


# --- one layer --------------------------------------------------------------------------------------------------------


def layer_shape(model: str) -> LayerShape | None:
    """The shape that `v3-layer` or a named shape with `-layer` stands for; None: a model."""
    name = model.removesuffix(LAYER)
    if name == model or name not in (*NAMED, "v3"):
        return None
    config = layer_config(128) if name == "v3" else read_config(name)
    return LayerShape(
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_rope_head_dim,
        config.qk_nope_head_dim,
        config.v_head_dim,
    )


def verify_layer(
    name: str, shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, seed: int, quiet: bool
) -> dict[str, Any]:
    """`quality.layer_errors` by strength of the outlier columns, as plain values."""
    rows = []
    with bars(quiet) as step:
        for number, outlier in enumerate(OUTLIERS):
            step("outlier columns", number, len(OUTLIERS))
            errors = layer_errors(shape, outlier, tokens=tokens, dtype=dtype, device=device, seed=seed)
            rows.append({"outlier": outlier, "errors": _finite(errors)})
    return {
        **machine(device),
        "what": "error of one layer's decode by how latents are stored; method: flash_mla.outliers",
        "model": name,
        **shape._asdict(),
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
    }


def show_layer(report: dict[str, Any], console: Console) -> None:
    """Print what `verify_layer` returned."""
    table = new_table(
        f"{report['model']}: relative error of the attention output against fp64, {report['tokens']} tokens, "
        f"{report['num_heads']} heads, latents {report['kv_lora_rank']} + {report['qk_rope_head_dim']}, "
        f"{report['dtype']}, {report['device']}",
        ("outlier columns", *report["rows"][0]["errors"]),
        0,
    )
    for row in report["rows"]:
        table.add_row(f"{row['outlier']:,}x", *(_number(error, ".4f") for error in row["errors"].values()))
    console.print(table)
    typer.echo(
        "fp8 pages: e4m3, one scale per 128 columns. e4m3 has an exponent of its own: columns down to 1/28,672 of the\n"
        "largest under their scale keep all its bits, so coarse scales lose only beyond that. int8 has none."
    )

"""What a longer context costs, how an attention stands against the baseline, and what tells rows of a report apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["compare", "way_of", "way_of_row"]


def way_of(attn: str, cache_dtype: str | None) -> str:
    """What rows of a report are told apart by where model, batch and prompt are the same: "flash_mla fp8"."""
    return attn if cache_dtype is None else f"{attn} {cache_dtype}"


def way_of_row(row: dict[str, Any]) -> str:
    """`way_of` of a row; a report without `cache_dtype` is older than FP8 rows in it."""
    return way_of(row["attn"], row.get("cache_dtype"))


def compare(rows: Sequence[dict[str, Any]], baseline: str | None) -> list[dict[str, Any]]:
    """Each row with what it is beside the others; all have the same model, cache and number of new tokens.

    Args:
        rows: of `GenerateResult.to_json`.
        baseline: the attention to divide by, or None.
    Returns: the rows with, added:
        context_ms: decode ms minus those of the same attention and batch at the shortest prompt of the rows; None where
            that one was not measured.
        context_spread_ms: by how much that difference may be off: the spreads of both rows added.
        ratio: decode ms over the baseline's at the same batch and prompt; None without one.
        ratio_spread: max - min of the ratio over the rounds, first with first, second with second; None without one.
    """
    shortest = min((row["prompt"] for row in rows), default=0)
    by_key = {(way_of_row(row), row["batch"], row["prompt"]): row for row in rows}
    compared = []
    for row in rows:
        start = by_key.get((way_of_row(row), row["batch"], shortest))
        base = None if baseline is None else by_key.get((baseline, row["batch"], row["prompt"]))
        added: dict[str, Any] = dict.fromkeys(("context_ms", "context_spread_ms", "ratio", "ratio_spread"))
        if start is not None:
            spread = row["decode_spread_ms"] + start["decode_spread_ms"]
            added["context_ms"] = round(row["decode_ms"] - start["decode_ms"], 3)
            added["context_spread_ms"] = 0.0 if row is start else round(spread, 3)
        if base is not None:
            ratios = [own / other for own, other in zip(row["round_ms"], base["round_ms"], strict=True)]
            added["ratio"] = round(row["decode_ms"] / base["decode_ms"], 4)
            added["ratio_spread"] = round(max(ratios) - min(ratios), 4)
        compared.append({**row, **added})
    return compared

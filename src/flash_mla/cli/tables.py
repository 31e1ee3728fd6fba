"""How measurements are printed: one row each, times beside what they are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from ..bench.generate import GenerateResult, LayerResult

__all__ = ["generate_table", "layer_table"]


def _table(title: str, columns: tuple[str, ...], text_columns: int) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < text_columns else "right")
    return table


def _paths(paths: dict[str, int]) -> str:
    return ", ".join(f"{name.split()[-1]} {count}" for name, count in paths.items()) or "not ours"


def generate_table(rows: list[GenerateResult], device: str) -> Table:
    """Measured `generate()` calls; the first row is set against the others."""
    first = rows[0]
    table = _table(
        f"{first.model}: batch {first.batch}, prompt {first.prompt}, {first.new_tokens} new tokens, {first.dtype}, {device}",
        ("attn", "cache", "TTFT s", "ms/token", "tokens/s", "peak GiB", "cache MiB", "paths"),
        2,
    )
    for row in rows:
        table.add_row(
            row.attn,
            row.cache,
            f"{row.ttft_s:.3f}",
            f"{row.decode_ms:.2f}",
            f"{row.tokens_per_s:.1f}",
            "-" if row.peak_GiB is None else f"{row.peak_GiB:.2f}",
            f"{row.cache_bytes / 2**20:.2f}",
            _paths(row.paths),
        )
    if len(rows) > 1:
        table.caption = f"{rows[1].attn} / {first.attn}: {rows[1].decode_ms / first.decode_ms:.2f}x the time per token"
    return table


def layer_table(rows: list[LayerResult], device: str) -> Table:
    """Measured decode steps of one attention layer."""
    first = rows[0]
    table = _table(
        f"DeepseekV3Attention, {first.num_heads} heads: batch {first.batch}, {first.seqlen_k} tokens, {first.dtype}, {device}",
        ("attn", "ms/step", "peak MiB", "paths"),
        1,
    )
    for row in rows:
        table.add_row(
            row.attn, f"{row.ms:.3f}", "-" if row.peak_MiB is None else f"{row.peak_MiB:.1f}", _paths(row.paths)
        )
    return table

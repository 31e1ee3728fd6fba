"""How measurements are printed: one row each, times beside what they are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from ..bench.generate import GenerateResult, LayerResult
    from ..bench.kernel import Result

__all__ = ["generate_table", "kernel_summary", "kernel_table", "layer_table", "ran"]


def _table(title: str, columns: tuple[str, ...], text_columns: int) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < text_columns else "right")
    return table


def ran(row: GenerateResult | LayerResult) -> str:
    """One line: which of our paths and backends this row used."""
    counts = {**row.paths, **row.backends}
    return f"{row.attn}: " + (", ".join(f"{name} {count}" for name, count in counts.items()) or "not ours")


def generate_table(rows: list[GenerateResult], device: str) -> Table:
    """Measured `generate()` calls; the first row is set against the others."""
    first = rows[0]
    table = _table(
        f"{first.model}: batch {first.batch}, prompt {first.prompt}, {first.new_tokens} new tokens, "
        f"{first.dtype}, {device}",
        ("attn", "cache", "TTFT s", "ms/token", "tokens/s", "peak GiB", "cache MiB"),
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
        )
    if len(rows) > 1:
        table.caption = f"{rows[1].attn} / {first.attn}: {rows[1].decode_ms / first.decode_ms:.2f}x the time per token"
    return table


def layer_table(rows: list[LayerResult], device: str) -> Table:
    """Measured decode steps of one attention layer."""
    first = rows[0]
    table = _table(
        f"DeepseekV3Attention, {first.num_heads} heads: batch {first.batch}, {first.seqlen_k} tokens, "
        f"{first.dtype}, {device}",
        ("attn", "ms/step", "peak MiB"),
        1,
    )
    for row in rows:
        table.add_row(row.attn, f"{row.ms:.3f}", "-" if row.peak_MiB is None else f"{row.peak_MiB:.1f}")
    return table


def _shape(row: dict[str, Any]) -> str:
    return f"b{row['batch']} q{row['seqlen_q']} k{row['seqlen_k']} h{row['num_heads']}{' varlen' * row['varlen']}"


def kernel_table(rows: list[dict[str, Any]], device: str) -> Table:
    """Measured decode shapes from `bench.kernel.compare`: a ratio above 1 to the best anchor is a loss and says so."""
    compared = any("over_best" in row for row in rows)
    columns = ("shape", "ms", "cold ms", "GB/s", "TFLOP/s", "x floor", *(("best", "best ms", "/ best") * compared))
    table = _table(f"decode, {rows[0]['dtype'] if rows else ''}, {device}", columns, 1)
    for row in rows:
        cells = [
            _shape(row),
            f"{row['graph_ms']:.4f}",
            "-" if row["cold_ms"] is None else f"{row['cold_ms']:.4f}",
            f"{row['GBps']:.0f}",
            f"{row['TFLOPs']:.0f}",
            f"{row['over_floor']:.2f}",
        ]
        if compared and "over_best" in row:
            verdict = "slower" if row["over_best"] > 1 else "faster"
            cells += [row["best_anchor"], f"{row['best_anchor_ms']:.4f}", f"{row['over_best']:.2f} {verdict}"]
        table.add_row(*cells)
    return table


def kernel_summary(rows: list[dict[str, Any]], results: list[Result]) -> str:
    """Geometric mean over the floor, and how many shapes are won and lost against the best anchor."""
    from ..bench.kernel import geometric_mean

    if not rows:
        return "nothing measured"
    text = f"geometric mean of time / floor over {len(results)} shapes: {geometric_mean(results):.3f}"
    ratios = {_shape(row): row["over_best"] for row in rows if "over_best" in row}
    if ratios:
        lost = [f"{name} ({ratio:.2f}x)" for name, ratio in ratios.items() if ratio > 1]
        text += f"\nagainst the best anchor: {len(ratios) - len(lost)} of {len(ratios)} shapes faster"
        text += f"; slower: {', '.join(lost)}" if lost else ""
    return text

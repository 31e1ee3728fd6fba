"""How measurements are printed: one row each, times beside what they are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..bench.context import way_of, way_of_row
from ..bench.decode_shapes import name_of
from ..bench.figures import FLAGGED, series_of

if TYPE_CHECKING:
    from ..bench.figures import AppendFigure, Ceilings
    from ..bench.generate import GenerateResult
    from ..bench.layer import LayerResult

__all__ = [
    "class_table",
    "device_time_table",
    "generate_table",
    "kernel_table",
    "layer_table",
    "losses",
    "new_table",
    "prefix_table",
    "ran",
    "rates",
    "what",
]


SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}


def new_table(title: str, columns: tuple[str, ...], text_columns: int) -> Table:
    """An empty table; the first `text_columns` columns to the left, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < text_columns else "right", no_wrap=number == 0)
    return table


def ran(row: GenerateResult | LayerResult) -> str:
    """One line: which of our paths and backends this row used."""
    counts = {**row.paths, **row.backends}
    return f"{what(row)}: " + (", ".join(f"{name} {count}" for name, count in counts.items()) or "not ours")


def what(row: GenerateResult | LayerResult) -> str:
    """Which row this is."""
    return f"{way_of(row.attn, getattr(row, 'cache_dtype', None))}, batch {row.batch}, prompt {row.prompt}"


def generate_table(rows: list[dict[str, Any]], device: str, baseline: str | None) -> Table:
    """Measured `generate()` calls from `bench.context.compare`; a ratio below 1 is faster than the baseline."""
    first = rows[0]
    several = first["rounds"] > 1
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    columns = (
        *(("batch",) * (len(batches) > 1)),
        "prompt",
        "attn",
        "TTFT s",
        "ms/token",
        *(("spread ms",) * several),
        "tokens/s",
    )
    columns += ("peak GiB", "decode peak GiB", "cache GiB")
    columns += ("/ baseline", *(("spread",) * several)) * (baseline is not None)
    columns += ("context ms", *(("+-",) * several))
    table = new_table(
        f"{first['model']}: batch {', '.join(map(str, batches))}, {first['new_tokens']} new tokens, "
        f"{first['cache']} cache, {first['dtype']}, {device}",
        columns,
        2 + (len(batches) > 1),
    )
    for row in rows:
        cells = [str(row["batch"])] * (len(batches) > 1)
        cells += [str(row["prompt"]), way_of_row(row), f"{row['ttft_s']:.3f}", f"{row['decode_ms']:.2f}"]
        cells += [f"{row['decode_spread_ms']:.2f}"] * several + [f"{row['tokens_per_s']:.1f}"]
        cells += [_number(row["peak_GiB"], 2), _number(row["decode_peak_GiB"], 2), f"{row['pages_GiB']:.3g}"]
        if baseline is not None:
            cells += [_number(row["ratio"], 3), *([_number(row["ratio_spread"], 3)] * several)]
        cells += [_number(row["context_ms"], 2), *([_number(row["context_spread_ms"], 2)] * several)]
        table.add_row(*cells)
    table.caption = "ms/token: median of late steps, all rows at once; context ms: more than at the shortest prompt"
    if baseline is not None:
        table.caption += f"; / baseline: ms/token over {baseline}'s"
    return table


def prefix_table(rows: list[dict[str, Any]], device: str) -> Table:
    """First tokens from `bench.prefix.measure`; a ratio below 1: the stored prefix is faster."""
    first = rows[0]
    table = new_table(
        f"{first['model']}: {first['question']} tokens behind the prefix, {first['dtype']}, {device}",
        ("prefix", "file MiB", "save ms", "cold ms", "spread", "warm ms", "spread", "load ms", "warm / cold", "equal"),
        0,
    )
    for row in rows:
        milliseconds = ("save_s", "cold_s", "cold_spread_s", "warm_s", "warm_spread_s", "load_s")
        table.add_row(
            f"{row['prefix']:,}",
            f"{row['file_bytes'] / 2**20:.2f}",
            *(f"{row[name] * 1e3:.1f}" for name in milliseconds),
            f"{row['ratio']:.3f}",
            f"{row['identical_tokens']} of {row['new_tokens']}",
        )
    table.caption = (
        f"cold, warm: to the first token, median of {first['rounds']} rounds, spread max - min; "
        "warm with load; equal: leading tokens"
    )
    return table


def layer_table(rows: list[LayerResult], device: str) -> Table:
    """Measured decode steps of one attention layer."""
    first = rows[0]
    table = new_table(
        f"DeepseekV3Attention, {first.num_heads} heads: {first.dtype}, {device}",
        ("batch", "context", "attn", "ms/step", "ms/step in a CUDA graph", "peak MiB"),
        3,
    )
    for row in rows:
        graph = row.graph_reason if row.graph_ms is None else f"{row.graph_ms:.3f}"
        table.add_row(str(row.batch), str(row.seqlen_k), row.attn, f"{row.ms:.3f}", graph, _number(row.peak_MiB, 1))
    return table


def device_time_table(rows: list[GenerateResult] | list[LayerResult]) -> Table:
    """Device time per step, of all kernels and of our own by group: microseconds busy (number of kernels)."""
    from ..bench.device_time import GROUPS

    table = new_table("device time per step: us busy (kernels)", ("batch", "prompt", "attn", "all", *GROUPS), 3)

    def cell(part: dict[str, float] | None) -> str:
        return "-" if part is None else f"{part['busy_us']:.1f} ({part['kernels']:g})"

    for row in rows:
        if row.device_time is not None:
            groups = [cell(row.device_time["groups"].get(group)) for group in GROUPS]
            way = way_of(row.attn, getattr(row, "cache_dtype", None))
            table.add_row(str(row.batch), str(row.prompt), way, cell(row.device_time), *groups)
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ratio(row: dict[str, Any]) -> float:
    """Ours over the best anchor: of products with the ceilings where both are known, else of times."""
    return float(row["over_best_scaled"] if "over_best_scaled" in row else row["over_best"])


def _over_unencoded(row: dict[str, Any]) -> str:
    """FP8 rows over rows of the dtype, with the backend of the latter where it is another."""
    if "over_unencoded" not in row:
        return "-"
    other = row["unencoded_backend"]
    return f"{row['over_unencoded']:.3f}" + (f" ({other})" if other != row["backend"] else "")


def kernel_table(rows: list[dict[str, Any]], device: str) -> Table:
    """Measured decode shapes from `bench.figures.compare`: a ratio above 1 to the best anchor is a loss and says so."""
    compared = any("over_best" in row for row in rows)
    scaled = any("over_best_scaled" in row for row in rows)
    sustained = any(row["sustained_ms"] is not None for row in rows)
    encoded = any("over_unencoded" in row for row in rows)
    dtype = rows[0]["dtype"] if rows else ""
    columns = (
        "shape",
        "backend",
        "ms",
        "spread %",
        *(("long ms",) * sustained),
        "cold ms",
        "GB/s",
        "TFLOP/s",
        "x floor",
    )
    columns += ("% floor", *((f"FP8 / {SHORT_DTYPES.get(dtype, dtype)}",) * encoded))
    columns += (*(("best", "best ms", "/ best") * compared), *(("scaled",) * scaled))
    table = new_table(f"decode, {dtype}, {device}", columns, 2)
    for row in rows:
        cells = [
            name_of(row),
            row["backend"],
            f"{row['graph_ms']:.4f}",
            _number(None if row["spread"] is None else row["spread"] * 100, 1),
            *([_number(row["sustained_ms"], 4)] * sustained),
            _number(row["cold_ms"], 4),
            f"{row['GBps']:.0f}",
            f"{row['TFLOPs']:.0f}",
            f"{row['over_floor']:.2f}",
            f"{row['percent_of_floor']:.0f}",
            *([_over_unencoded(row)] * encoded),
        ]
        if "over_best" in row:
            best_ms = f"{row['best_anchor_ms']:.4f}{' cold' * row['best_anchor_is_cold']}"
            cells += [row["best_anchor"], best_ms, f"{row['over_best']:.2f}"]
            cells += [_number(row.get("over_best_scaled"), 2)] * scaled
            ratio = _ratio(row)
            cells[-1] += " SLOWER" if ratio > FLAGGED else " slower" if ratio > 1 else " faster"
        table.add_row(*cells)
    if compared:
        times = "times x the ceilings of their runs" if scaled else "times"
        table.caption = f"faster or slower: by {times}; SLOWER: more than {FLAGGED - 1:.0%}"
    return table


def class_table(summary: list[dict[str, Any]]) -> Table:
    """Geometric means from `bench.figures.summarize`; those of the anchors over the same shapes."""
    encoded = any(entry["over_unencoded"] is not None for entry in summary)
    columns = ("class", "backend", "shapes", "x floor", *(("FP8 / unencoded",) * encoded))
    columns += ("best anchor, x floor", "/ best", "scaled")
    table = new_table("geometric means", columns, 2)
    for entry in summary:
        table.add_row(
            entry["class"],
            entry["backend"],
            str(entry["shapes"]) + f" ({entry['anchored']} anchored)" * (0 < entry["anchored"] < entry["shapes"]),
            _number(entry["over_floor"], 3),
            *([_number(entry["over_unencoded"], 3)] * encoded),
            _number(entry["best_anchor_over_floor"], 3),
            _number(entry["over_best"], 3),
            _number(entry["over_best_scaled"], 3),
        )
    return table


def losses(rows: list[dict[str, Any]]) -> list[str]:
    """One line per backend: how many shapes are won and which are lost against the best anchor."""
    lines = []
    for backend in dict.fromkeys(map(series_of, rows)):
        ratios = {name_of(row): _ratio(row) for row in rows if series_of(row) == backend and "over_best" in row}
        if not ratios:
            continue
        lost = [f"{name} ({ratio:.2f}x)" for name, ratio in ratios.items() if ratio > 1]
        text = f"{backend} against the best anchor: {len(ratios) - len(lost)} of {len(ratios)} shapes faster"
        lines.append(text + (f"; slower: {', '.join(lost)}" if lost else ""))
    return lines


def rates(at_best: Ceilings | None, appended: dict[str, AppendFigure]) -> list[str]:
    """A line on the ceilings of the run, and one by what was appended."""
    lines = []
    if at_best is not None:
        lines.append(
            f"ceilings of this run: copy {at_best.copy_TBps:.2f} TB/s, read {at_best.read_TBps:.2f} TB/s, "
            f"bf16 matmul {at_best.matmul_bf16_TFLOPs:.0f} TFLOP/s, graph node {at_best.graph_node_us:.2f} us"
        )
    for name, figure in appended.items():
        came = f", from {figure.token_bytes:,} each," * (figure.token_bytes != figure.row_bytes)
        lines.append(
            f"{name}, {figure.backend}: {figure.tokens:,} rows of {figure.row_bytes:,} bytes{came} in "
            f"{figure.ms:.4f} ms, {figure.TBps:.2f} TB/s read and written"
        )
    return lines

"""Reports of `flash-mla bench generate` and `bench prefix` as pictures: speed, memory and first token by context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .roofline import COLOURS, MARKERS

__all__ = ["curves", "draw_generate", "draw_prefix", "require_matplotlib"]

SIZE = (7, 4.5)  # inches

# (tokens of context per row, figure), in order of the first
Curve = list[tuple[int, float]]


def require_matplotlib(command: str = "flash-mla bench generate") -> None:
    """Raise with the pip line where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{command} --plot needs matplotlib: pip install "transformers-flash-mla[bench]"') from error


def _tokens_per_s(row: dict[str, Any]) -> float:
    """New tokens of all rows per second of late decode steps."""
    return float(row["batch"] * 1e3 / row["decode_ms"])


def curves(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Tokens/s of late decode steps, and peak GiB of the whole call, by attention.

    Args:
        rows: of a report. Off CUDA there is no peak, and the second mapping is empty.
    """
    speed: dict[str, Curve] = {}
    memory: dict[str, Curve] = {}
    for row in sorted(rows, key=lambda row: row["prompt"]):
        speed.setdefault(row["attn"], []).append((row["prompt"], _tokens_per_s(row)))
        if row["peak_GiB"] is not None:
            memory.setdefault(row["attn"], []).append((row["prompt"], row["peak_GiB"]))
    return speed, memory


def files_of(where: Path) -> tuple[Path, Path]:
    """The two pictures of a folder, or of a prefix that ends in .png."""
    if where.suffix == ".png":
        return where.with_name(f"{where.stem}-tokens.png"), where.with_name(f"{where.stem}-memory.png")
    return where / "tokens.png", where / "memory.png"


def draw_generate(report: dict[str, Any], where: Path) -> list[Path]:
    """Draw a report as PNG files; return those written, whose folder is created.

    Args:
        report: as `flash-mla bench generate` writes it.
        where: a folder (tokens.png, memory.png), or a prefix that ends in .png (NAME-tokens.png, NAME-memory.png).
    Returns: the picture of tokens/s, and that of memory where the report has it (CUDA only).
    Raises: ImportError: without matplotlib. ValueError: a report without such rows.
    """
    require_matplotlib()
    rows = report["rows"]
    if not rows or "decode_ms" not in rows[0]:
        raise ValueError("flash_mla.bench.plots: needs a report of `flash-mla bench generate` on a model, with rows")
    first = rows[0]
    title = f"{first['model']}, {first['dtype']}, batch {first['batch']}, {first['cache']} cache, {report['device']}"
    written = []
    labels = ("new tokens/s, late decode steps", "peak memory of the call beyond the weights, GiB")
    for path, lines, label in zip(files_of(where), curves(rows), labels, strict=True):
        if lines:
            written.append(_draw(lines, title, label, path))
    return written


def draw_prefix(report: dict[str, Any], path: Path) -> Path:
    """Draw the first token's time by length of the prefix, cold and stored, as this PNG; its folder is created.

    Args:
        report: as `flash-mla bench prefix` writes it. Bars go from the fastest round to the slowest.
    Raises: ImportError: without matplotlib. ValueError: a report without such rows.
    """
    require_matplotlib("flash-mla bench prefix")
    rows = sorted(report["rows"], key=lambda row: row.get("prefix", 0))
    if not rows or "warm_round_s" not in rows[0]:
        raise ValueError("flash_mla.bench.plots: needs a report of `flash-mla bench prefix`, with rows")
    first = rows[0]
    figure, axes = _axes(
        f"TTFT cold and with a stored prefix: {first['model']}, {first['dtype']}, {report['device']}",
        f"tokens of the prefix ({first['question']} more behind it)",
        "time to the first token, ms",
        [row["prefix"] for row in rows],
    )
    for number, (kind, label) in enumerate((("cold", "cold"), ("warm", "stored prefix, loading included"))):
        middle = [row[f"{kind}_s"] * 1e3 for row in rows]
        bounds = [[bound(row[f"{kind}_round_s"]) * 1e3 for row in rows] for bound in (min, max)]
        bars = [[abs(end - at) for end, at in zip(ends, middle, strict=True)] for ends in bounds]
        axes.errorbar(
            [row["prefix"] for row in rows],
            middle,
            yerr=bars,
            capsize=3,
            label=label,
            marker=MARKERS[number],
            color=COLOURS[number],
        )
    return _write(figure, axes, path)


def _draw(lines: dict[str, Curve], title: str, label: str, path: Path) -> Path:
    lengths = sorted({point[0] for points in lines.values() for point in points})
    figure, axes = _axes(title, "context, tokens per row", label, lengths)
    for number, (attn, points) in enumerate(lines.items()):
        x, y = [point[0] for point in points], [point[1] for point in points]
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        axes.plot(x, y, label=attn, marker=marker, color=colour)
    return _write(figure, axes, path)


def _axes(title: str, x_label: str, y_label: str, lengths: Sequence[int]) -> tuple[Any, Any]:
    """A figure and its axes for curves over these lengths, which are in order."""
    # Not pyplot: no window, and the process's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if lengths[-1] > 8 * lengths[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, linewidth=0.3, alpha=0.5)
    axes.set_title(title, loc="left", fontsize=10)
    return figure, axes


def _write(figure: Any, axes: Any, path: Path) -> Path:
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return path

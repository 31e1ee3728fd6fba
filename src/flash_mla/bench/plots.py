"""A report of `flash-mla bench generate` as pictures: tokens/s and peak memory against the context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .roofline import COLOURS, MARKERS

__all__ = ["curves", "draw_generate", "require_matplotlib"]

SIZE = (7, 4.5)  # inches

# (tokens of context per row, figure), in order of the first
Curve = list[tuple[int, float]]


def require_matplotlib() -> None:
    """Raise with the pip line where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'flash-mla bench generate --plot needs matplotlib: pip install "transformers-flash-mla[bench]"'
        ) from error


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


def _draw(lines: dict[str, Curve], title: str, label: str, path: Path) -> Path:
    # Not pyplot: no window, and the process's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (attn, points) in enumerate(lines.items()):
        x, y = [point[0] for point in points], [point[1] for point in points]
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        axes.plot(x, y, label=attn, marker=marker, color=colour)
    lengths = sorted({point[0] for points in lines.values() for point in points})
    if lengths[-1] > 8 * lengths[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context, tokens per row")
    axes.set_ylabel(label)
    axes.grid(visible=True, linewidth=0.3, alpha=0.5)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return path

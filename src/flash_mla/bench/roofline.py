"""A report of `flash-mla bench kernel` as a picture: each shape below the roofs that memory and tensor cores make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .decode_shapes import FLOOR_BYTES_PER_S, FLOOR_FLOP_PER_S, name_of

__all__ = ["Point", "draw_roofline", "points_of", "require_matplotlib", "roofs_of", "spaced"]

PEER = "best anchor"
# One marker and colour per backend, in the order of the report; the anchors are grey crosses.
MARKERS = ("o", "s", "^", "D")
COLOURS = ("#0b5fa5", "#d1690e", "#2f7d32", "#7b3fa0")
# Width and height of the figure in inches, and how many labels find room above each other.
SIZE, LABELS = (12, 7), 55
# Points this close in FLOP/byte (those of one number of heads) have their labels in one column.
COLUMN_RATIO = 1.15

# (backend or PEER, number of the shape, FLOP/byte, TFLOP/s)
Point = tuple[str, int, float, float]


def require_matplotlib() -> None:
    """Raise with the pip line where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'flash-mla bench kernel --plot needs matplotlib: pip install "transformers-flash-mla[bench]"'
        ) from error


def points_of(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[Point]]:
    """Names of the shapes in order, and a point per row and per best anchor; shapes are numbered from 1."""
    names = list(dict.fromkeys(name_of(row) for row in rows))
    points: dict[tuple[str, int], Point] = {}
    for row in rows:
        number = names.index(name_of(row)) + 1
        intensity = row["TFLOPs"] * 1e3 / row["GBps"]
        points[row["backend"], number] = (row["backend"], number, intensity, row["TFLOPs"])
        if "best_anchor_ms" in row:
            peer = row["TFLOPs"] * row["graph_ms"] / row["best_anchor_ms"]
            points[PEER, number] = (PEER, number, intensity, peer)
    return names, list(points.values())


def roofs_of(report: dict[str, Any]) -> tuple[float, float, str]:
    """TB/s, TFLOP/s and where they come from: measured in the run, or what its floors divide by."""
    ceilings = report.get("ceilings")
    if ceilings is None:
        return FLOOR_BYTES_PER_S / 1e12, FLOOR_FLOP_PER_S / 1e12, "as the floors assume"
    return ceilings["read_TBps"], ceilings["matmul_bf16_TFLOPs"], "measured in this run"


def spaced(heights: Sequence[float], ratio: float) -> list[float]:
    """The heights, in their order, moved upwards as little as it takes for each to be `ratio` times the one below."""
    moved = list(heights)
    below = 0.0
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        moved[index] = below = max(heights[index], below * ratio)
    return moved


def draw_roofline(report: dict[str, Any], path: Path) -> Path:
    """Draw a report as PNG; return the file, whose folder is created.

    Args:
        report: as `flash-mla bench kernel` writes it, its rows at least one.
        path: of the picture.
    Raises: ImportError: without matplotlib.
    """
    require_matplotlib()
    # Not pyplot: no window, and the process's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter

    names, points = points_of(report["rows"])
    bandwidth, peak, origin = roofs_of(report)
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")

    intensities = [point[2] for point in points]
    left, right = min(intensities) / 1.6, max([*intensities, peak / bandwidth]) * 1.8
    ridge = peak / bandwidth
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color="black", linewidth=1.5)
    axes.text(ridge, peak * 1.06, f"bf16 matmul {peak:.0f} TFLOP/s", ha="left", fontsize=9)
    axes.text(left * 1.04, left * bandwidth * 1.75, f"read {bandwidth:.2f} TB/s", ha="left", fontsize=9)

    backends = [name for name in dict.fromkeys(point[0] for point in points) if name != PEER]
    looks = {name: (MARKERS[i % len(MARKERS)], COLOURS[i % len(COLOURS)]) for i, name in enumerate(backends)}
    looks[PEER] = ("x", "#777777")
    for name, (marker, colour) in looks.items():
        own = [point for point in points if point[0] == name]
        if own:
            x, y = [point[2] for point in own], [point[3] for point in own]
            axes.scatter(x, y, marker=marker, color=colour, s=34, label=name, zorder=3)
    bottom, top = min(point[3] for point in points) / 1.5, peak * 1.5
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    ratio = (top / bottom) ** (1 / LABELS)
    _label(axes, [point for point in points if point[0] != PEER], looks, ratio, to_the_left=False)
    _label(axes, [point for point in points if point[0] == PEER], looks, ratio, to_the_left=True)
    for axis, ticks in ((axes.xaxis, (10, 20, 50, 100, 200, 500)), (axes.yaxis, (1, 2, 5, 10, 20, 50, 100, 200, 500))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("FLOP / byte")
    axes.set_ylabel("TFLOP/s")
    axes.grid(visible=True, which="both", linewidth=0.3, alpha=0.5)
    axes.set_title(f"MLA decode on {report['device']}; roofs {origin}", loc="left")
    axes.legend(loc="lower right", fontsize=9)
    listed = "\n".join(f"{number:2d}  {name}" for number, name in enumerate(names, 1))
    axes.text(1.02, 1.0, listed, transform=axes.transAxes, va="top", family="monospace", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return path


def _label(
    axes: Any, points: Sequence[Point], looks: dict[str, tuple[str, str]], ratio: float, *, to_the_left: bool
) -> None:
    """The number of its shape beside each point."""
    columns: dict[float, list[Point]] = {}
    for point in sorted(points, key=lambda point: point[2]):
        start = next((start for start in columns if point[2] <= start * COLUMN_RATIO), point[2])
        columns.setdefault(start, []).append(point)
    for column in columns.values():
        intensities = [point[2] for point in column]
        edge = min(intensities) / 1.05 if to_the_left else max(intensities) * 1.05
        for point, height in zip(column, spaced([point[3] for point in column], ratio), strict=True):
            name, number, intensity, rate = point
            colour = looks[name][1]
            axes.annotate(
                str(number),
                xy=(intensity, rate),
                xytext=(edge, height),
                ha="right" if to_the_left else "left",
                va="center",
                fontsize=8,
                color=colour,
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": colour, "shrinkA": 0, "shrinkB": 3},
            )

"""Reports of `flash-mla bench` as pictures: speed and memory by context, steps by batch, first token by prefix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .context import way_of_row
from .roofline import COLOURS, MARKERS

__all__ = ["batch_curves", "curves", "draw_generate", "draw_prefix", "join", "require_matplotlib"]

SIZE = (7, 4.5)  # inches
LINES = ("-", "--", "-.", ":")

# (tokens of context per row, or rows, figure), in order of the first
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


def _values(rows: Sequence[dict[str, Any]], name: str) -> list[int]:
    return sorted({row[name] for row in rows})


def _by_line(rows: Sequence[dict[str, Any]], along: str, other: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of each line, ordered by `along`: one per attention, and per value of `other` where there are several."""
    words = {"batch": "batch", "prompt": "context"}
    several = len(_values(rows, other)) > 1
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row[along]):
        lines.setdefault(way_of_row(row) + f", {words[other]} {row[other]:,}" * several, []).append(row)
    # In the order of the report, whichever attention lacks its first value.
    names = list(dict.fromkeys(map(way_of_row, rows)))
    return dict(sorted(lines.items(), key=lambda line: (names.index(way_of_row(line[1][0])), line[1][0][other])))


def curves(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Tokens/s of late decode steps, and peak GiB of the whole call, against context, by attention (and batch).

    Args:
        rows: of a report. Off CUDA there is no peak, and the second mapping is empty.
    """
    speed: dict[str, Curve] = {}
    memory: dict[str, Curve] = {}
    for label, line in _by_line(rows, "prompt", "batch").items():
        speed[label] = [(row["prompt"], _tokens_per_s(row)) for row in line]
        peaks = [(row["prompt"], row["peak_GiB"]) for row in line if row["peak_GiB"] is not None]
        if peaks:
            memory[label] = peaks
    return speed, memory


def batch_curves(rows: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """Milliseconds of a late decode step, which gives every row a token, against batch, by attention (and context)."""
    return {
        label: [(row["batch"], row["decode_ms"]) for row in line]
        for label, line in _by_line(rows, "batch", "prompt").items()
    }


def file_of(where: Path, name: str) -> Path:
    """A picture of a folder, or of a prefix that ends in .png."""
    return where.with_name(f"{where.stem}-{name}.png") if where.suffix == ".png" else where / f"{name}.png"


def _checked(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = report["rows"]
    if not rows or "decode_ms" not in rows[0]:
        raise ValueError("flash_mla.bench.plots: needs a report of `flash-mla bench generate` on a model, with rows")
    return rows


def join(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report with the rows of several, for `draw_generate`.

    Args:
        reports: as `flash-mla bench generate` writes them, at least one.
    Raises: ValueError: no such reports, or some whose figures do not belong into one picture: another device, torch or
        Transformers, another model, dtype or kind of cache, or a row of the same batch, prompt and attention.
    """
    seen: dict[tuple[Any, ...], int] = {}
    rows: list[dict[str, Any]] = []
    alike: dict[str, Any] = {}
    for number, report in enumerate(reports):
        made = {"device": report["device"]}
        made |= {name: report["versions"][name] for name in ("torch", "transformers")}
        for row in _checked(report):
            for name, value in {**made, **{name: row[name] for name in ("model", "dtype", "cache")}}.items():
                if alike.setdefault(name, value) != value:
                    raise ValueError(
                        f"flash_mla.bench.plots: one picture needs one {name}, got {alike[name]!r} and {value!r}"
                    )
            key = (way_of_row(row), row["batch"], row["prompt"])
            if seen.setdefault(key, number) != number:
                raise ValueError(
                    f"flash_mla.bench.plots: one picture needs one row of {key[0]}, batch {key[1]}, prompt {key[2]}, "
                    f"got two: in reports {seen[key] + 1} and {number + 1}"
                )
            rows.append(row)
    return {**reports[0], "rows": rows}


def draw_generate(report: dict[str, Any], where: Path) -> list[Path]:
    """Draw a report as PNG files; return those written, whose folder is created.

    Args:
        report: as `flash-mla bench generate` writes it.
        where: a folder (tokens.png, memory.png, batch.png), or a prefix that ends in .png (NAME-tokens.png, ...).
    Returns: against context the picture of tokens/s and that of memory where the report has it (CUDA only), unless it
        has one context and several batches; against batch that of the time per token, where it has several.
    Raises: ImportError: without matplotlib. ValueError: a report without such rows.
    """
    require_matplotlib()
    rows = _checked(report)
    first, batches, contexts = rows[0], _values(rows, "batch"), _values(rows, "prompt")
    versions = report["versions"]
    setting = f"{first['model']}, {first['dtype']}, {first['cache']} cache"
    where_made = f"{report['device']}, torch {versions['torch']}, Transformers {versions['transformers']}"
    made = f"{where_made}, {report['date'][:10]}"
    written = []
    if len(contexts) > 1 or len(batches) == 1:
        title = f"{setting}" + f", batch {batches[0]:,}" * (len(batches) == 1)
        labels = ("new tokens/s, late decode steps", "peak memory of the call beyond the weights, GiB")
        for name, lines, label in zip(("tokens", "memory"), curves(rows), labels, strict=True):
            if lines:
                axes = (f"{title}\n{made}", "context, tokens per row", label)
                written.append(_draw(lines, *axes, file_of(where, name)))
    if len(batches) > 1:
        title = f"{setting}" + f", context {contexts[0]:,}" * (len(contexts) == 1)
        axes = (f"{title}\n{made}", "batch, rows", "ms/token of all rows at once, late decode steps")
        written.append(_draw(batch_curves(rows), *axes, file_of(where, "batch")))
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


def _draw(lines: dict[str, Curve], title: str, x_label: str, y_label: str, path: Path) -> Path:
    lengths = sorted({point[0] for points in lines.values() for point in points})
    figure, axes = _axes(title, x_label, y_label, lengths)
    # Of "flash_mla, batch 4" the first word has the colour, the rest the kind of line.
    names = [label.partition(", ")[::2] for label in lines]
    ways, others = (list(dict.fromkeys(parts)) for parts in zip(*names, strict=True))
    for (way, other), (label, points) in zip(names, lines.items(), strict=True):
        x, y = [point[0] for point in points], [point[1] for point in points]
        number, line = ways.index(way), LINES[others.index(other) % len(LINES)]
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        axes.plot(x, y, line, label=label, marker=marker, color=colour)
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

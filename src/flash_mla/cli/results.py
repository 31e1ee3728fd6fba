"""Where a benchmark's report goes: into a file, or with --json to standard output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["Out", "deliver"]

RESULTS = Path("benchmarks/results")
Out = Annotated[
    Path | None,
    typer.Option(
        help=f"JSON file, or folder for a file named by what and when. Default: {RESULTS}; with --json: none.",
        show_default=False,
    ),
]


def deliver(report: dict[str, Any], stem: str, out: Path | None, as_json: bool) -> None:
    """Put a report into a file; with --json on standard output, and into a file only if one is named."""
    from ..bench.report import to_json, write_report

    if as_json:
        typer.echo(to_json(report))
    if out is not None or not as_json:
        typer.echo(f"wrote {write_report(out or RESULTS, stem, report)}", err=as_json)

"""`flash-mla bench plot`: pictures of reports that are there, without measuring anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, stop

__all__ = ["plot"]


def plot(
    reports: Annotated[
        list[Path],
        typer.Argument(
            exists=True, dir_okay=False, help="JSON of `flash-mla bench generate`; several make one picture."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A folder, or a prefix ending in .png.")],
    as_json: Json = False,
) -> None:
    """Draw tokens/s and GiB by context, ms/token by batch, from reports of `bench generate` on one machine."""
    from ..bench.plots import draw_generate, join

    try:
        written = draw_generate(join([_read(file) for file in reports]), out)
    except (ImportError, OSError, ValueError) as error:
        stop(f"{type(error).__name__}: {error}")
    if as_json:
        typer.echo(json.dumps({"reports": [str(file) for file in reports], "written": [str(path) for path in written]}))
        return
    for path in written:
        typer.echo(f"wrote {path}")


def _read(file: Path) -> dict[str, object]:
    """A report.

    Raises: ValueError: not what `flash-mla bench generate` writes.
    """
    wrong = f"flash-mla bench plot: {file} must be JSON of `flash-mla bench generate`"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{wrong}: it is not JSON ({error})") from None
    about = report.get("what") if isinstance(report, dict) else None
    if not isinstance(about, str) or not about.startswith("generate(), greedy") or not report.get("rows"):
        raise ValueError(f"{wrong}, with rows: it is about {about!r}")
    return dict(report)

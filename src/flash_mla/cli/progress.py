"""Progress bars of the commands: on standard error, for a person who looks; none into a pipe, none beside --json."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

__all__ = ["bars"]


@contextmanager
def bars(quiet: bool, *, during_measurement: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A callback `(name, done, total)` that draws a bar per name, gone at the end.

    Args:
        quiet: draw nothing, and keep Transformers from drawing its own while weights are loaded.
        during_measurement: redraw when the callback is called and never meanwhile: a thread that redraws would take
            turns with the measured one.
    """
    is_off = quiet or not sys.stderr.isatty()
    loading = transformers.utils.logging.is_progress_bar_enabled()
    if is_off:
        transformers.utils.logging.disable_progress_bar()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        disable=is_off,
        auto_refresh=not during_measurement,
    ) as progress:
        tasks: dict[str, Any] = {}

        def step(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)
            if during_measurement:
                progress.refresh()

        try:
            yield step
        finally:
            if is_off and loading:
                transformers.utils.logging.enable_progress_bar()

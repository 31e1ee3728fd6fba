"""What the options of several commands mean, where they print, and how they stop."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

__all__ = ["Json", "Output", "console", "device_of", "dtype_of", "numbers_of", "stop"]

Json = Annotated[bool, typer.Option("--json", help="Machine-readable: JSON on standard output and nothing else there.")]

# Into a file or a pipe a table keeps its rows whole; rich would wrap it at 80 columns.
console = Console(width=None if sys.stdout.isatty() else 180)


class Output:
    """Where a command's tables and lines go: to standard output, and beside --json nowhere."""

    def __init__(self, as_json: bool) -> None:
        self.is_quiet = as_json

    def show(self, table: Table) -> None:
        """Print a table."""
        if not self.is_quiet:
            console.print(table)

    def say(self, line: str) -> None:
        """Print a line."""
        if not self.is_quiet:
            typer.echo(line)


def stop(message: str) -> NoReturn:
    """Say why on stderr and exit with 1."""
    typer.echo(message, err=True)
    raise typer.Exit(1)


def device_of(name: str | None) -> torch.device:
    """The device of `--device`; without it a GPU if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_of(name: str | None, device: str | None) -> torch.dtype:
    """The dtype of `--dtype`; without it bfloat16 on a GPU, float32 on a CPU.

    Raises: typer.BadParameter: no dtype of torch.
    """
    if name is None:
        return torch.bfloat16 if device_of(device).type == "cuda" else torch.float32
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise typer.BadParameter(f"no such dtype: {name}", param_hint="--dtype")
    return kind


def numbers_of(text: str, option: str, what: str = "tokens") -> list[int]:
    """Numbers of `what` of an option, in their order.

    Raises: typer.BadParameter: not such a list, or a number twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise typer.BadParameter(
            f"must be different numbers of {what} >= 1 with commas between, got {text!r}", param_hint=option
        )
    return [int(part) for part in parts]

"""What the options of several commands mean, where they print, and how they stop."""

from __future__ import annotations

import sys
from typing import NoReturn

import torch
import typer
from rich.console import Console

__all__ = ["console", "device_of", "dtype_of", "stop"]

# Into a file or a pipe a table keeps its rows whole; rich would wrap it at 80 columns.
console = Console(width=None if sys.stdout.isatty() else 180)


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

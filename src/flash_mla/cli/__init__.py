"""The `flash-mla` command. Nothing is imported before it runs: `import flash_mla` needs neither typer nor rich."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point of `flash-mla`."""
    try:
        from .app import app
    except ImportError as error:
        if error.name not in {"typer", "rich"}:
            raise
        raise ImportError(
            f"flash-mla needs {error.name}: pip install typer rich (Transformers 5 brings both)"
        ) from None
    app()

"""Run notebooks and write them with what they print and draw.

    python examples/notebooks/execute.py quickstart --out executed
    python examples/notebooks/execute.py --out executed                  # all of them
    FLASH_MLA_NOTEBOOK=tiny python examples/notebooks/execute.py quickstart

Each NAME.py (jupytext, py:percent) becomes NAME.ipynb and a PNG per picture, NAME-1.png and so on. The kernel is this
interpreter, with its environment. A cell that raises ends the run with status 1; the notebook is written up to there.
"""

from __future__ import annotations

import base64
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).resolve().parent
# No bars in what is kept, nor tqdm's advice to install widgets for them.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path != Path(__file__).resolve())


def pictures(notebook: Any) -> list[bytes]:
    """PNG files of a notebook's outputs, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    found = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [base64.b64decode(text) for text in found]


def execute(name: str, out: Path, timeout: int) -> bool:
    """Run a notebook and write it; False if a cell raised, which is printed."""
    try:
        import jupytext
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
        from traitlets.config import Config
    except ImportError as error:
        raise SystemExit(f"execute.py needs {error.name}: pip install 'transformers-flash-mla[notebooks]'") from None
    notebook = jupytext.read(HERE / f"{name}.py", fmt="py:percent")
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    begin = time.perf_counter()
    failed = None
    # Sockets in a folder of this user: TCP ports would be there for everybody on the machine.
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            config=Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"}),
            resources={"metadata": {"path": str(HERE)}},
            timeout=timeout,
            coalesce_streams=True,
        )
        try:
            client.execute()
        except CellExecutionError as error:
            failed = error
    out.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out / f"{name}.ipynb")
    drawn = pictures(notebook)
    for number, picture in enumerate(drawn, 1):
        (out / f"{name}-{number}.png").write_bytes(picture)
    print(f"{out / name}.ipynb: {time.perf_counter() - begin:.0f} s, {len(drawn)} pictures")
    if failed is not None:
        print(failed, file=sys.stderr)
    return failed is None


def main(
    name: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(NAMES)}; default: all.")] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder to write to.")] = Path(),
    timeout: Annotated[int, typer.Option(min=1, help="Seconds that a cell may take.")] = 600,
) -> None:
    """Run notebooks and write them with what they print and draw."""
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    unknown = sorted(set(name or ()) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"no such notebook: {', '.join(unknown)}; have {', '.join(NAMES)}")
    done = [execute(one, out, timeout) for one in name or NAMES]
    if not all(done):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

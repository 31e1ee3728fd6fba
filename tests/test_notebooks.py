"""The notebooks run from the first cell to the last on the tiny checkpoint, and what they print is true."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "notebooks"
# By notebook; peak memory is drawn where there is a GPU.
PICTURES = {"long_context": 3 if torch.cuda.is_available() else 2, "prefix_rag": 1, "quickstart": 1}


def execute(*arguments: object, script: Path = FOLDER / "execute.py") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FLASH_MLA_NOTEBOOK": "tiny", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    environment.pop("TRITON_INTERPRET", None)  # the tests' own; a user does not set it
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def outputs(notebook: Any, kind: str = "stdout") -> str:
    streams = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == kind]
    return "".join(output.text for output in streams)


def executed(name: str, out: Path) -> str:
    """Run a notebook: every cell ran and drew. Returns what it printed."""
    process = execute(name, "--out", out)
    assert process.returncode == 0, process.stdout + process.stderr
    notebook = nbformat.read(out / f"{name}.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    if not torch.cuda.is_available():  # there libraries may have something to say about the GPU
        assert outputs(notebook, "stderr") == ""
    pictures = sorted(out.glob("*.png"))
    assert [path.name for path in pictures] == [f"{name}-{number}.png" for number in range(1, PICTURES[name] + 1)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert is_of_a_gpu(notebook) == torch.cuda.is_available()
    assert notebook.cells[0].source.startswith("# "), "a title"
    return outputs(notebook)


def test_quickstart(tmp_path: Path) -> None:
    text = executed("quickstart", tmp_path)
    assert "size: tiny" in text
    assert "Licensed under the Apache License" in text
    new = int(re.search(r"append on \w+: (\d+)", text).group(1)) // 4  # layers
    assert f"deepseek_v3: prefill 4\ndeepseek_v3: absorbed {4 * (new - 1)}\n" in text
    assert "tokens identical: True" in text
    # One token, the last, is generated and not yet stored.
    first, second = map(int, re.findall(r"turn: .* in use, (\d+) tokens", text))
    assert first < second
    used, padded = map(int, re.search(r"of 16 tokens in use, (\d+) tokens; .* for (\d+) positions", text).groups())
    assert used < 0.6 * padded
    assert re.search(r"^latents, bf16 +31,104 bytes per token +11.25%$", text, re.MULTILINE)
    assert re.search(r"^latents, FP8 rows +17,712 bytes per token +6.41%$", text, re.MULTILINE)
    assert len(re.findall(r"^(?:flash_mla|sdpa) +[\d.]+ ms/token", text, re.MULTILINE)) == 2


def test_long_context(tmp_path: Path) -> None:
    text = executed("long_context", tmp_path)
    row = r"^ +([\d,]+)  (native \(sdpa\)|flash_mla|flash_mla, FP8 rows) +([\d.]+) +[\d.]+ +([\d.]+) "
    found = {(way, int(ctx.replace(",", ""))): float(mib) for ctx, way, _, mib in re.findall(row, text, re.MULTILINE)}
    assert len(found) == 9
    # A latent of tiny: 128 + 32 columns of fp32, 3 layers, 2 rows; 7 new tokens were stored, 8 generated.
    assert found["native (sdpa)", 1024] == pytest.approx(2 * (1024 + 7) * 160 * 4 * 3 / 2**20, abs=0.005)
    # FP8: 208 bytes in place of 640, in as many pages. On CUDA pools of this size are one granule of 2 MiB either way.
    if not torch.cuda.is_available():
        assert found["flash_mla, FP8 rows", 1024] / found["flash_mla", 1024] == pytest.approx(208 / 640, abs=0.005)
    # 3 layers x 6 calls x 2 (a warm-up of 3 tokens, a run of 8).
    assert "{'prefill': 36, 'absorbed': 162}" in text


def test_prefix_rag(tmp_path: Path) -> None:
    text = executed("prefix_rag", tmp_path)
    rows = re.findall(r"^[\w./]+ +(\d+) +(\d+) +[\d.]+ +[\d.]+  (True|False)$", text, re.MULTILINE)
    assert len(rows) == 3
    for prompt, loaded, same in rows:
        assert 900 < int(loaded) < int(prompt)
        assert same == "True"
    assert re.search(r"^ValueError: flash_mla.PrefixStore: .*: changed since written$", text, re.MULTILINE)
    assert "of another text: None" in text
    lengths = re.findall(r"^ +([\d,]+) tokens, .* ms cold, .* 8 of 8 tokens equal$", text, re.MULTILINE)
    assert lengths == ["64", "256", "1,024"]


def is_of_a_gpu(notebook: Any) -> bool:
    """Whether the machine that a notebook names is an NVIDIA GPU."""
    return outputs(notebook).startswith("NVIDIA") or ", NVIDIA " in outputs(notebook)


def test_outputs_in_the_repository_are_of_a_gpu() -> None:
    for path in [*ROOT.glob("examples/**/*.ipynb"), *ROOT.glob("docs/**/*.ipynb")]:
        assert is_of_a_gpu(nbformat.read(path, 4)), path


def test_a_cell_that_raises_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "execute.py", tmp_path)
    cells = "# %%\nimport sys\nprint(sys.executable)\n# %%\n1 / 0\n# %%\nprint('never')\n"
    (tmp_path / "broken.py").write_text(cells)
    done = execute("broken", "--out", tmp_path / "out", script=tmp_path / "execute.py")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    notebook = nbformat.read(tmp_path / "out" / "broken.ipynb", 4)
    assert outputs(notebook) == f"{sys.executable}\n", "the kernel is the interpreter that runs the script"


def test_every_notebook_has_a_test() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(["execute", *PICTURES])
    assert all(f"test_{name}" in globals() for name in PICTURES)


def test_what_cannot_be_run_is_said() -> None:
    done = execute("no_such")
    assert done.returncode == 2
    assert "no such notebook: no_such; have long_context, prefix_rag, quickstart" in done.stderr
    code = "import runpy, sys; sys.modules['jupytext'] = None; sys.argv = ['execute.py', 'quickstart']\n"
    code += f"runpy.run_path({str(FOLDER / 'execute.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "execute.py needs jupytext: pip install 'transformers-flash-mla[notebooks]'"

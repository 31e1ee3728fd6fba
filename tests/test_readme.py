"""README.md is true: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from flash_mla.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]

SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

# What a snippet says for a reader, and what stands in for it on a machine with neither network nor GPU.
STAND_INS = {
    '"deepseek-ai/DeepSeek-V2-Lite"': repr(str(ROOT / "examples" / "tiny-deepseek-v3")),
    'device_map="cuda"': 'device_map="cuda"' if torch.cuda.is_available() else 'device_map="cpu"',
}


def test_there_are_two_snippets() -> None:
    assert len(SNIPPETS) == README.count("```python") == 2


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    code = SNIPPETS[number]
    for said, meant in STAND_INS.items():
        if number == 0:
            assert said in code
        code = code.replace(said, meant)
    names: dict[str, object] = {}
    exec(compile(code, f"README.md snippet {number}", "exec"), names)
    if number == 0:
        printed = capsys.readouterr().out
        assert "pages of 64 tokens in use" in printed
        assert "('deepseek_v3', 'absorbed')" in printed
        assert names["cache"].memory_report().tokens_used > 60
    else:
        assert names["out"].shape == (2, 1, 16, 512)
        assert names["lse"].shape == (2, 16, 1)
        assert bool(names["out"].isfinite().all())


def test_the_two_commands_are_what_ci_runs() -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    first, second = block.splitlines()
    assert first == 'pip install -e . && python examples/generate.py "Licensed under"'
    assert second == "pip install -e '.[test]' && pytest"
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script  # it takes them from here


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        found += re.findall(r"`(flash-mla [^`]+)`", text) + re.findall(r"^ {4}(flash-mla .+)$", text, re.MULTILINE)
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_command_exists_with_its_options(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # files in commands are relative to the repository
    words = shlex.split(command)[1:]
    found = typer.main.get_command(app)
    while words and hasattr(found, "commands"):
        name, *words = words
        assert name in found.commands, command
        found = found.commands[name]
    if not hasattr(found, "commands"):
        found.make_context(command, words)  # raises on an option or a value that does not exist


def test_every_page_is_in_the_table_of_documents() -> None:
    listed = set(re.findall(r"^\| \[([^]]+)\]", README.split("## Documents")[1], re.MULTILINE))
    assert set(PAGES) - {"README.md"} <= listed


def test_every_page_names_commands() -> None:
    assert len(commands()) >= 6


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        if not target.startswith("https://"):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page: str) -> None:
    named = re.findall(r"`((?:src|docs|examples|tests|benchmarks|hf|\.ci)/[\w./-]+)`", (ROOT / page).read_text())
    for name in named:
        folder = ROOT / "src" / "flash_mla" if name.startswith("hf/") else ROOT
        assert (folder / name).exists(), f"{page}: {name}"

"""docs/*.md are true: their snippets run and print what stands below them, the messages they quote are the source's.

The Python of a page runs in order, in one namespace, from the repository's root. A ```text block behind a snippet is
what it prints. A block that begins with "# not run in CI: <reason>" is only parsed. A ```message block quotes an error
or a warning, "..." for what varies. Pages whose Python needs a server or a cluster are run by the tests that have one.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from typer.testing import CliRunner

import flash_mla
from flash_mla import ops
from flash_mla.backends import torch as definition
from flash_mla.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "flash_mla"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
NOT_RUN = "# not run in CI: "
LANGUAGES = {"python", "sh", "text", "message"}
# Whose Python runs in a test with a server, or with Spark: all of it, since that test takes every snippet of the page.
ELSEWHERE = {"mlflow_spark.md": "test_spark.py", "serving.md": "test_serve.py"}


class Block(NamedTuple):
    """A fenced block: the word behind its fence, its text, the line it begins in."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    return [
        Block(match[1], match[2], page[: match.start()].count("\n") + 1)
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    ]


@pytest.fixture
def definition_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not Triton's interpreter, which the tests switch on: seconds per step."""
    monkeypatch.setattr(ops, "BACKENDS", {"torch": definition})
    ops._choose.cache_clear()
    yield
    ops._choose.cache_clear()


def with_blocks(language: str) -> list[str]:
    return [name for name, page in PAGES.items() if any(block.language == language for block in blocks(page))]


# --- snippets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_of_a_kind_that_is_tested(name: str) -> None:
    found = blocks(PAGES[name])
    assert 2 * len(found) == len(re.findall(r"^```", PAGES[name], re.MULTILINE)), "fences in pairs"
    for before, block in zip([None, *found], found, strict=False):
        where = f"{name}:{block.line}"
        assert block.language in LANGUAGES, where
        if block.text.startswith("# not run"):
            assert re.match(re.escape(NOT_RUN) + r"\w.{10,}\n", block.text), f"{where}: says why"
        if block.language == "text":
            assert before is not None, where
            assert before.language == "python", where
            assert before.line + before.text.count("\n") + 2 == block.line, f"{where}: right below what prints it"


def names_of(code: str) -> Iterator[str]:
    """Attributes of `flash_mla` that a snippet uses."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "flash_mla":
            yield node.attr


def run_python(name: str, page: str, capsys: pytest.CaptureFixture[str]) -> int:
    """Run a page's Python; returns how many snippets ran."""
    names: dict[str, object] = {}
    number = 0
    found = blocks(page)
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language != "python":
            continue
        code = compile("\n" * block.line + block.text, f"docs/{name}", "exec")
        for used in names_of(block.text):
            assert hasattr(flash_mla, used), f"{name}:{block.line}: flash_mla.{used}"
        if block.text.startswith(NOT_RUN):
            continue
        capsys.readouterr()
        exec(code, names)
        printed = capsys.readouterr().out
        shown = after.text if after is not None and after.language == "text" else ""
        assert printed == shown, f"{name}:{block.line}"
        number += 1
    return number


@pytest.mark.usefixtures("definition_only")
@pytest.mark.parametrize("name", [name for name in with_blocks("python") if name not in ELSEWHERE])
def test_python_runs_and_prints(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    assert run_python(name, PAGES[name], capsys) >= 1


@pytest.mark.parametrize("name", ELSEWHERE)
def test_python_that_runs_elsewhere(name: str) -> None:
    """Nothing of such a page is left out there, and nothing shown as printed that nobody compares."""
    other = (ROOT / "tests" / ELSEWHERE[name]).read_text(encoding="utf-8")
    assert f'"docs" / "{name}"' in other
    assert 'r"^```python\\n(.*?)^```"' in other
    for block in blocks(PAGES[name]):
        assert block.language != "text", f"{name}:{block.line}"
        if block.language == "python":
            assert not block.text.startswith(NOT_RUN), f"{name}:{block.line}"


def run_shell(block: Block) -> None:
    """Run a block's commands, ours in this process, Python in one of its own; others must say why they are not run."""
    if block.text.startswith(NOT_RUN):
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        return
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] in ("flash-mla", "python"), f"{line}: must begin with {NOT_RUN!r} and a reason"
        if words[0] == "flash-mla":
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}: {result.output}{result.exception}"
        else:
            subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.usefixtures("definition_only")
@pytest.mark.parametrize("name", with_blocks("sh"))
def test_shell_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(PAGES[name]):
        if block.language == "sh":
            run_shell(block)


def test_pages_with_snippets_are_there() -> None:
    assert {"faq.md", "mla.md", "scaling.md"} <= set(with_blocks("python"))
    assert {"scaling.md", "troubleshooting.md"} <= set(with_blocks("sh"))


def test_a_page_that_is_wrong_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def page(code: str, printed: str) -> str:
        return f"```python\n{code}\n```\n```text\n{printed}\n```\n"

    assert run_python("page", page("print(1 + 1)", "2"), capsys) == 1
    with pytest.raises(AssertionError, match="page:1"):
        run_python("page", page("print(1 + 1)", "3"), capsys)
    with pytest.raises(AssertionError, match=r"page:1: flash_mla\.no_such"):
        run_python("page", page(f"{NOT_RUN}needs a GPU\nflash_mla.no_such()", ""), capsys)
    with pytest.raises(SyntaxError):
        run_python("page", page(f"{NOT_RUN}needs a GPU\nflash_mla.decode(", ""), capsys)
    for wrong in ("curl example.org", "flash-mla estimate no-such-model", "python -c 'raise SystemExit(1)'"):
        with pytest.raises((AssertionError, subprocess.CalledProcessError)):
            run_shell(Block("sh", wrong, 1))
    with pytest.raises(subprocess.CalledProcessError):
        run_shell(Block("sh", f"{NOT_RUN}a reason\nfor do", 1))


# --- quoted messages --------------------------------------------------------------------------------------------------


def templates() -> set[str]:
    """Every string of the source, "..." for what an f-string puts in."""
    found = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%[rsd]", "...", node.value))  # of a log line
    return found


TEMPLATES = templates()
QUOTED = [(name, block) for name, page in PAGES.items() for block in blocks(page) if block.language == "message"]


def is_quoted_from_source(message: str) -> bool:
    wanted = re.sub(r"^(\.\.\. ?)+|( ?\.\.\.)+$", "", message.strip())
    return len(wanted.replace("...", "")) >= 15 and any(wanted in template for template in TEMPLATES)


@pytest.mark.parametrize(("name", "block"), QUOTED, ids=[f"{name}:{block.line}" for name, block in QUOTED])
def test_message_is_in_the_source(name: str, block: Block) -> None:
    assert is_quoted_from_source(block.text), f"{name}:{block.line}: {block.text}"


def test_messages_are_quoted_and_others_are_noticed() -> None:
    assert len(QUOTED) >= 40
    assert is_quoted_from_source("flash_mla needs transformers >= ..., found ...")
    assert not is_quoted_from_source("flash_mla wants transformers >= ..., found ...")
    assert not is_quoted_from_source("... ...")


def test_a_quoted_message_is_what_is_raised() -> None:
    """Not only in the source: this one, from a call, fits the page's pattern."""
    with pytest.raises(ValueError, match="block_size") as raised:
        flash_mla.PagedLatentCache(None, block_size=24)
    patterns = [re.escape(block.text.strip()).replace(r"\.\.\.", ".*") for _, block in QUOTED]
    assert sum(re.fullmatch(pattern, str(raised.value)) is not None for pattern in patterns) == 1

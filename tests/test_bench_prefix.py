"""What `flash-mla bench prefix` measures: warm is warm, cold is cold, and their tokens are compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import flash_mla
from flash_mla import ops
from flash_mla.backends import torch as definition
from flash_mla.bench import plots
from flash_mla.bench import prefix as bench
from flash_mla.bench.shapes import build_model, build_named
from flash_mla.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "examples" / "tiny-deepseek-v3")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def definition_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not Triton's interpreter, which the tests switch on: seconds per step."""
    monkeypatch.setattr(ops, "BACKENDS", {"torch": definition})
    ops._choose.cache_clear()
    yield
    ops._choose.cache_clear()


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build_named("tiny", dtype=torch.float32, device=CPU, attn_implementation="flash_mla")


def command(*flags: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", "prefix", "--device", "cpu", *map(str, flags)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def test_the_tiny_checkpoint(tmp_path: Path) -> None:
    folder, file = tmp_path / "store", tmp_path / "run.json"
    # The model of the store, and an entry that somebody else's run needs.
    model = build_model(TINY, dtype=torch.float32, device=CPU, attn_implementation="flash_mla")
    store = flash_mla.PrefixStore(folder, model)
    own = bench.prompt_of(model, 100, 7)[:, :100]
    kept, _ = bench._save(model, store, own)
    flags = ("--model", TINY, "--prefix", "100,192", "--question", 7, "--new-tokens", 4, "--rounds", 3)
    text = command(*flags, "--store", folder, "--out", file, "--plot", tmp_path / "ttft.png")
    report = json.loads(file.read_text())
    assert [(row["prefix"], row["loaded"], row["identical_tokens"]) for row in report["rows"]] == [
        (100, 100, 4),
        (192, 192, 4),
    ]
    for row in report["rows"]:
        # 4 layers; the question of the warm prompt goes over the stored pages.
        assert row["cold_paths"] == {"deepseek_v3 prefill": 4, "deepseek_v3 absorbed": 4 * 3}
        assert "deepseek_v3 prefill" not in row["warm_paths"]
        assert sum(row["warm_paths"].values()) == 4 * 4
        assert len(row["cold_round_s"]) == len(row["warm_round_s"]) == row["rounds"] == 3
        assert row["warm_s"] == sorted(row["warm_round_s"])[1]
        assert row["cold_s"] == sorted(row["cold_round_s"])[1]
        assert 0 < row["load_s"] < row["warm_s"]
        # Latents and rotated keys in fp32, and a header.
        latents = row["prefix"] * 160 * 4 * 4
        assert latents < row["file_bytes"] < latents + 16384
    assert [entry.key for entry in store.entries()] == [kept], "the store is as it was"
    assert report["versions"]["torch"]
    assert report["store"] == str(folder)
    assert "4 of 4" in text
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")


class Scripted:
    """Answers with given seconds to the first token, a warm-up first; notes in which order they were asked for."""

    def __init__(self, cold: list[float], warm: list[float], warm_tokens: list[int]) -> None:
        self.seconds = {"cold": iter(cold), "warm": iter(warm)}
        self.tokens = {"cold": [5, 6, 7], "warm": warm_tokens}
        self.log: list[str] = []

    def __call__(self, model: Any, input_ids: torch.Tensor, store: Any, new_tokens: int) -> bench._Answer:
        kind = "cold" if store is None else "warm"
        self.log.append(kind)
        seconds = next(self.seconds[kind])
        if seconds < 0:
            raise torch.OutOfMemoryError("tried to allocate 99 GiB")
        return bench._Answer(seconds, seconds / 2, 40, self.tokens[kind], {})


def test_rows_are_medians_of_rounds_in_turns(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted([90.0, 4.0, 9.0, 5.0], [80.0, 2.0, 1.0, 0.5], [5, 6, 8])
    monkeypatch.setattr(bench, "time_answer", script)
    store, lines = flash_mla.PrefixStore(tmp_path, tiny), []
    (row,), failed = bench.measure("tiny", tiny, store, [40], new_tokens=3, rounds=3, report=lines.append)
    assert script.log == ["cold", "warm"] * 4
    assert (row.cold_s, row.cold_spread_s, row.cold_round_s) == (5.0, 5.0, [4.0, 9.0, 5.0])
    assert (row.warm_s, row.warm_spread_s, row.load_s, row.ratio) == (1.0, 1.5, 0.5, 0.2)
    assert (row.identical_tokens, row.prefix, row.question) == (2, 40, 64)
    assert failed == {}
    assert lines == ["prefix 40: 5000.0 ms cold, 1000.0 ms warm"]


def test_what_does_not_fit_is_named_and_the_store_left_clean(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "time_answer", Scripted([1.0, 1.0, -1.0], [1.0, 1.0], [5, 6, 7]))
    store = flash_mla.PrefixStore(tmp_path, tiny)
    rows, failed = bench.measure("tiny", tiny, store, [40, 80], new_tokens=3, rounds=1, report=lambda line: None)
    assert [row.prefix for row in rows] == [40]
    assert failed == {"prefix 80": "tried to allocate 99 GiB"}
    assert store.entries() == []


def test_other_tokens_fail_in_float32_and_are_told_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--prefix", 40, "--new-tokens", 3, "--rounds", 1, "--out", tmp_path)
    for dtype, code in (("float32", 1), ("bfloat16", 0)):
        monkeypatch.setattr(bench, "time_answer", Scripted([1.0, 1.0], [1.0, 1.0], [5, 0, 7]))
        text = command(*flags, "--dtype", dtype, code=code)
        assert "1 of 3" in text
        assert ("FAILED: prefix 40: in float32 warm tokens must be those of the cold prompt" in text) == bool(code)


def test_picture_has_both_ways_with_their_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    write = plots._write
    monkeypatch.setattr(plots, "_write", lambda figure, axes, path: drawn.append(axes) or write(figure, axes, path))
    row = {"model": "tiny", "dtype": "float32", "question": 64}
    rows = [
        {**row, "prefix": 4096, "cold_s": 8.0, "cold_round_s": [7.0, 8.0], "warm_s": 2.0, "warm_round_s": [2.0]},
        {**row, "prefix": 256, "cold_s": 4.0, "cold_round_s": [4.0], "warm_s": 1.0, "warm_round_s": [1.0, 1.5]},
    ]
    path = plots.draw_prefix({"device": "cpu", "rows": rows}, tmp_path / "new" / "ttft.png")
    assert path.stat().st_size > 10_000
    (axes,) = drawn
    assert axes.get_title(loc="left").startswith("TTFT cold and with a stored prefix")
    lines = {container.get_label(): container.lines for container in axes.containers}
    cold, warm = lines["cold"], lines["stored prefix, loading included"]
    assert cold[0].get_xydata().tolist() == [[256.0, 4000.0], [4096.0, 8000.0]]
    assert warm[0].get_xydata().tolist() == [[256.0, 1000.0], [4096.0, 2000.0]]
    (bars,) = warm[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[1000.0, 1500.0], [2000.0, 2000.0]]
    with pytest.raises(ValueError, match="needs a report of `flash-mla bench prefix`"):
        plots.draw_prefix({"device": "cpu", "rows": [{"decode_ms": 1.0}]}, tmp_path / "other.png")


def test_command_refuses_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = command("--prefix", "64,64", code=2)
    assert "--prefix" in text
    assert "got '64,64'" in text
    assert "must end in .png" in command("--plot", tmp_path / "ttft.pdf", code=2)
    assert "uri must be a folder or a URI that fsspec knows" in command("--store", "spam://x", code=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = command("--plot", tmp_path / "ttft.png", code=1)
    assert text.strip().splitlines()[-1] == (
        'ImportError: flash-mla bench prefix --plot needs matplotlib: pip install "transformers-flash-mla[bench]"'
    )

"""`flash-mla cost`: its dollars against a count of one's own, and what it says of files that are no such report.

Faults it must catch: seconds taken for milliseconds, tokens of one row where the batch is meant, the first token left
out of the call, a native row of other work beside ours, a report of something else turned into a number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flash_mla.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROW = {
    "model": "org/model",
    "attn": "flash_mla",
    "cache": "dynamic",
    "dtype": "bfloat16",
    "batch": 4,
    "prompt": 1000,
    "new_tokens": 50,
    "ttft_s": 2.0,
    "decode_ms": 20.0,
    "tokens_per_s": 50.0,
}
HEAD = {"device": "a GPU", "date": "2026-01-02T03:04:05+00:00", "what": "generate(), greedy; method"}


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["cost", *map(str, arguments)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def written(tmp_path: Path, *rows: dict[str, Any], **head: Any) -> Path:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({**HEAD, "rows": rows, **head}))
    return file


def found(*arguments: object) -> list[dict[str, Any]]:
    return json.loads(run(*arguments, "--json").stdout)["rows"]


def test_dollars_of_a_row_by_hand(tmp_path: Path) -> None:
    # 3.6 $ an hour: a second costs 0.001 $. The call took 4 x 50 / 50 = 4 s.
    (row,) = found(written(tmp_path, ROW), "--price-per-hour", 3.6)
    assert row["wall_s"] == pytest.approx(4)
    assert row["per_million"] == pytest.approx(
        {
            "prompt": 0.5,  # 2 s for 4,000 tokens
            "decode": 5,  # 0.02 s for 4 tokens
            "generated": 20,  # 4 s for 200 tokens
            "blended": 0.004 / 4200 * 1e6,  # 4 s for 4,200 tokens
        }
    )
    assert row["over_native"] is None
    (half,) = found(written(tmp_path, ROW), "--price-per-hour", 3.6, "--utilization", 0.5)
    assert half["per_million"] == pytest.approx({name: 2 * value for name, value in row["per_million"].items()})


def test_native_stands_beside_ours_where_both_did_the_same_work(tmp_path: Path) -> None:
    native = {**ROW, "attn": "sdpa", "decode_ms": 50.0, "tokens_per_s": 25.0, "ttft_s": 2.5}
    other = {"model": "org/b", "cache": "static", "dtype": "float16", "batch": 2, "prompt": 2000, "new_tokens": 51}
    others = [{**native, "decode_ms": 99.0, name: value} for name, value in other.items()]
    rows = found(written(tmp_path, *others, ROW, native, {**ROW, "prompt": 3000}), "--price-per-hour", 4)
    ours = rows[6]["over_native"]
    assert ours == {"attn": "sdpa", **{name: pytest.approx(ours[name]) for name in ours if name != "attn"}}
    assert [ours[name] for name in ("prompt", "decode", "generated", "blended")] == pytest.approx([0.8, 0.4, 0.5, 0.5])
    assert [row["over_native"] for row in rows if row is not rows[6]] == [None] * 8


def test_fp8_pages_have_a_name_and_stand_beside_native_too(tmp_path: Path) -> None:
    file = written(tmp_path, {**ROW, "cache_dtype": "fp8"}, {**ROW, "attn": "sdpa", "decode_ms": 50.0}, ROW)
    fp8, native, ours = found(file, "--price-per-hour", 4)
    assert [row["cache_dtype"] for row in (fp8, native, ours)] == ["fp8", None, None]
    assert fp8["over_native"]["decode"] == ours["over_native"]["decode"] == pytest.approx(0.4)
    assert "│ flash_mla fp8 │" in run(file, "--price-per-hour", 4).stdout


def test_each_figure_stands_below_its_name(tmp_path: Path) -> None:
    native = {**ROW, "attn": "sdpa", "decode_ms": 50.0, "tokens_per_s": 25.0}
    file = written(tmp_path, {**ROW, "model": "/a/folder/checkpoint"}, {**native, "model": "/a/folder/checkpoint"})
    text = run(file, "--price-per-hour", 3.6).stdout
    (heading,) = (line for line in text.splitlines() if "┃" in line)
    lines = [line for line in text.splitlines() if line.startswith("│")]
    ours, theirs = (
        dict(
            zip(
                *([cell.strip() for cell in one.strip("┃│ ").replace("┃", "│").split("│")] for one in pair), strict=True
            )
        )
        for pair in ((heading, line) for line in lines)
    )
    assert ours == {
        "model": "checkpoint", "attn": "flash_mla", "cache": "dynamic", "batch": "4", "prompt tokens": "1000",
        "new tokens": "50", "prompt": "0.5", "decode": "5", "generated": "20", "blended": "0.9524",
        "decode / native": "0.400", "generated / native": "0.500",
    }  # fmt: skip
    assert (theirs["decode"], theirs["decode / native"], theirs["generated / native"]) == ("12.5", "-", "-")


def test_table_of_a_report_that_was_measured() -> None:
    file = RESULTS / "h200_v2_b32_dynamic.json"
    report = json.loads(file.read_text())
    text = run(file, "--price-per-hour", 4).stdout
    assert "$ per million tokens at 4 per hour: NVIDIA H200" in text
    assert "decode / native" in text
    lines = [line for line in text.splitlines() if "dynamic" in line]
    assert len(lines) == len(report["rows"])
    for row, line in zip(report["rows"], lines, strict=True):
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        assert cells[1:6] == [row["attn"], "dynamic", "32", str(row["prompt"]), str(row["new_tokens"])]
        assert float(cells[7]) == pytest.approx(4 / 3600 * row["decode_ms"] / 1000 / 32 * 1e6, rel=1e-3)
        assert float(cells[8]) == pytest.approx(4 / 3600 / row["tokens_per_s"] * 1e6, rel=1e-3)
    assert run(file, "--price-per-hour", 4, "--utilization", 0.25).stdout.startswith(
        "$ per million tokens at 4 per hour, 25% of the time"
    )


def test_of_what_bench_generate_writes_now(tmp_path: Path) -> None:
    flags = ("--model", "tiny", "--prompt", "20", "--new-tokens", "4", "--baseline", "sdpa", "--device", "cpu")
    result = CliRunner().invoke(app, ["bench", "generate", *flags, "--out", str(tmp_path / "bench.json")])
    assert result.exit_code == 0, result.output
    ours, native = found(tmp_path / "bench.json", "--price-per-hour", 1)
    assert (ours["attn"], native["attn"]) == ("flash_mla", "sdpa")
    assert ours["over_native"]["decode"] == pytest.approx(ours["decode_ms"] / native["decode_ms"])


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_every_committed_report_has_a_price_or_a_reason(file: Path) -> None:
    if json.loads(file.read_text())["what"].startswith("generate()"):
        assert all(row["per_million"]["decode"] > 0 for row in found(file, "--price-per-hour", 4))
    else:
        assert (
            "must be JSON of `flash-mla bench generate`: it is about '"
            in run(file, "--price-per-hour", 4, code=1).stderr
        )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "it is not JSON"),
        ("[]", "it does not say what was measured"),
        (json.dumps({**HEAD, "rows": []}), "it has no rows"),
        (json.dumps({**HEAD, "rows": [1]}), "row 0 is no object"),
        (json.dumps({**HEAD, "device": None, "rows": [ROW]}), "it has no device"),
        (json.dumps({**HEAD, "rows": [ROW, {**ROW, "attn": None}]}), "row 1 must say its attn, got None"),
        (
            json.dumps({**HEAD, "rows": [{**ROW, "decode_ms": float("nan")}]}),
            "row 0 must have decode_ms above 0, got nan",
        ),
        (json.dumps({**HEAD, "rows": [{**ROW, "batch": 0}]}), "row 0 must have batch above 0, got 0"),
        (json.dumps({**HEAD, "rows": [{**ROW, "ttft_s": True}]}), "row 0 must have ttft_s above 0, got True"),
    ],
)
def test_what_is_no_such_report_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text(text)
    result = run(file, "--price-per-hour", 4, code=1)
    assert result.stdout == ""
    assert f"ValueError: flash-mla cost: {file} must be JSON of `flash-mla bench generate`: {reason}" in result.stderr


def test_price_and_utilization_have_bounds(tmp_path: Path) -> None:
    file = written(tmp_path, ROW)
    assert "Missing option '--price-per-hour'" in run(file, code=2).output
    for price in (0, -1, "nan", "inf"):
        assert "the price per hour must be above 0, got" in run(file, "--price-per-hour", price, code=1).stderr
    for share in (0, 1.1):
        line = run(file, "--price-per-hour", 1, "--utilization", share, code=1).stderr
        assert f"the utilization must be above 0 and at most 1, got {float(share)}" in line
    assert "does not exist" in run(tmp_path / "none.json", "--price-per-hour", 1, code=2).output

"""`flash-mla bench serve`: a short run on the tiny checkpoint, and that each of its checks can fail."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flash_mla.bench.serve import Found, checks
from flash_mla.cli.app import app

ROOT = Path(__file__).resolve().parents[1]


def test_a_third_of_the_clients_is_broken_and_everybody_else_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the tests' own; a user does not set it
    # Memory is no question of six seconds: the allocator has not settled.
    flags = ("--clients", 9, "--seconds", 6, "--new-tokens", 4, "--max-growth", 200, "--device", "cpu")
    file = tmp_path / "load.json"
    result = CliRunner().invoke(app, ["bench", "serve", *map(str, flags), "--json", "--out", str(file)])
    assert result.exit_code == 0, result.output + str(result.exception)
    report = json.loads(file.read_text())
    assert json.loads(result.stdout) == report
    assert all(report["checks"].values())
    assert len(report["checks"]) == 7
    assert report["answered"] >= 3
    assert len(report["broken"]) >= 3
    server = report["server"]
    assert server["flash_mla_kv_pages_total"] == 2048 / 64  # the model's max_position_embeddings
    assert server["flash_mla_requests_total /v1/chat/completions 200"] >= report["answered"]
    assert server["flash_mla_errors_total refused"] > 0
    assert server["flash_mla_errors_total left"] > 0
    assert report["versions"]["transformers"]
    assert len(report["memory_MiB"]) > 2


def whole() -> Found:
    return Found(
        good=2,
        broken=Counter(garbage=1),
        memory=[(float(second), 500.0) for second in range(12)],
        metrics={
            "flash_mla_kv_pages_used": 0,
            "flash_mla_kv_pages_total": 32,
            "flash_mla_requests_running": 0,
            "flash_mla_requests_waiting": 0,
            "flash_mla_errors_total failed": 0,
        },
        ping=200,
    )


def leaks(found: Found) -> None:
    found.memory = [(second, 500 + 3 * second) for second, _ in found.memory]


BROKEN: dict[str, Callable[[Found], None]] = {
    "every good request was answered": lambda found: found.wrong.append("x"),
    "every bad request was refused with JSON": lambda found: found.unexpected.append("x"),
    "no page is allocated": lambda found: found.metrics.update(flash_mla_kv_pages_used=1),
    "nobody runs or waits": lambda found: found.metrics.update(flash_mla_requests_waiting=1),
    "nothing failed in the server": lambda found: found.metrics.update({"flash_mla_errors_total failed": 1}),
    "/ping says 200": lambda found: setattr(found, "ping", 503),
    "memory grew by at most 16 MiB": leaks,
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_check_can_fail(name: str) -> None:
    found = whole()
    assert all(checks(found, 16).values())
    BROKEN[name](found)
    assert [check for check, holds in checks(found, 16).items() if not holds] == [name]

"""Pytest plugin: a test may be skipped for the hardware or the Transformers that it lacks, for nothing else.

    PYTHONPATH=.ci pytest -p skips

Works on the controller of pytest-xdist too: skips in a module's body arrive there as collect reports.
"""

import re

import pytest

EXPLAINED = re.compile(r"needs (a GPU|\d+ GPUs|Hopper)\b.*: |has a GPU: |Transformers (\S+ )?has no ")

unexplained: list[str] = []


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped:
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = f"xfail: {report.wasxfail}" if hasattr(report, "wasxfail") else reason.removeprefix("Skipped: ")
    if not EXPLAINED.match(reason):
        unexplained.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if unexplained and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if unexplained:
        terminalreporter.section("skipped without a reason that counts", red=True)
        for line in unexplained:
            terminalreporter.line(line)

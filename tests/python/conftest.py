"""Shared by all Python tests: seeds from the test's name, the `gpu` marker, and a count of what was skipped and why."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that is the test's own and the same in every run: the CRC-32 of its name, parameters included."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return ROOT


def no_gpu_reason() -> str | None:
    """Why GPU tests cannot run here, or None where they can."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device on this machine"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    reason = no_gpu_reason() if gpu_tests else None
    if reason:
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=reason))


def skip_lines(reports: list[pytest.TestReport]) -> list[str]:
    """One line per reason, the most frequent first: `12 skipped: no CUDA device on this machine`."""
    reasons: Counter[str] = Counter()
    for report in reports:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[text.removeprefix("Skipped: ")] += 1
    return [f"{count} skipped: {reason}" for reason, count in reasons.most_common()]


TIES = "rounding ties"


@pytest.fixture
def record_ties(record_property):
    """Adds to the count of int8 values off by one next to a rounding tie; the run's summary prints it. The counts travel
    with the test's report, since with pytest-xdist the test runs in another process."""

    def record(off: int, values: int) -> None:
        record_property(TIES, [off, values])

    return record


def tie_counts(reports: list[pytest.TestReport]) -> tuple[int, int]:
    """(values off by one, values) of all reports of tests' calls."""
    counts = [count for report in reports for name, count in report.user_properties if name == TIES]
    return sum(off for off, _ in counts), sum(values for _, values in counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was skipped and why; scripts/test.sh reads the same lines from the file SWIN_SKIP_REPORT."""
    lines = skip_lines(terminalreporter.stats.get("skipped", [])) or ["no Python test was skipped"]
    terminalreporter.section("skipped tests")
    for line in lines:
        terminalreporter.write_line(line)
    called = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    off, values = tie_counts([report for report in called if report.when == "call"])
    if values:
        terminalreporter.section(TIES)
        terminalreporter.write_line(f"{off} of {values} int8 values off by one next to a rounding tie")
    if path := os.environ.get("SWIN_SKIP_REPORT"):
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

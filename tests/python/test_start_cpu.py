"""benchmarks/start_cpu.py: what it says of processes, and a real run of the micro model."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import start_cpu
from pyharness.config import MICRO_DIGITS
from pyharness.errors import EngineError


def says(peak_mb: float, and_does: str = "") -> list[str]:
    """A program that says so much memory."""
    return [sys.executable, "-S", "-c", f"{and_does}\nprint('class 3')\nprint('{json.dumps({'peak_mb': peak_mb})}')"]


def test_a_process_is_timed_to_its_end():
    ms, mb = start_cpu.run_process(says(12.5, "import time; time.sleep(0.2)"))
    assert 200 <= ms < 20_000 and mb == 12.5


def test_a_process_that_fails_says_why():
    with pytest.raises(EngineError, match="ended with 3: nothing to classify"):
        start_cpu.run_process([sys.executable, "-c", "import sys; print('nothing to classify'); sys.exit(3)"])


def test_processes_alternate_and_the_first_round_does_not_count(tmp_path):
    log = tmp_path / "log"
    commands = {name: says(i, f"open({str(log)!r}, 'a').write({name!r})") for i, name in enumerate("ab")}
    times, memory = start_cpu.time_processes(commands, 2)
    assert log.read_text(encoding="utf-8") == "ababab"
    assert memory == {"a": [0, 0], "b": [1, 1]} and all(len(times[name]) == 2 for name in "ab")


def test_a_run_of_the_micro_model(tmp_path, capsys):
    words = ["--models", MICRO_DIGITS.name, "--rounds", "1", "--runs", "3", "--threads", "1", "--out", str(tmp_path)]
    assert start_cpu.main(words) == 0
    rows = json.loads((tmp_path / "start_cpu.json").read_text(encoding="utf-8"))["rows"]
    library, extension = rows
    assert [row["method"] for row in rows] == ["c_library", "torch_extension"]
    # A Python that imports PyTorch takes seconds and hundreds of MB, on any machine.
    assert 5 * library["process_ms"]["median"] < extension["process_ms"]["median"]
    assert 2 < library["peak_mb"] < extension["peak_mb"] / 2
    assert library["latency_vs_torch"]["median"] > 0 and extension["latency_vs_torch"] is None
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "start_cpu.md").read_text(encoding="utf-8").strip()
    assert MICRO_DIGITS.name in printed and "c_library" in printed

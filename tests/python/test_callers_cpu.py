"""benchmarks/callers_cpu.py: how threads are shared out, ratios within rounds, and a real run of the micro model."""

from __future__ import annotations

import json

import pytest

from benchmarks import callers_cpu
from pyharness.c_library import program_path
from pyharness.config import MICRO_DIGITS
from pyharness.errors import EngineError, HarnessError


def said(images_per_s: float, ms: float) -> dict:
    return {"images_per_s": images_per_s, "latency_ms": {"median": ms}}


def test_threads_are_shared_out_without_remainder():
    assert callers_cpu.arrangements(1) == [(1, 1)]
    assert callers_cpu.arrangements(6) == [(1, 6), (2, 3), (3, 2), (6, 1)]


def test_ratios_are_taken_within_rounds():
    rounds = [
        {(1, 2): said(100, 10), (2, 1): said(150, 13)},
        {(1, 2): said(50, 20), (2, 1): said(60, 33)},  # a slow moment
        {(1, 2): said(100, 10), (2, 1): said(140, 14)},
    ]
    whole, shared = callers_cpu.rows_of("m", "fused_int8", 4, rounds)
    assert (whole.callers, whole.threads, whole.vs_one_caller) == (1, 2, None)
    assert (shared.callers, shared.threads) == (2, 1)
    assert shared.vs_one_caller["median"] == pytest.approx(1.4)
    assert shared.images_per_s["median"] == 140 and shared.latency_ms["median"] == 14


def test_a_run_of_the_micro_model(tmp_path, capsys):
    words = ["--model", MICRO_DIGITS.name, "--rounds", "2", "--seconds", "0.05", "--threads", "2", "--batch", "1", "3"]
    assert callers_cpu.main([*words, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "callers_cpu.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["batch"], row["callers"], row["threads"]) for row in rows] == [(1, 1, 2), (1, 2, 1), (3, 1, 2), (3, 2, 1)]
    assert all(row["images_per_s"]["median"] > 0 and row["images_per_s"]["runs"] == 2 for row in rows)
    assert capsys.readouterr().out.strip() == (tmp_path / "callers_cpu.md").read_text(encoding="utf-8").strip()


def test_mistakes(tmp_path):
    with pytest.raises(HarnessError, match="--seconds must be finite and above zero"):
        callers_cpu.main(["--seconds", "0"])
    with pytest.raises(EngineError, match="ended with 1: error: .*nowhere"):
        callers_cpu.run_once(program_path(), tmp_path / "nowhere", 1, 1, 1, 0.1)

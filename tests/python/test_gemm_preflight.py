"""benchmarks/gemm_preflight.py with processes that stand in for a tuner on a GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import gemm_preflight
from benchmarks.gemm_preflight import Check, run_check
from pyharness.errors import EngineError, HarnessError

TUNER = """
import os, sys, time
for name in ("cutlass:a", "cutlass:b", "cutlass:c", "swin_plain:p"):
    if any(name.startswith(prefix) for prefix in os.environ["SWIN_GEMM_SKIP"].split(",") if prefix):
        continue
    print(f"swin_int8 gemm: {name} M=64 N=96 K=96 to s8", file=sys.stderr, flush=True)
    if name == "%s":
        %s
assert os.environ["SWIN_GEMM"] == "cutlass" and not os.path.exists(os.environ["SWIN_GEMM_CONFIG"])
"""


def tuner(candidate: str, does: str) -> list[str]:
    """A process in which `candidate` does something."""
    return [sys.executable, "-c", TUNER % (candidate, does)]


def run(command: Sequence[str], limit: float = 20, seconds: float = 60) -> Check:
    return run_check(Check("cutlass", "s8"), command, time.monotonic() + seconds, limit)


def test_where_all_is_well_nothing_is_left_out() -> None:
    check = run(tuner("", "pass"))
    assert check.finished and check.skipped == [] and "cutlass:c M=64" in check.log


@pytest.mark.parametrize(
    "does", ["os.abort()", "raise RuntimeError('while cutlass:b ran: an illegal memory access')", "time.sleep(60)"]
)
def test_what_breaks_or_hangs_is_left_out(does: str) -> None:
    check = run(tuner("cutlass:b", does), limit=1 if "sleep" in does else 20)
    assert check.finished and check.skipped == ["cutlass:b"]
    assert check.log.count("cutlass:b M=64") == 1 and check.log.count("cutlass:c M=64") == 1


def test_a_provider_that_goes_on_failing_is_left_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_preflight, "ATTEMPTS", 1)
    check = run([sys.executable, "-c", (TUNER % ("", "")).replace('if name == ""', "if 1").replace("        \n", "        os._exit(1)\n")])
    assert check.finished and check.skipped == ["cutlass:"]


def test_where_time_runs_out_nobody_is_blamed() -> None:
    check = run(tuner("cutlass:b", "time.sleep(60)"), seconds=2)
    assert not check.finished and check.skipped == []


def test_what_cannot_be_tried_is_said() -> None:
    with pytest.raises(HarnessError, match="the GEMMs of cutlass s8 could not be tried .*: no engine here. See gemm_preflight.log"):
        run([sys.executable, "-c", "import sys; sys.exit('no engine here')"])
    with pytest.raises(HarnessError, match="the plain GEMM kernel fails on this GPU"):
        run(tuner("swin_plain:p", "os.abort()"))


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_preflight, "built_providers", lambda: ["cutlass", "swin_tiles", "swin_plain"])


def test_a_run(tmp_path: Path, providers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(check: Check) -> list[str]:
        wrong = "cutlass:b" if check.output == "s32" else ""
        text = TUNER % (wrong, "os.abort()")
        return [sys.executable, "-c", text.replace('== "cutlass"', f'== "{check.provider}"')]

    monkeypatch.setattr(gemm_preflight, "command_of", command)
    assert gemm_preflight.main([str(tmp_path / "out"), "--seconds", "100", "--jobs", "2"]) == 1
    assert (tmp_path / "out" / "gemm_skip.txt").read_text() == "cutlass:b\n"
    assert "cutlass s32: status -6" in (tmp_path / "out" / "gemm_preflight.log").read_text()
    text = capsys.readouterr().out
    assert "cutlass s32: left out: cutlass:b" in text and "swin_tiles channels_gelu: nothing to be left out" in text


def test_mistakes(tmp_path: Path, providers: None) -> None:
    with pytest.raises(HarnessError, match="--seconds must be above zero"):
        gemm_preflight.main([str(tmp_path), "--seconds", "0"])
    with pytest.raises(HarnessError, match="--jobs"):
        gemm_preflight.main([str(tmp_path), "--seconds", "1", "--jobs", "0"])


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineError, match="built without the CUDA backend|finds no GPU"):
        gemm_preflight.main([str(tmp_path), "--seconds", "1"])


def test_the_outputs_are_the_engines(repository: Path) -> None:
    header = (repository / "csrc" / "include" / "swin" / "cuda_gemm.h").read_text()
    outputs = {output for of_provider in gemm_preflight.OUTPUTS.values() for output in of_provider}
    assert all(f'"{output}"' in header for output in outputs) and len(outputs) == 9
    trace = (repository / "csrc" / "cuda" / "gemm_lab.cc").read_text()
    assert '"swin_int8 gemm: ", trial.name, " M="' in trace

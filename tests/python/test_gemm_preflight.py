"""benchmarks/gemm_preflight.py with processes that stand in for a tuner on a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import gemm_preflight
from benchmarks.gemm_preflight import Check, Preflight
from pyharness.errors import EngineError, HarnessError
from pyharness.tune_gemm import config_of_name, gemm_shapes

TUNER = """
import os, sys, time
assert os.environ["SWIN_GEMM"] == "cutlass" and not os.path.exists(os.environ["SWIN_GEMM_CONFIG"])
for name in ("cutlass:sm90_a", "cutlass:sm90_b", "cutlass:sm90_c", "cutlass:sm80_d", "swin_plain:p"):
    if any(name.startswith(prefix) for prefix in os.environ["SWIN_GEMM_SKIP"].split(",") if prefix):
        continue
    print(f"swin_int8 gemm: {name} M=64 N=96 K=96 to s8", file=sys.stderr, flush=True)
    if name.startswith("%s"):
        %s
"""
NOBODY = "nobody"


def tuner(candidate: str = NOBODY, does: str = "os.abort()") -> list[str]:
    """A process in which the candidates that begin with `candidate` do something."""
    return [sys.executable, "-c", TUNER % (candidate, does)]


def run(folder: Path, command: Sequence[str], limit: float = 20, seconds: float = 60) -> tuple[Check, Preflight]:
    check = Check("cutlass", "s8")
    preflight = Preflight([check], folder, time.monotonic() + seconds, limit)
    preflight.run(check, command)
    return check, preflight


def test_where_all_is_well_nothing_is_left_out(tmp_path: Path) -> None:
    check, preflight = run(tmp_path, tuner())
    assert check.finished and check.state == "well" and preflight.skipped == []
    assert (tmp_path / "gemm_skip.txt").read_text() == ""
    assert "swin_plain:p M=64" in (tmp_path / "gemm_preflight.log").read_text()


@pytest.mark.parametrize("does", ["os.abort()", "raise RuntimeError('an illegal memory access')", "time.sleep(60)"])
def test_what_breaks_or_hangs_is_left_out(tmp_path: Path, does: str) -> None:
    check, preflight = run(tmp_path, tuner("cutlass:sm90_b", does), limit=2 if "sleep" in does else 20)
    assert check.finished and preflight.skipped == ["cutlass:sm90_b"] and check.state == "well without cutlass:sm90_b"
    assert check.log.count("sm90_b M=64") == 1 and check.log.count("sm90_c M=64") == 1
    found = json.loads((tmp_path / "gemm_preflight.json").read_text())
    first, second = found["checks"][0]["attempts"]
    assert found["skipped"] == ["cutlass:sm90_b"] == [first["blamed"]] and second["blamed"] is None
    assert ("silent for 2 s" if "sleep" in does else "status ") in first["how"] and second["how"] == "ended well"


def test_who_is_named_is_blamed_before_who_came_last(tmp_path: Path) -> None:
    named = "raise RuntimeError('gemm tuner: while cutlass:sm90_b ran: an illegal memory access')"
    _, preflight = run(tmp_path, tuner("swin_plain:p", f"if 'sm90_b' not in os.environ['SWIN_GEMM_SKIP']: {named}"))
    assert preflight.skipped == ["cutlass:sm90_b"]


def test_after_too_many_of_a_family_all_of_it_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_preflight, "ATTEMPTS", 1)
    check, preflight = run(tmp_path, tuner("cutlass:sm90_"))
    assert check.finished and preflight.skipped == ["cutlass:sm90_"]
    assert len(check.attempts) == 3, "two alone, then without the family"


def test_a_provider_that_goes_on_failing_is_left_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_preflight, "ATTEMPTS", 1)
    check, preflight = run(tmp_path, tuner("cutlass:"))
    assert check.finished and preflight.skipped == ["cutlass:"] and check.state == "the whole provider is left out"
    other = Check("cutlass", "s32")
    preflight.run(other, tuner())
    assert other.finished and not other.attempts, "for all outputs"


def test_what_one_check_found_another_need_not_find(tmp_path: Path) -> None:
    _, preflight = run(tmp_path, tuner("cutlass:sm90_b"))
    other = Check("cutlass", "s32")
    preflight.run(other, tuner("cutlass:sm90_b"))
    assert len(other.attempts) == 1 and other.state == "well"


def test_what_is_left_out_already_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIN_GEMM_SKIP", "cutlass:sm90_a,cutlass:sm90_b")
    check, preflight = run(tmp_path, tuner("cutlass:sm90_"))
    assert check.finished and preflight.skipped == ["cutlass:sm90_c"] and "sm90_b" not in check.log


def test_where_time_runs_out_nobody_is_blamed_in_haste(tmp_path: Path) -> None:
    check, preflight = run(tmp_path, tuner("cutlass:sm90_b", "time.sleep(60)"), seconds=3)
    assert not check.finished and preflight.skipped == [] and check.state == "time ran out"
    later = Check("cutlass", "s32")
    preflight.run(later, tuner())
    assert not later.finished and later.state == "not begun, no time was left"


def test_where_time_runs_out_the_family_of_what_hung_is_left_out(tmp_path: Path) -> None:
    check, preflight = run(tmp_path, tuner("cutlass:sm90_", "time.sleep(60)"), limit=3, seconds=5)
    assert not check.finished and preflight.skipped == ["cutlass:sm90_"]
    assert (tmp_path / "gemm_skip.txt").read_text() == "cutlass:sm90_\n"


def test_who_finds_no_memory_is_not_to_blame(tmp_path: Path) -> None:
    first = tmp_path / "first"
    once = f"if not os.path.exists({str(first)!r}): open({str(first)!r}, 'w'); sys.exit('cudaMalloc: out of memory')"
    check, preflight = run(tmp_path, tuner("cutlass:sm90_b", once))
    assert check.state == "well" and preflight.skipped == [] and len(check.attempts) == 2
    check, preflight = run(tmp_path, tuner("cutlass:sm90_b", "sys.exit('cudaMalloc: out of memory')"))
    assert check.failed and "could not be tried (out of memory)" in check.state and preflight.skipped == []


def test_what_cannot_be_tried_is_said(tmp_path: Path) -> None:
    check, _ = run(tmp_path, [sys.executable, "-c", "import sys; sys.exit('no engine here')"])
    assert check.failed and check.finished and len(check.attempts) == 1
    assert check.state == "could not be tried (status 1): no engine here. See gemm_preflight.log"
    check, _ = run(tmp_path, [sys.executable, "-c", "import os; os.abort()"])
    assert check.state == "could not be tried (status -6): it said nothing. See gemm_preflight.log"
    check, preflight = run(tmp_path, tuner("swin_plain:p"))
    assert check.failed and "the plain GEMM kernel fails on this GPU (status -6)" in check.state
    assert preflight.skipped == []


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_process_is_killed_with_those_it_started(tmp_path: Path) -> None:
    child, started = tmp_path / "child", "import subprocess, sys; p = subprocess.Popen(['sleep', '60'])"
    run(tmp_path, tuner("cutlass:sm90_b", f"{started}; open({str(child)!r}, 'w').write(str(p.pid)); p.wait()"), limit=3)
    deadline = time.monotonic() + 20
    while not ended(int(child.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_preflight, "built_providers", lambda: ["cutlass", "swin_tiles", "swin_plain"])


def test_a_run(
    tmp_path: Path, providers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(check: Check) -> list[str]:
        wrong = "cutlass:sm90_b" if check.output == "s32" else NOBODY
        text = TUNER % (wrong, "os.abort()")
        return [sys.executable, "-c", text.replace('== "cutlass"', f'== "{check.provider}"')]

    monkeypatch.setattr(gemm_preflight, "command_of", command)
    before = signal.getsignal(signal.SIGTERM)
    assert gemm_preflight.main([str(tmp_path / "out"), "--seconds", "100", "--jobs", "2"]) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / "out" / "gemm_skip.txt").read_text() == "cutlass:sm90_b\n"
    assert "cutlass s32: status -6" in (tmp_path / "out" / "gemm_preflight.log").read_text()
    assert len(json.loads((tmp_path / "out" / "gemm_preflight.json").read_text())["checks"]) == 9 + 6
    text = capsys.readouterr().out
    assert "cutlass s32: well without cutlass:sm90_b\n" in text and "swin_tiles channels_gelu: well\n" in text
    assert text.endswith("left out: cutlass:sm90_b\n")


def test_how_it_ends(tmp_path: Path, providers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(tmp_path), "--seconds", "100", "--jobs", "2"]
    monkeypatch.setattr(gemm_preflight, "OUTPUTS", {"cutlass": ("s8",)})
    for command, status in (([sys.executable, "-c", ""], 0), ([sys.executable, "-c", "raise SystemExit(1)"], 1)):
        monkeypatch.setattr(gemm_preflight, "command_of", lambda check, command=command: command)
        assert gemm_preflight.main(words) == status
    monkeypatch.setattr(gemm_preflight, "command_of", lambda check: ["sleep", "60"])
    assert gemm_preflight.main([str(tmp_path), "--seconds", "0.5"]) == gemm_preflight.OUT_OF_TIME


def test_stopped_from_outside_it_keeps_what_it_knows(tmp_path: Path, repository: Path) -> None:
    pid = tmp_path / "pid"
    sleeper = tuner("cutlass:sm90_b", f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    program = (
        "import sys; from benchmarks import gemm_preflight as g; g.built_providers = lambda: ['cutlass']; "
        f"g.OUTPUTS = {{'cutlass': ('s8',)}}; g.command_of = lambda check: {sleeper!r}; "
        f"sys.exit(g.main([{str(tmp_path)!r}, '--seconds', '60', '--limit', '50']))"
    )
    paths = os.pathsep.join([str(repository), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, cwd=repository)
    deadline = time.monotonic() + 60
    while not pid.exists() or not pid.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == gemm_preflight.OUT_OF_TIME and ended(int(pid.read_text()))
    assert "cutlass:sm90_b M=64" in (tmp_path / "gemm_preflight.log").read_text()


@pytest.mark.parametrize("option", ["--seconds", "--limit", "--jobs"])
def test_mistakes(tmp_path: Path, providers: None, option: str) -> None:
    with pytest.raises(HarnessError, match=option):
        gemm_preflight.main([str(tmp_path), "--seconds", "1", option, "0"])


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineError, match="built without the CUDA backend|finds no GPU"):
        gemm_preflight.main([str(tmp_path), "--seconds", "1"])


def test_the_process_itself_says_so_too(tmp_path: Path) -> None:
    """As far as it goes without a GPU; with one it would tune."""
    check = Check("swin_tiles", "channels_add_f16")
    preflight = Preflight([check], tmp_path, time.monotonic() + 100, 90)
    preflight.run(check, ["env", "CUDA_VISIBLE_DEVICES=", *gemm_preflight.command_of(check)])
    assert check.failed and "EngineError" in check.state, check.log


def test_shapes_and_outputs_are_the_engines(repository: Path) -> None:
    header = (repository / "csrc" / "include" / "swin" / "cuda_gemm.h").read_text()
    outputs = {output for of_provider in gemm_preflight.OUTPUTS.values() for output in of_provider}
    assert all(f'"{output}"' in header for output in outputs) and len(outputs) == 9
    shapes = {(s.m, s.n, s.k) for s in gemm_shapes(config_of_name("swin_tiny_patch4_window7_224"), 8)}
    assert {gemm_preflight.FC1, gemm_preflight.FC2} <= shapes
    lab = (repository / "csrc" / "cuda" / "gemm_lab.cc").read_text()
    assert '"swin_int8 gemm: ", trial.name, " M="' in lab and '"while ", trial.name, " ran: "' in lab
    sm90 = (repository / "csrc" / "cuda" / "gemm_cutlass_sm90.cu").read_text()
    assert '"sm90_' in sm90 and gemm_preflight.family_of("cutlass:sm90_coop_128x256x128_c2x1") == "cutlass:sm90_"
    assert gemm_preflight.family_of("cublaslt:algo21_tile20") == "cublaslt:"

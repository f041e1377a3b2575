"""benchmarks/gpu_tests.py on small files of tests, without a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_tests
from pyharness.errors import HarnessError

HEAD = "import os, time, pytest\nCUDA_PARAMS = [pytest.param(t, marks=pytest.mark.gpu) for t in ('cuda_fp16', 'cuda_bf16')]\n"
EACH = "@pytest.mark.parametrize('place', CUDA_PARAMS)\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, body in files.items():
        (folder / "tests" / f"{name}.py").write_text(HEAD + body)


def run(folder: Path, *words: str, seconds: float = 100) -> tuple[int, str]:
    """Status and tests.log."""
    argv = [str(folder / "logs"), "--seconds", str(seconds), "--tests", str(folder / "tests"), *words]
    return gpu_tests.main(argv), (folder / "logs" / "tests.log").read_text()


PASSING = EACH + "def test_it(place): pass\n@pytest.mark.gpu\ndef test_other(): pytest.skip('no such thing')\ndef test_cpu(): assert 0\n"


def test_all_pass(folder: Path) -> None:
    write(folder, test_a=PASSING, test_b=EACH + "def test_it(place): assert os.environ['SWIN_GEMM_CONFIG']\n")
    (folder / "tests" / "test_c.py").write_text("def test_of_the_cpu(): assert 0\n")
    status, log = run(folder, "--jobs", "2")
    assert status == 0 and log.startswith("4 passed, 1 skipped in ") and log.count("\n") == 1, log


def test_a_failure_is_told_and_costs_the_others_nothing(folder: Path) -> None:
    broken = EACH + "def test_it(place):\n    if place == 'cuda_bf16': os.abort()\n    assert 2 * 2 == 5\n"
    write(folder, test_a=broken, test_b=PASSING)
    status, log = run(folder)
    assert status == 1 and "1 failed, 2 passed, 1 skipped in" in log, log
    assert "test_a rest, status 1" in log and "assert (2 * 2) == 5" in log
    assert "test_a bf16, status -6" in log


def test_a_file_that_cannot_be_read_is_a_failure(folder: Path) -> None:
    write(folder, test_a="import no_such_module\n" + EACH + "def test_it(place): pass\n", test_b=PASSING)
    status, log = run(folder)
    assert status == 1 and "No module named 'no_such_module'" in log and "2 passed" in log, log


@pytest.fixture
def until(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A line of a test behind which the time that gpu_tests has is over, however long the machine took to come to it."""
    now, begun = time.monotonic, folder / "begun"
    begun.mkdir()
    monkeypatch.setattr(gpu_tests.time, "monotonic", lambda: now() + (1000 if len(list(begun.iterdir())) == 2 else 0))
    return f"open({str(begun)!r} + '/' + place, 'w').close()"


def test_where_time_runs_out_failures_are_still_told(folder: Path, until: str) -> None:
    slow = EACH + "def test_first(place): assert place == 'cuda_bf16', 'early'\n" + EACH
    write(folder, test_a=f"{slow}def test_then(place):\n    {until}\n    time.sleep(600)\n", test_engine_gpu=PASSING)
    status, log = run(folder, "--jobs", "2", seconds=500)
    assert status == 1 and "AssertionError: early" in log and "1 failed" in log, log
    assert "not finished, time ran out: test_a rest, at test_a.py::test_then[cuda_fp16]\n" in log
    assert "not begun, no time was left: test_engine_gpu rest" in log


def test_files_that_run_alone_have_time_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "SHARE_OF_TOGETHER", 0.01)
    write(folder, test_a=EACH + "def test_it(place): time.sleep(600)\n", test_engine_gpu=PASSING)
    _, log = run(folder, "--jobs", "2", seconds=100)
    assert "not finished, time ran out: test_a rest" in log and "not begun" not in log, log
    assert "test_engine_gpu.py::test_it[cuda_fp16] PASSED" in (folder / "logs" / "test_engine_gpu-rest.log").read_text()


def test_an_ignored_interrupt_is_not_inherited(folder: Path) -> None:
    write(folder, test_a=EACH + "def test_it(place):\n    import signal\n    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(folder)[0] == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_out_of_time_is_no_failure(folder: Path, until: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "GRACE_S", 1)
    stubborn = "\n    while True:\n        try: time.sleep(600)\n        except KeyboardInterrupt: pass\n"
    first = EACH + "def test_first(place): pass\n" + EACH
    write(folder, test_a=f"{first}def test_it(place):\n    {until}{stubborn}")
    status, log = run(folder, "--jobs", "2", seconds=500)
    assert status == gpu_tests.OUT_OF_TIME and log.count("not finished, time ran out") == 2, log
    assert "test_a rest, at test_a.py::test_it[cuda_fp16]" in log and "2 passed in" in log, "killed, and known all the same"


@pytest.mark.parametrize(
    ("log", "counts"),
    [
        ("=== 2 failed, 61 passed, 3 skipped in 40.1s (0:00:40) ===\n", {"failed": 2, "passed": 61, "skipped": 3}),
        ("1 failed, 2 passed in 3.0s\n!!! KeyboardInterrupt !!!\n", {"failed": 1, "passed": 2}),
        ("no tests ran in 0.1s\n5 deselected in 0.1s\n", {}),
        ("=== 1 error in 0.61s ===\n", {"error": 1}),
        ("t/a.py::test_x[3 passed] PASSED [ 50%]\nt/a.py::test_y FAILED [100%]\nE 4 passed, it says", {"passed": 1, "failed": 1}),
        ("t/a.py::test_x PASSED [ 50%]\nt/a.py::test_y Timeout (0:00:45)!\nThread 0x7f\n", {"passed": 1}),
        ("", {}),
    ],
)
def test_counts_of_a_log(log: str, counts: dict[str, int]) -> None:
    assert gpu_tests.counts_of(log) == counts


def test_the_last_test_of_a_log() -> None:
    log = "../t/a.py::test_x[3 of 4] PASSED [ 50%]\n../t/a.py::test_y[cuda] "
    assert gpu_tests.last_test(log) == gpu_tests.last_test(f"{log}Timeout (0:00:45)!\n") == "a.py::test_y[cuda]"
    assert gpu_tests.last_test("collecting ...") == ""


def test_stopped_from_outside_nothing_goes_on(folder: Path, repository: Path) -> None:
    write(folder, test_a=EACH + f"def test_it(place):\n    open({str(folder / 'pid')!r}, 'w').write(str(os.getpid()))\n    time.sleep(60)\n")
    argv = [str(folder / "logs"), "--seconds", "60", "--tests", str(folder / "tests"), "--jobs", "1"]
    program = subprocess.Popen([sys.executable, str(repository / "benchmarks" / "gpu_tests.py"), *argv])
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    program.terminate()
    assert program.wait(30) == 143
    pid = int((folder / "pid").read_text())
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_order_and_mistakes(folder: Path, repository: Path) -> None:
    names = [path.stem for path in gpu_tests.gpu_files(repository / "tests" / "python")]
    assert names[:2] == ["test_ops", "test_fused_ops"] and names[-1] == "test_engine_gpu"
    assert set(gpu_tests.ORDER) | set(gpu_tests.ALONE) <= set(names), "a file that went is still named"
    with pytest.raises(HarnessError, match="no test that is marked gpu"):
        run(folder)
    with pytest.raises(HarnessError, match="--seconds must be finite and above zero"):
        run(folder, seconds=0)

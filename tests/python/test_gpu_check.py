"""scripts/gpu_check.sh and its helpers as far as they run without a GPU: options, order and limits of the parts, what it
says without a GPU, the summary page from canned results, and the measuring programs' GPU code with a clock of our own."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report, peers_gpu, sanitize_gpu
from pyharness import gpu, measure, reproduce_table2, results
from pyharness.config import MICRO_DIGITS
from pyharness.engine import OpInfo
from pyharness.errors import HarnessError
from pyharness.reproduce_table2 import Predictor, Settings
from pyharness.results import Table1Row, Table2Row

TINY = "swin_tiny_patch4_window7_224"
MICRO = MICRO_DIGITS.name
PARTS = ["build", "preflight", "tests", "tune", "table2", "table1", "sanitizer", "batches", "peers"]


# --- the script ------------------------------------------------------------------------------------------------------

FAKE_PYTHON = """#!/bin/bash
# Notes what it is asked to run; only gpu_report.py really runs. FAIL names a program that fails, SLOW one that hangs.
case "$*" in
  *"gpu_report.py environment"*) mkdir -p "${@: -1}"; echo '{"gpu": {"device": "Fake GPU"}}' >"${@: -1}/environment.json"; exit 0 ;;
  *gpu_report.py*) exec "$REAL_PYTHON" "$@" ;;
  -c*) exit 0 ;;
esac
echo "$@${SWIN_GEMM_SKIP:+ without $SWIN_GEMM_SKIP}" >>"$CALLS"
case "$*" in *gemm_preflight.py*) [ -z "${BREAKS:-}" ] || { printf '%s\n' $BREAKS >"$2/gemm_skip.txt"; exit 1; } ;; esac
[ -z "${FAIL:-}" ] || case "$*" in *"$FAIL"*) echo "it broke"; exit 1 ;; esac
[ -z "${SLOW:-}" ] || case "$*" in *"$SLOW"*) exec sleep 60 ;; esac
exit 0
"""


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """A folder with the script, and a Python and a compute-sanitizer that only note what they are asked to run."""
    root = tmp_path / "checkout"
    shutil.copytree(repository / "scripts", root / "scripts")
    for folder in ("benchmarks", "pyharness"):
        shutil.copytree(repository / folder, root / folder, ignore=shutil.ignore_patterns("_lib", "__pycache__"))
    (root / "pyproject.toml").touch()
    (root / "scripts" / "build_ft.sh").write_text('echo "build $*" >>"$CALLS"; [ "${FAIL:-}" != build ]\n')
    (root / "bin").mkdir()
    for name, text in (("python", FAKE_PYTHON), ("compute-sanitizer", SANITIZER)):
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)
    return root


SANITIZER = """#!/bin/bash
while [ $# -gt 0 ]; do
  case "$1" in --tool) tool="$2" ;; --log-file) file="$2" ;; esac
  shift
done
echo "sanitizer $tool" >>"$CALLS"
if [ "$tool" = "${FOUND:-}" ]; then
  echo "========= ERROR SUMMARY: 2 errors" >"$file"
  exit 99
fi
echo "========= ERROR SUMMARY: 0 errors" >"$file"
"""


def check(root: Path, *words: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script's run and what it called."""
    calls = root / "calls"
    calls.write_text("")
    unwanted = ("VIRTUAL_ENV", "SWIN_GEMM_CONFIG", "SWIN_GEMM_SKIP", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in unwanted}
    environment |= {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "REAL_PYTHON": sys.executable}
    environment |= {"PYTHON": str(root / "bin" / "python")}
    done = subprocess.run(
        ["bash", str(root / "scripts" / "gpu_check.sh"), *words],
        capture_output=True, text=True, env={**environment, **variables},
    )  # fmt: skip
    return done, calls.read_text().splitlines()


def cores() -> int:
    return int(subprocess.run(["nproc"], capture_output=True, text=True).stdout)


def statuses(root: Path) -> dict[str, str]:
    return {part.name: part.status for part in gpu_report.read_parts(root / "results" / "local" / "gpu")}


def test_all_parts_in_order(checkout: Path) -> None:
    done, calls = check(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(checkout) == dict.fromkeys(PARTS, "passed")
    first = [
        next(i for i, call in enumerate(calls) if word in call)
        for word in ("build --offline", "gemm_preflight.py", "gpu_tests.py", "tune_gemm.py", "reproduce_table2.py", "latency_breakdown.py",
                     "sanitizer memcheck", "--batch 1 ", "peers_gpu.py")
        if word != "--batch 1 "
    ]  # fmt: skip
    assert first == sorted(first)
    table2 = [call for call in calls if "reproduce_table2.py" in call]
    assert [call.split("--batch ")[1].split()[0] for call in table2] == ["128", "1", "8", "32"]
    assert all("--device cuda" in call and "--runs 1000" in call for call in table2)
    assert [c.split("--batch ")[1].split(" --")[0] for c in calls if "tune_gemm.py" in c] == ["128", "1 8 32"]
    assert [call.split()[1] for call in calls if call.startswith("sanitizer")] == [
        "memcheck", "synccheck", "racecheck", "initcheck",
    ]  # fmt: skip
    page = (checkout / "results/local/gpu/summary.md").read_text()
    assert page.startswith("# GPU check: Fake GPU") and "| peers " in page


def test_only_some_parts(checkout: Path) -> None:
    done, calls = check(checkout, "--only", "tests,table1", "--runs", "7", "--models", TINY, "--out", "results/local/gpu")
    assert done.returncode == 0 and list(statuses(checkout)) == ["tests", "table1"]
    assert len(calls) == 2 and f"--model {TINY} --batch 128 --runs 7" in calls[1]


def test_one_part_alone_gets_all_the_time(checkout: Path) -> None:
    def seconds(*words: str) -> int:
        call = next(call for call in check(checkout, *words)[1] if "--batch 128" in call)
        return int(call.split("--seconds ")[1].split()[0])

    assert seconds("--only", "table2") > 1.5 * seconds("--only", "table2,table1")


def test_a_second_run_keeps_what_other_parts_left(checkout: Path) -> None:
    check(checkout, "--only", "table1")
    check(checkout, "--only", "tests")
    assert statuses(checkout) == {"table1": "passed", "tests": "passed"}


def test_a_failing_part_costs_the_others_nothing(checkout: Path) -> None:
    done, _ = check(checkout, FAIL="reproduce_table2")
    assert done.returncode == 1 and "it broke" in done.stderr
    assert statuses(checkout) == {**dict.fromkeys(PARTS, "passed"), "table2": "FAILED", "batches": "FAILED"}


def test_without_an_engine_nothing_else_runs(checkout: Path) -> None:
    done, calls = check(checkout, FAIL="build")
    assert done.returncode == 1 and calls == [f"build --offline --jobs {cores()}"] and statuses(checkout) == {"build": "FAILED"}


def test_what_breaks_the_gpu_is_left_out_of_the_rest(checkout: Path) -> None:
    done, calls = check(checkout, "--only", "preflight,tests,table1", BREAKS="cutlass:sm90_a cublaslt:")
    skipped = "cutlass:sm90_a,cublaslt:"
    assert done.returncode == 1 and statuses(checkout) == {"preflight": "FAILED", "tests": "passed", "table1": "passed"}
    assert f"left out from here on: {skipped}" in (checkout / "results/local/gpu/summary.md").read_text()
    assert [call.endswith(f" without {skipped}") for call in calls] == [False, True, True]
    done, calls = check(checkout, "--only", "table1")  # later, into the same folder
    assert f"GEMM candidates left out: {skipped}" in done.stdout and calls[0].endswith(f" without {skipped}")
    _, calls = check(checkout, "--only", "preflight,table1")  # looked at anew, and all is well
    assert not any("without" in call for call in calls)


def test_what_the_preflight_finds_is_added_to_what_was_named(checkout: Path) -> None:
    done, calls = check(checkout, "--only", "preflight,table1", BREAKS="cutlass:sm90_a", SWIN_GEMM_SKIP="cublaslt:")
    assert "GEMM candidates left out: cublaslt:\n" in done.stdout
    assert [call.split(" without ")[1] for call in calls] == ["cublaslt:", "cublaslt:,cutlass:sm90_a"]


def test_table_2_gets_its_time_within_nine_minutes(repository: Path) -> None:
    script = (repository / "scripts" / "gpu_check.sh").read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", script)}
    assert list(limits) == PARTS
    assert sum(limits[name] for name in ("preflight", "tests", "tune", "table2")) <= 9 * 60 - 20, "20 s to look at the machine"
    assert limits["batches"] >= 12 * 3 * len(results.PUBLISHED), "starting all models"


def test_logs_of_the_build_come_along(checkout: Path) -> None:
    (checkout / "build" / "logs").mkdir(parents=True)
    (checkout / "build" / "logs" / "compile.log").write_text("error: in its first line")
    check(checkout, "--only", "build")
    assert "in its first line" in (checkout / "results/local/gpu/logs/compile.log").read_text()


def test_a_finding_of_the_sanitizer_fails_its_part(checkout: Path) -> None:
    done, calls = check(checkout, "--only", "sanitizer", FOUND="synccheck")
    assert done.returncode == 1 and statuses(checkout) == {"sanitizer": "FAILED"}
    assert sum(call.startswith("sanitizer") for call in calls) == 4, "one tool's finding must not stop the others"
    page = (checkout / "results/local/gpu/summary.md").read_text()
    assert "synccheck: 2 errors" in page and "sanitizer/synccheck.txt" in page


def test_a_part_that_hangs_is_stopped(checkout: Path) -> None:
    script = checkout / "scripts" / "gpu_check.sh"
    script.write_text(script.read_text().replace("[table1]=90", "[table1]=9"))
    done, calls = check(checkout, "--only", "table1,peers", SLOW="latency_breakdown")
    assert done.returncode == 1 and statuses(checkout) == {"table1": "stopped", "peers": "passed"}
    assert "after 9 s" in done.stdout


def test_no_time_left_is_said(checkout: Path) -> None:
    script = checkout / "scripts" / "gpu_check.sh"
    script.write_text(script.read_text().replace("LEAST=8", "LEAST=90"))
    done, calls = check(checkout, "--minutes", "1", "--only", "tests,peers")
    assert done.returncode == 1 and calls == []
    assert "no time left; run it with --only tests" in done.stdout and set(statuses(checkout).values()) == {"skipped"}


def test_everything_goes_into_one_archive(checkout: Path) -> None:
    archive = checkout / "not" / "there" / "all.tar.gz"
    assert check(checkout, "--only", "tests", "--pack", str(archive))[0].returncode == 0
    with tarfile.open(archive) as files:
        assert {"gpu/summary.md", "gpu/parts.tsv", "gpu/logs/tests.log"} <= set(files.getnames())


def test_an_archive_that_cannot_be_written_costs_nothing_else(checkout: Path) -> None:
    (checkout / "bin" / "tar").write_text("#!/bin/bash\nexit 1\n")
    (checkout / "bin" / "tar").chmod(0o755)
    done, _ = check(checkout, "--only", "tests,table1", "--pack", "all.tar.gz")
    assert done.returncode == 0 and statuses(checkout) == {"tests": "passed", "table1": "passed"}
    assert "all.tar.gz could not be written" in done.stdout


def test_stopped_from_outside_it_packs_what_there_is(checkout: Path) -> None:
    archive = checkout / "all.tar.gz"
    words = ["timeout", "3", "bash", str(checkout / "scripts" / "gpu_check.sh"), "--pack", str(archive), "--only", "tests,peers"]
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "SWIN_GEMM_CONFIG", "PYTHONPATH")}
    environment |= {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "CALLS": str(checkout / "calls"), "SLOW": "peers_gpu"}
    environment |= {"PYTHON": str(checkout / "bin" / "python"), "REAL_PYTHON": sys.executable}
    subprocess.run(words, env=environment, capture_output=True)
    with tarfile.open(archive) as files:
        assert "gpu/logs/peers.log" in files.getnames(), "packed after the part before it, and no more"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--only", "tables"], "--only knows no part 'tables'; there are: build preflight tests"),
        (["--minutes", "0"], "--minutes needs a positive number, found '0'"),
        (["--runs", "many"], "--runs needs a positive number, found 'many'"),
        (["--out"], "--out needs a value"),
    ],
)
def test_wrong_options(checkout: Path, words: list[str], expected: str) -> None:
    done, calls = check(checkout, *words)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1 and not calls


def test_without_a_gpu_it_says_so(repository: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        ["bash", str(repository / "scripts" / "gpu_check.sh"), "--out", str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: no GPU here: PyTorch" in done.stderr and "scripts/reproduce.sh" in done.stderr
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["gpu"] is None and torch.__version__.startswith(found["versions"]["torch"])


def test_an_old_timm_is_said(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    assert f'"timm>={gpu_report.TIMM}"' in (repository / "pyproject.toml").read_text()
    assert not any("timm" in name for name in gpu_report.environment()["missing"])
    monkeypatch.setattr(gpu_report.importlib.metadata, "version", lambda name: "1.0.9")
    assert "this one is 1.0.9" in gpu_report.environment()["missing"]["timm >= 1.0.31"]


# --- the summary -----------------------------------------------------------------------------------------------------

META = dict.fromkeys(results.META_FIELDS) | {
    "device": "Fake GPU", "date": "2026-01-01", "torch": "2", "engine": {"backend": "cuda", "isa": "sm_90"}, "threads": 1,
}  # fmt: skip


def table2_row(model: str, method: str, ratio: float, batch: int = 128) -> Table2Row:
    stats = {"median": 10 * ratio, "p10": 9.0, "p90": 11.0, "mean": 10.0, "runs": 1000}
    return Table2Row(model, 224, batch, "Fake GPU", method, latency_ms=stats, vs_ft_int8=ratio)


def write_results(folder: Path, ratio: float, compiled: float) -> None:
    """A folder as the script leaves it: `ratio` is GELU-less over FT INT8, `compiled` torch.compile's over it."""
    rows = [table2_row(m, method, r) for m in results.PUBLISHED for method, r in (("ft_int8", 1.0), ("geluless_int8", ratio))]
    results.write_table(folder, "table2", META, rows)
    peers = [table2_row(m, "torch.compile fp16 max-autotune", compiled) for m in results.PUBLISHED]
    results.write_table(folder / "peers", "table2", {**META, "left_out": {"TensorRT fp16": "not installed: x"}}, peers)
    op = Table1Row(TINY, 128, "ft_int8", "softmax", "fused", 12, 0.5, (0.4, 0.6), 0.1, 0.6, 0.1, 10, 10, 10, "copy", 0.8)
    results.write_table(folder, "table1", META, [op])
    (folder / "sanitizer").mkdir()
    for tool, text in (
        ("memcheck", "ERROR SUMMARY: 0 errors"), ("synccheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"), ("initcheck", "ERROR SUMMARY: 0 errors"),
    ):  # fmt: skip
        (folder / "sanitizer" / f"{tool}.txt").write_text(f"========= {text}\n")
    (folder / "logs" / "tests").mkdir(parents=True)
    (folder / "logs" / "tests" / "tests.log").write_text("...\n61 passed, 3 skipped in 40.10s\n")
    (folder / "parts.tsv").write_text("tests\tFAILED\t10\t\ntests\tpassed\t41\t\n")
    counts = {"cublaslt": 4, "cutlass": 9}
    tuned = {"output": "s8_relu", "offered": counts, "proven": {**counts, "cublaslt": 0}, "chosen": "cutlass"}
    (folder / "tune_128.json").write_text(json.dumps({"shapes": [tuned, tuned]}))
    environment = {"gpu": {"device": "Fake GPU", "driver": "1"}, "missing": {"torchao": "the torchao peer"}}
    (folder / "environment.json").write_text(json.dumps(environment))


def test_summary_of_a_whole_run(tmp_path: Path) -> None:
    write_results(tmp_path, ratio=0.87, compiled=1.3)
    assert [claim.holds for claim in gpu_report.claims(tmp_path)] == [True] * 4
    page = gpu_report.summary(tmp_path)
    assert page.count("| yes ") == 4 and "tiny -13.0 %, small -13.0 %" in page and "61 passed" in page
    assert "takes 1.30 times" in page and "not installed: x" in page and "- torchao: the torchao peer" in page
    assert [w.strip() for w in next(line for line in page.splitlines() if "| cublaslt" in line).split("|")[1:-1]] == [
        "s8_relu", "2", "cublaslt", "8", "0", "0",
    ]  # fmt: skip
    assert "| softmax " in page and len(page.splitlines()) < 80, "one page"


def test_summary_says_what_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWIN_GEMM_SKIP", raising=False)
    write_results(tmp_path, ratio=0.87, compiled=1.3)
    (tmp_path / "gemm_skip.txt").write_text("")
    assert gpu_report.left_out_gemms(tmp_path) == {} and "left out" not in gpu_report.summary(tmp_path)
    (tmp_path / "gemm_skip.txt").write_text("cutlass:sm90_\nswin_tiles:mma_64x64\n")
    attempts = [{"how": "silent for 20 s", "blamed": "cutlass:sm90_a"}, {"how": "ended well", "blamed": None}]
    checks = [{"provider": "cutlass", "output": "s8", "attempts": attempts}]
    (tmp_path / "gemm_preflight.json").write_text(json.dumps({"checks": checks}))
    monkeypatch.setenv("SWIN_GEMM_SKIP", "cublaslt:,cutlass:sm90_,swin_tiles:mma_64x64")
    page = gpu_report.summary(tmp_path)
    assert "- `cutlass:sm90_`: cutlass:sm90_a: silent for 20 s (cutlass s8)\n" in page
    assert "- `cublaslt:`: named in SWIN_GEMM_SKIP\n" in page
    (tmp_path / "gemm_preflight.json").unlink()
    monkeypatch.delenv("SWIN_GEMM_SKIP")
    assert "- `swin_tiles:mma_64x64`: see gemm_preflight.log\n" in gpu_report.summary(tmp_path)


def test_summary_says_no_where_a_claim_fails(tmp_path: Path) -> None:
    write_results(tmp_path, ratio=0.93, compiled=0.8)
    (tmp_path / "sanitizer" / "memcheck.txt").write_text("ERROR SUMMARY: 3 errors\n")
    (tmp_path / "parts.tsv").write_text("tests\tFAILED\t41\t\n")
    assert [claim.holds for claim in gpu_report.claims(tmp_path)] == [False] * 4


def test_what_was_not_measured_stays_open(tmp_path: Path) -> None:
    assert [claim.holds for claim in gpu_report.claims(tmp_path)] == [None] * 4
    assert "not measured" in gpu_report.summary(tmp_path)
    results.write_table(tmp_path, "table2", META, [table2_row(TINY, "geluless_int8", 0.8)])
    assert gpu_report.claims(tmp_path)[1].holds is None, "one size of four proves nothing yet"
    results.write_table(tmp_path, "table2", META, [table2_row(TINY, "geluless_int8", 0.8, batch=32)])
    assert gpu_report.claims(tmp_path)[1].found == "not measured", "the claim is about batch 128"


@pytest.mark.parametrize(
    ("line", "clean"),
    [("0 errors", True), ("1 error", False), ("0 hazards displayed (0 errors, 0 warnings)", True),
     ("2 hazards displayed (0 errors, 2 warnings)", False), ("no summary", False)],
)  # fmt: skip
def test_what_counts_as_clean(line: str, clean: bool) -> None:
    assert gpu_report.is_clean(line) is clean


# --- the programs ----------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for main in (reproduce_table2.main, peers_gpu.main):
        with pytest.raises(HarnessError, match="--device cuda: PyTorch .* sees no GPU"):
            main(["--device", "cuda"])
    assert gpu.use_device("cpu") == torch.device("cpu")


def test_gpu_methods_are_timed_in_two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 methods together for all rounds; those in floating point with FT INT8 for fewer."""
    groups = []

    def time_together(methods, images, runs, settings):
        groups.append((list(methods), runs))
        return {name: [float(len(groups))] * runs for name in methods}

    monkeypatch.setattr(reproduce_table2, "time_together", time_together)
    methods = dict.fromkeys(["fp32", "fp16", "ft_int8", "geluless_int8"], Predictor(torch.nn.Identity()))
    pipeline = reproduce_table2.Pipeline(reproduce_table2.Inputs(MICRO))
    found = reproduce_table2.time_methods(pipeline, methods, Settings(2, device=torch.device("cuda")))
    assert groups == [(["ft_int8", "geluless_int8"], 1000), (["ft_int8", "fp32", "fp16"], 100)]
    assert found["ft_int8"] is found["geluless_int8"] and found["fp32"] is found["fp16"] is not found["ft_int8"]
    assert set(found["fp32"]) == {"ft_int8", "fp32", "fp16"}, "its ratio is to FT INT8 of the same rounds"
    groups.clear()
    reproduce_table2.time_methods(pipeline, methods, Settings(2, runs=5))
    assert groups == [(list(methods), 5)]


def test_predictors_bring_images_to_their_model() -> None:
    double = Predictor(torch.nn.Identity(), dtype=torch.float64)
    assert double(torch.ones(1)).dtype == torch.float64


def test_a_timer_takes_the_clocks_place() -> None:
    times, calls = iter(range(1, 100)), []
    timing = {"timer": lambda call: (call(), float(next(times)))[1], "settle_ms": None}
    samples = measure.time_alternating({"a": lambda: calls.append("a")}, 3, warmup=2, **timing)
    assert samples == {"a": [3.0, 4.0, 5.0]} and len(calls) == 5


def test_no_round_begins_after_the_limit() -> None:
    now = [0]

    def call() -> None:
        now[0] += int(1e9)

    samples = measure.time_alternating({"a": call}, 1000, warmup=0, settle_ms=None, clock=lambda: now[0], limit_s=20)
    assert len(samples["a"]) == 21
    samples = measure.time_alternating({"a": call}, 1000, warmup=0, settle_ms=None, clock=lambda: now[0], limit_s=1)
    assert len(samples["a"]) == measure.LEAST_ROUNDS


def test_providers_of_the_engines_own_shapes() -> None:
    ops = [OpInfo("fc1_gemm", "gemm", 0, 0, "M=6 N=8 K=4", 0, 0, 0), OpInfo("softmax", "fused", 0, 0, "M=1 N=2 K=3", 0, 0, 0)]
    choice = {"m": 6, "n": 8, "k": 4, "output": "s8", "provider": "cublaslt", "candidate": "algo7", "us": None}
    choices = [choice, {**choice, "m": 1, "n": 2, "k": 3}, {**choice, "output": "s8_relu", "candidate": ""}]
    assert gpu.providers_of(ops, choices) == {"6x8x4 s8": "cublaslt algo7", "6x8x4 s8_relu": "cublaslt"}
    mlp = {**choice, "provider": "swin_tiles", "candidate": "mma_64x64"}
    choices += [{**mlp, "output": "channels_relu"}, {**mlp, "n": 4, "k": 8, "output": "channels_add_f16"}]
    fused = [OpInfo("mlp_norm", "gemm", 0, 0, "M=6 N=8 K=4, N=4 K=8", 0, 0, 0)]
    assert gpu.providers_of(ops, choices).keys() == {"6x8x4 s8", "6x8x4 s8_relu"}
    assert gpu.providers_of(fused, choices) == {
        "6x8x4 channels_relu": "swin_tiles mma_64x64", "6x4x8 channels_add_f16": "swin_tiles mma_64x64",
    }  # fmt: skip
    assert gpu.cuda_info().keys() <= {"built", "devices", "providers", "choices"}
    assert gpu.gemm_providers(ops, {"backend": "cpu", "isa": "avx2"}) == {"s8": "cpu avx2"}


def test_peers_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model, images):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setitem(peers_gpu.PEERS, "fp16", dataclasses.replace(peers_gpu.PEERS["fp16"], build=broken))
    monkeypatch.setitem(peers_gpu.PEERS, "torchao", dataclasses.replace(peers_gpu.PEERS["torchao"], needs=("no_such",)))
    argv = ["--device", "cpu", "--models", MICRO, "--peers", "fp32", "fp16", "torchao", "--batch", "2", "--runs", "2"]
    assert peers_gpu.main([*argv, "--out", str(tmp_path)]) == 0
    document = results.load_table(tmp_path, "table2")
    (row,) = document["rows"]
    assert row["method"] == "timm fp32 eager" and row["latency_ms"]["runs"] == 2 and row["vs_ft_int8"] > 0
    assert document["meta"]["left_out"] == {
        "torchao int8 dynamic, compiled": "not installed: no_such",
        f"{MICRO}: timm fp16 eager": "failed: RuntimeError: no kernel image",
    }
    assert document["meta"]["sqnr_db"][f"{MICRO}: timm fp32 eager"] > 100
    assert "no kernel image" in capsys.readouterr().out


def test_the_sanitizers_workload(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sanitize_gpu.py", "cpu"])
    assert sanitize_gpu.main() == 0 and "8 models" in capsys.readouterr().out


BLOCK_IMPORTS = """
import sys
sys.modules["modelopt"] = sys.modules["sklearn"] = None  # to import them is an ImportError
import benchmarks.peers_gpu
from pyharness import latency_breakdown, reproduce_table2
reproduce_table2.main(["--models", "swin_tiny_patch4_window7_224", "--runs", "1", "--out", sys.argv[1]])
"""


def test_latency_needs_neither_modelopt_nor_sklearn(repository: Path, tmp_path: Path) -> None:
    """As on a machine that has a GPU but not everything else."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCK_IMPORTS, str(tmp_path)], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(results.load_table(tmp_path, "table2")["rows"]) == 5  # fp32, both FT graphs, the fused one with each activation

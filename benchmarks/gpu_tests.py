"""The GPU tests within a limit of time, for scripts/gpu_check.sh.

    python benchmarks/gpu_tests.py FOLDER --seconds S [--jobs N]

Each file of tests runs in two processes of its own, bfloat16 residual streams in one and all else in the other, several
at a time: an access that breaks the device for one process leaves the others alone, and most of the time goes into the
golden references, on the CPU. Single operations come first, as everything else rests on them; tests that read the
device's free memory or a clock run alone, at the end. Where time runs out, pytest is interrupted, not killed, and
still prints what failed.

FOLDER gets a log of each process, tests.log with every failure and the counts, and skipped_tests.txt. The status is 0
where all passed, 124 where time ran out and none failed, else 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python put this folder on the path in the place of the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyharness import measure
from pyharness.errors import HarnessError, run_cli

TESTS = Path(__file__).resolve().parent.parent / "tests" / "python"

ORDER = ("test_ops", "test_fused_ops", "test_ops_v2", "test_fused_engine", "test_engine", "test_v2", "test_c_library")
"""Files that come first, in this order; then the others."""

ALONE = ("test_engine_gpu",)
"""Files that run when nothing else does."""

CHOICES = {"rest": "not cuda_bf16", "bf16": "cuda_bf16"}
"""pytest's -k by the name of a file's process."""

SHARE_OF_TOGETHER = 0.7
"""Of the time, for the files that run together where others run alone: those test what only a GPU shows."""

STACK_AFTER_S = 45
"""Seconds of one test behind which pytest prints where it is."""

GRACE_S = 15
"""From the interrupt to the kill."""

NOTHING_COLLECTED = 5
"""pytest's exit status where no test was chosen."""

OUT_OF_TIME = 124


@dataclass
class Run:
    """One process: the tests of `file` that CHOICES has for `choice`."""

    file: Path
    choice: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    status: int | None = None
    interrupted_at: float | None = None
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return f"{self.file.stem} {self.choice}"

    @property
    def interrupted(self) -> bool:
        return self.interrupted_at is not None

    @property
    def failed(self) -> bool:
        broken = self.counts["failed"] + self.counts["error"] > 0
        return broken or (not self.interrupted and self.status not in (None, 0, NOTHING_COLLECTED))


def gpu_files(tests: Path) -> list[Path]:
    """The files that hold tests marked `gpu`, in the order in which they run."""
    files = tests.glob("test_*.py")
    holding = [path for path in files if re.search(r"mark\.gpu|CUDA_PARAMS", path.read_text())]
    place = {name: i for i, name in enumerate(ORDER)}
    return sorted(holding, key=lambda path: (path.stem in ALONE, place.get(path.stem, len(place)), path.stem))


def plan(tests: Path, folder: Path) -> tuple[list[Run], list[Run]]:
    """The processes that may run together, and those that run alone."""
    together, alone = [], []
    for path in gpu_files(tests):
        for choice in CHOICES:
            run = Run(path, choice, folder / f"{path.stem}-{choice}.log")
            (alone if path.stem in ALONE else together).append(run)
    return together, alone


LAST_LINE = re.compile(r"^(=+ )?\d+ (passed|failed|error|skipped|deselected|warning)\w*(,| in \d).*$", re.MULTILINE)
OF_A_TEST = re.compile(
    r"^(\S+\.py::.+?)(?: (PASSED|FAILED|ERROR|SKIPPED)\b.*| Timeout .*| *)$",
    re.MULTILINE,
)


def counts_of(log: str) -> Counter[str]:
    """From pytest's last line, `2 failed, 61 passed, 3 skipped in 40.1s`; where it was killed, from the tests' own."""
    found: Counter[str] = Counter()
    if lines := list(LAST_LINE.finditer(log)):
        for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", lines[-1][0]):
            found[word] += int(number)
    else:
        found.update(word.lower() for _, word in OF_A_TEST.findall(log) if word)
    return found


def last_test(log: str) -> str:
    """The test that began last, `test_a.py::test_it[cuda]`; empty where none did."""
    names = [name for name, _ in OF_A_TEST.findall(log)]
    return names[-1].rsplit("/", 1)[-1] if names else ""


def heed_interrupts() -> None:
    """Shells start what runs in the background with SIGINT ignored, which is inherited, and kept by Python."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Runner:
    """Runs processes within a deadline; `clock` in seconds."""

    def __init__(self, deadline: float, threads: int, gemm_configs: Path) -> None:
        self.deadline, self.threads, self.gemm_configs = deadline, threads, gemm_configs

    def start(self, run: Run) -> None:
        chosen = ["-m", "gpu", "-k", CHOICES[run.choice], str(run.file)]
        command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
        # Verbose, and with a stack of what takes long: a test that hangs in a kernel heeds no interrupt.
        command += ["-o", f"faulthandler_timeout={STACK_AFTER_S}", *chosen]
        # What is timed while others run is none of the results' business: each process chooses GEMMs for itself.
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(self.threads),
            "SWIN_SKIP_REPORT": str(run.log.with_suffix(".skipped")),
            "SWIN_GEMM_CONFIG": str(self.gemm_configs / f"{run.log.stem}.json"),
        }  # fmt: skip
        with run.log.open("wb") as log:
            run.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True, preexec_fn=heed_interrupts,
            )  # fmt: skip

    def poll(self, running: list[Run], patience: float) -> None:
        """Takes ended processes out of `running`; interrupts and at last kills those beyond the deadline."""
        for run in list(running):
            assert run.process is not None
            run.status = run.process.poll()
            if run.status is not None:
                running.remove(run)
                self.finish(run)
                continue
            now = time.monotonic()
            if run.interrupted_at is not None and now - run.interrupted_at >= GRACE_S:
                run.process.kill()
            elif now >= self.deadline and not run.interrupted:
                run.interrupted_at = now
                run.process.send_signal(signal.SIGINT)
        time.sleep(patience)

    def finish(self, run: Run) -> None:
        run.counts = counts_of(run.log.read_text(encoding="utf-8", errors="replace"))
        said = ", ".join(f"{number} {word}" for word, number in run.counts.items()) or f"status {run.status}"
        if run.status != NOTHING_COLLECTED:
            print(f"{run.name}: {said}{' (time ran out)' if run.interrupted else ''}", flush=True)

    def run(self, runs: Sequence[Run], jobs: int, patience: float = 0.1) -> None:
        """All of `runs`, `jobs` at a time; those for which no time is left are not begun."""
        waiting, running = list(runs), []
        try:
            while waiting or running:
                while waiting and len(running) < jobs and time.monotonic() < self.deadline:
                    self.start(waiting[0])
                    running.append(waiting.pop(0))
                if not running:
                    return
                self.poll(running, patience)
        finally:
            for run in running:  # where this program itself is stopped
                assert run.process is not None
                run.process.kill()


def failures_of(log: str) -> str:
    """What pytest says of failures, from `= FAILURES =` or `= ERRORS =` on; else the end of what there is."""
    for mark in (r"^=+ ERRORS =+$", r"^=+ FAILURES =+$", r"^=+ short test summary"):
        if found := re.search(mark, log, re.MULTILINE):
            return log[found.start() :]
    return "\n".join(log.splitlines()[-15:]) + "\n"


def report(runs: Sequence[Run], folder: Path, seconds: float) -> str:
    """Writes tests.log and skipped_tests.txt; returns the line of counts."""
    text, total, skipped = "", Counter[str](), Counter[str]()
    for run in runs:
        total += run.counts
        if run.failed:
            text += f"{'#' * 20} {run.name}, status {run.status}\n{failures_of(run.log.read_text(errors='replace'))}\n"
        if run.process is None:
            text += f"not begun, no time was left: {run.name}\n"
        elif run.interrupted:
            reached = last_test(run.log.read_text(errors="replace"))
            text += f"not finished, time ran out: {run.name}{f', at {reached}' if reached else ''}\n"
        report_file = run.log.with_suffix(".skipped")
        for line in report_file.read_text().splitlines() if report_file.exists() else ():
            if found := re.fullmatch(r"(\d+) skipped: (.*)", line):
                skipped[found[2]] += int(found[1])
        report_file.unlink(missing_ok=True)
    order = ("failed", "error", "passed", "skipped")
    counts = ", ".join(f"{total[word]} {word}" for word in order if total[word]) or "0 passed"
    line = f"{counts} in {seconds:.1f}s"
    (folder / "tests.log").write_text(f"{text}{line}\n", encoding="utf-8")
    lines = [f"{number} skipped: {reason}\n" for reason, number in skipped.most_common()]
    (folder / "skipped_tests.txt").write_text("".join(lines) or "no Python test was skipped\n", encoding="utf-8")
    return line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_tests.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the logs go")
    parser.add_argument("--seconds", type=float, required=True, metavar="S", help="what still runs then is interrupted")
    parser.add_argument("--jobs", type=int, metavar="N", help="files at once (default: half the cores, up to 8)")
    parser.add_argument("--tests", type=Path, default=TESTS, metavar="DIR", help="default: tests/python")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    measure.need_positive(args, "--jobs")
    measure.need_above_zero(args, "--seconds")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here end as well
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    jobs = args.jobs or max(1, min(8, cores // 2))
    args.folder.mkdir(parents=True, exist_ok=True)
    together, alone = plan(args.tests, args.folder)
    if not together and not alone:
        raise HarnessError(f"{args.tests} holds no test that is marked gpu; give the folder of tests with --tests")
    with tempfile.TemporaryDirectory() as configs:
        share = SHARE_OF_TOGETHER if alone else 1
        Runner(started + share * args.seconds, max(1, cores // jobs), Path(configs)).run(together, jobs)
        Runner(started + args.seconds, cores, Path(configs)).run(alone, 1)
    runs = [*together, *alone]
    print(report(runs, args.folder, time.monotonic() - started))
    if any(run.failed for run in runs):
        return 1
    return OUT_OF_TIME if any(run.process is None or run.interrupted for run in runs) else 0


if __name__ == "__main__":
    run_cli(main)

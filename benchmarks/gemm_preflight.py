"""Which GEMM candidates break this GPU, or hang on it, before anything else meets them; for scripts/gpu_check.sh.

    python benchmarks/gemm_preflight.py FOLDER --seconds S [--limit S] [--jobs N]

The tuner runs every candidate of every provider in its own process: one that reads where nothing is, or waits for
what never comes, takes everything down that is tuned after it. Here each provider and output is tuned in a process of
its own, a small shape and one of Swin-T's, and the engine says what is about to run (SWIN_GEMM_TRACE). The last
candidate of a process that died, failed or fell silent is left out from then on, and the process begun again. Where
that does not help, all candidates of its family (cutlass:sm90_) are left out, then the whole provider.

FOLDER gets gemm_skip.txt, SWIN_GEMM_SKIP's prefixes, one a line; gemm_preflight.json, every attempt; and
gemm_preflight.log, what the processes said. All are written anew after each attempt. The status is 0 where nothing had
to be left out, 124 where time ran out, else 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python put this folder on the path in the place of the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pyharness import measure
from pyharness.atomic import atomic_path
from pyharness.errors import run_cli

SKIP_FILE, RESULT_FILE, LOG_FILE = "gemm_skip.txt", "gemm_preflight.json", "gemm_preflight.log"

CHANNELS = ("channels_s8", "channels_relu", "channels_gelu", "channels_f32", "channels_add_f16", "channels_add_bf16")
OUTPUTS = {
    "cublaslt": ("s8", "s8_relu", "s32"),
    "cutlass": ("s8", "s8_relu", "s32", *CHANNELS),
    "swin_tiles": CHANNELS,
}
"""What each provider may have candidates for (docs/gemm.md); the plain kernel is what all are compared with."""

SMALL = (49, 96, 96)
FC1, FC2 = (25088, 384, 96), (25088, 96, 384)
"""M, N and K: the rows of one window, which fill no tile; and the MLP of a Swin-T's first stage at batch 8."""

OF_FC2 = ("s32", "channels_f32", "channels_add_f16", "channels_add_bf16")

LIMIT_S = 20
"""Of silence. A candidate runs for microseconds, a process needs some seconds to start. Its whole time has no limit of
its own: where many share the device, a slow one must not be taken for one that hangs."""

KILL_S = 5
"""For a killed process to end, which it may not where the driver waits for the device."""

ATTEMPTS = 4
"""Candidates of one check that are left out singly, before more is left out at once."""

OUT_OF_TIME = 124
NO_MEMORY = "out of memory"

TRACE = re.compile(r"^swin_int8 gemm: (\S+) M=.*$", re.MULTILINE)
BLAME = re.compile(r"while (\S+) ran: ")
TRACES_KEPT = 5

PROGRAM = """
import json, torch
from pyharness import tune_gemm
tune_gemm.need_cuda_engine()
answer = json.loads(torch.ops.swin_int8.tune_gemm({m}, {n}, {k}, {outputs}, True))
print(tune_gemm.table(answer["shapes"]), *tune_gemm.refusals(answer["shapes"]), sep="\\n")
"""


@dataclass(frozen=True)
class Attempt:
    """One process: how it ended, in words, and the candidate that is to blame, if one is."""

    how: str
    blamed: str | None
    seconds: float
    well: bool = False


@dataclass
class Check:
    """One provider's candidates for one output."""

    provider: str
    output: str
    attempts: list[Attempt] = field(default_factory=list)
    log: str = ""
    state: str = "not begun"
    finished: bool = False
    failed: bool = False

    @property
    def name(self) -> str:
        return f"{self.provider} {self.output}"

    @property
    def blamed(self) -> list[str]:
        return [attempt.blamed for attempt in self.attempts if attempt.blamed]

    def end(self, state: str, finished: bool = True, failed: bool = False) -> None:
        self.state, self.finished, self.failed = state, finished, failed


def command_of(check: Check) -> list[str]:
    """A process that tunes the check's shapes. One whose provider has nothing right ends well: that is an answer."""
    m, n, k = ([*column] for column in zip(SMALL, FC2 if check.output in OF_FC2 else FC1))
    return [sys.executable, "-c", PROGRAM.format(m=m, n=n, k=k, outputs=[check.output] * len(m))]


def family_of(candidate: str) -> str:
    """The prefix of all that share its code: `cutlass:sm90_` of CUTLASS's kernels, else the provider's."""
    found = re.match(r"[^:]+:(sm\d+_)?", candidate)
    return found[0] if found else candidate


def shortened(output: str) -> str:
    """Without all but the last candidates that ran: there are hundreds."""
    lines = output.splitlines()
    traces = [i for i, line in enumerate(lines) if TRACE.match(line)]
    dropped = set(traces[:-TRACES_KEPT])
    return "".join(f"{line}\n" for i, line in enumerate(lines) if i not in dropped)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


class Preflight:
    """What the checks share. Each runs in a thread of its own; `deadline` is one of time.monotonic."""

    def __init__(self, checks: Sequence[Check], folder: Path, deadline: float, limit: float = LIMIT_S) -> None:
        self.checks, self.folder, self.deadline, self.limit = checks, folder, deadline, limit
        self.given = [prefix for prefix in os.environ.get("SWIN_GEMM_SKIP", "").split(",") if prefix]
        self.skipped: list[str] = []
        self.stopped = False
        self.lock = threading.Lock()

    def stop(self, *_: object) -> None:
        """As if time had run out; the threads kill their processes."""
        self.stopped = True

    @property
    def over(self) -> bool:
        return self.stopped or time.monotonic() >= self.deadline

    def leave_out(self, prefix: str) -> None:
        with self.lock:
            if not prefix.startswith(tuple(self.skipped)):
                self.skipped = [*(known for known in self.skipped if not known.startswith(prefix)), prefix]

    def write(self) -> None:
        """The three files, as things stand: whoever stops this program finds what it knew."""
        with self.lock:
            write_text(self.folder / SKIP_FILE, "".join(f"{prefix}\n" for prefix in self.skipped))
            rows = [
                {
                    "provider": c.provider,
                    "output": c.output,
                    "state": c.state,
                    "attempts": [vars(a) for a in c.attempts],
                }
                for c in self.checks
            ]
            document = {"skipped": self.skipped, "checks": rows}
            write_text(self.folder / RESULT_FILE, json.dumps(document, indent=1) + "\n")
            write_text(self.folder / LOG_FILE, "".join(check.log for check in self.checks) or "nothing was begun\n")

    def attempt(self, check: Check, command: Sequence[str]) -> Attempt:
        """Runs `command` once, until it ends, falls silent or time is over."""
        started = heard = time.monotonic()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            said = Path(folder) / "output"
            environment = {
                **os.environ, "SWIN_GEMM": check.provider, "SWIN_GEMM_TRACE": "1",
                "SWIN_GEMM_SKIP": ",".join([*self.given, *self.skipped]),
                "SWIN_GEMM_CONFIG": str(Path(folder) / "gemm.json"), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            with said.open("wb") as file:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
                    cwd=Path(__file__).resolve().parent.parent, start_new_session=True,
                )  # fmt: skip
            how, length = "", 0
            while process.poll() is None:
                now, size = time.monotonic(), said.stat().st_size
                if size != length:
                    heard, length = now, size
                if now - heard >= self.limit:
                    how = f"silent for {self.limit:g} s"
                elif self.over:
                    how = "time ran out"
                if how:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.05)
            silence = time.monotonic() - heard
            try:
                status = process.wait(KILL_S)
            except subprocess.TimeoutExpired:
                status, how = None, f"{how}, and cannot be killed"
            output = said.read_text(encoding="utf-8", errors="replace")
        named, traced = BLAME.findall(output), TRACE.findall(output)
        if status == 0:  # also where it was just ending
            how = "ended well"
        elif not how:
            how = NO_MEMORY if not named and NO_MEMORY in output else f"status {status}"
        seconds = time.monotonic() - started
        check.log += f"{'#' * 20} {check.name}: {how}, {seconds:.1f} s\n{shortened(output)}\n"
        blamed = named[-1] if named else traced[-1] if traced else None
        # What ran when time was over may have been about to end, and who finds no memory is not to blame.
        hasty = how.startswith("time ran out") and silence < self.limit / 2
        if status == 0 or hasty or how == NO_MEMORY:
            blamed = None
        return Attempt(how, blamed, round(seconds, 1), well=status == 0)

    def run(self, check: Check, command: Sequence[str]) -> None:
        """Attempts until one ends well, or there is nothing left to leave out."""
        while not check.finished:
            if f"{check.provider}:" in self.skipped:
                check.end("the whole provider is left out")
            elif self.over:
                check.end("time ran out" if check.attempts else "not begun, no time was left", finished=False)
                if check.blamed:  # there may be more of them, which everything that follows would meet
                    self.leave_out(family_of(check.blamed[-1]))
                break
            else:
                check.attempts.append(self.attempt(check, command))
                self.judge(check, check.attempts[-1])
            self.write()
        self.write()
        print(f"{check.name}: {check.state}", flush=True)

    def judge(self, check: Check, last: Attempt) -> None:
        if last.well:
            check.end(f"well without {', '.join(check.blamed)}" if check.blamed else "well")
        elif last.blamed is None:
            again = last.how == NO_MEMORY and sum(attempt.how == NO_MEMORY for attempt in check.attempts) == 1
            if not again and not self.over:  # once more: others give their memory back
                line = [line for line in check.log.splitlines() if line.strip()][-1]
                said = "it said nothing" if line.startswith("#" * 20) else line
                check.end(f"could not be tried ({last.how}): {said}. See {LOG_FILE}", failed=True)
        elif last.blamed.startswith("swin_plain:"):
            reason = f"the plain GEMM kernel fails on this GPU ({last.how}), so nothing can be compared with it"
            check.end(f"{reason}. See {LOG_FILE}", failed=True)
        elif len(check.blamed) <= ATTEMPTS:
            self.leave_out(last.blamed)
        else:
            families = {family_of(name) for name in check.blamed}
            first_time = len(check.blamed) == ATTEMPTS + 1
            self.leave_out(families.pop() if first_time and len(families) == 1 else f"{check.provider}:")


def built_providers() -> list[str]:
    import torch

    from pyharness.tune_gemm import need_cuda_engine

    need_cuda_engine()
    return [one["provider"] for one in json.loads(torch.ops.swin_int8.cuda_info())["providers"] if one["built"]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gemm_preflight.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help=f"where {SKIP_FILE}, {RESULT_FILE} and {LOG_FILE} go")
    parser.add_argument("--seconds", type=float, required=True, metavar="S", help="what still runs then is stopped")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="S",
        help="a process that says nothing for so long hangs (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="N", help="processes at once (default: half the cores, up to 8)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    measure.need_positive(args, "--jobs")
    measure.need_above_zero(args, "--seconds", "--limit")
    deadline = time.monotonic() + args.seconds
    built = built_providers()
    checks = [Check(name, output) for name, outputs in OUTPUTS.items() if name in built for output in outputs]
    preflight = Preflight(checks, args.folder, deadline, args.limit)
    preflight.write()
    jobs = args.jobs or max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    before = signal.signal(signal.SIGTERM, preflight.stop)  # so that the processes started here end as well
    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda check: preflight.run(check, command_of(check)), checks))
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"left out: {', '.join(preflight.skipped) or 'nothing'}")
    if preflight.skipped or any(check.failed for check in checks):
        return 1
    return 0 if all(check.finished for check in checks) else OUT_OF_TIME


if __name__ == "__main__":
    run_cli(main)

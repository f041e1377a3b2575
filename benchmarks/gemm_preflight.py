"""Which GEMM candidates break this GPU, or hang on it, before anything else meets them; for scripts/gpu_check.sh.

    python benchmarks/gemm_preflight.py FOLDER --seconds S [--jobs N]

The tuner runs every candidate of every provider in its own process: one that reads where nothing is, or waits for
what never comes, takes everything down that is tuned after it. Here each provider and output is tuned in a process of
its own, a small shape and one of Swin-T's, and the engine says what is about to run (SWIN_GEMM_TRACE). The last
candidate of a process that died, failed or hung is left out from then on, and the process begun again; a provider that
goes on failing is left out whole.

FOLDER gets gemm_skip.txt, SWIN_GEMM_SKIP's prefixes, one a line, and gemm_preflight.log, what the processes said. The
status is 0 where nothing had to be left out, 124 where time ran out, else 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python put this folder on the path in the place of the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pyharness import measure
from pyharness.atomic import atomic_path
from pyharness.errors import HarnessError, run_cli

SKIP_FILE, LOG_FILE = "gemm_skip.txt", "gemm_preflight.log"

CHANNELS = ("channels_s8", "channels_relu", "channels_gelu", "channels_f32", "channels_add_f16", "channels_add_bf16")
OUTPUTS = {
    "cublaslt": ("s8", "s8_relu", "s32"),
    "cutlass": ("s8", "s8_relu", "s32", *CHANNELS),
    "swin_tiles": CHANNELS,
}
"""What each provider may have candidates for (docs/gemm.md); the plain kernel is what all are compared with."""

SHAPES = ((64, 96, 96), (25088, 384, 96))
"""M, N and K: less than any tile's rows, and FC1 of a Swin-T's first stage at batch 8."""

LIMIT_S = 25
"""Of one process, PyTorch's start included."""

ATTEMPTS = 4
"""Candidates of one process that are left out singly, before its provider is left out whole."""

OUT_OF_TIME = 124

TRACE = re.compile(r"^swin_int8 gemm: (\S+) M=", re.MULTILINE)


@dataclass
class Check:
    """One provider's candidates for one output."""

    provider: str
    output: str
    skipped: list[str] = field(default_factory=list)
    log: str = ""
    finished: bool = False

    @property
    def name(self) -> str:
        return f"{self.provider} {self.output}"


def command_of(check: Check) -> list[str]:
    """A process that tunes the check's shapes. One whose provider has nothing right ends well: that is an answer."""
    columns = [list(column) for column in zip(*SHAPES)]
    program = (
        "import torch; from pyharness.engine import load; load(); "
        f"torch.ops.swin_int8.tune_gemm({columns[0]}, {columns[1]}, {columns[2]}, {[check.output] * len(SHAPES)}, True)"
    )
    return [sys.executable, "-c", program]


def attempt(check: Check, command: Sequence[str], seconds: float) -> str | None:
    """Runs `command` once; the candidate that it ended with, None where it ended well. HarnessError where it failed
    before any candidate ran."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "SWIN_GEMM": check.provider, "SWIN_GEMM_TRACE": "1",
            "SWIN_GEMM_SKIP": ",".join(check.skipped),
            "SWIN_GEMM_CONFIG": str(Path(folder) / "gemm.json"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", timeout=seconds, env=environment, cwd=Path(__file__).resolve().parent.parent,
            )  # fmt: skip
            output, how = done.stdout, f"status {done.returncode}"
        except subprocess.TimeoutExpired as expired:  # it is killed
            partial = expired.stdout or ""
            output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
            done, how = None, f"killed after {seconds:.0f} s"
    check.log += f"{check.name}: {how}\n{output}\n"
    if done is not None and done.returncode == 0:
        return None
    ran = TRACE.findall(output)
    if not ran:
        lines = output.strip().splitlines()
        raise HarnessError(
            f"the GEMMs of {check.name} could not be tried ({how}): {lines[-1] if lines else 'it said nothing'}. "
            f"See {LOG_FILE}"
        )
    return ran[-1]


def run_check(check: Check, command: Sequence[str], deadline: float, limit: float = LIMIT_S) -> Check:
    """Attempts until one ends well; what had to be left out is in `skipped`."""
    for _ in range(ATTEMPTS + 1):
        left = deadline - time.monotonic()
        if left <= 0:
            return check
        blamed = attempt(check, command, min(limit, left))
        if blamed is None:
            check.finished = True
            return check
        if time.monotonic() >= deadline:  # it may have been about to end
            return check
        if blamed.startswith("swin_plain:"):
            raise HarnessError(
                f"the plain GEMM kernel fails on this GPU, so nothing can be compared with it: see {LOG_FILE}"
            )
        check.skipped.append(blamed)
    check.skipped = [f"{check.provider}:"]
    check.finished = True
    return check


def write_lines(path: Path, lines: Iterable[str]) -> None:
    with atomic_path(path) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def built_providers() -> list[str]:
    import torch

    from pyharness.tune_gemm import need_cuda_engine

    need_cuda_engine()
    return [one["provider"] for one in json.loads(torch.ops.swin_int8.cuda_info())["providers"] if one["built"]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gemm_preflight.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help=f"where {SKIP_FILE} and {LOG_FILE} go")
    parser.add_argument("--seconds", type=float, required=True, metavar="S", help="nothing is begun later than this")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes at once (default: half the cores, up to 8)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    measure.need_positive(args, "--jobs")
    if args.seconds <= 0:
        raise HarnessError(f"--seconds must be above zero, found {args.seconds:g}")
    deadline = time.monotonic() + args.seconds
    built = built_providers()
    checks = [Check(name, output) for name, outputs in OUTPUTS.items() if name in built for output in outputs]
    args.folder.mkdir(parents=True, exist_ok=True)
    jobs = args.jobs or max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda check: run_check(check, command_of(check), deadline), checks))
    finally:
        skipped = list(dict.fromkeys(prefix for check in checks for prefix in check.skipped))
        write_lines(args.folder / SKIP_FILE, skipped)
        write_lines(args.folder / LOG_FILE, (check.log.rstrip() for check in checks))
    for check in checks:
        said = f"left out: {', '.join(check.skipped)}" if check.skipped else "nothing to be left out"
        print(f"{check.name}: {said}{'' if check.finished else ' (time ran out)'}")
    if skipped:
        return 1
    return 0 if all(check.finished for check in checks) else OUT_OF_TIME


if __name__ == "__main__":
    run_cli(main)

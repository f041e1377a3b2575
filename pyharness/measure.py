"""Timing in alternation, and the conditions a measurement was made under.

Methods that are compared are timed in one process, round by round, after a warm-up, so that a clock that drifts or a
neighbour that wakes hits all of them alike. Ratios are taken within a round, then their median over rounds. Each timed
call follows untimed calls of the same method, so that none pays for the caches and spinning threads that the method
before it left behind: measured right after fp32 PyTorch, an INT8 Swin-T took 30 % longer than after itself. Rounds
differ in their order (order_of_round), so that what is left of that does not fall on the same method every time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyharness.errors import HarnessError

if TYPE_CHECKING:
    from torch import Tensor

    from pyharness.config import SwinConfig

ROOT = Path(__file__).resolve().parent.parent

LEAST_ROUNDS = 10
"""Rounds that a time limit leaves, so that there is a median."""

LEAST_SETTLING = 2
"""Untimed calls before a timed one, where there are any: for a slow method the first alone would fill the time."""

Samples = dict[str, list[float]]
"""Milliseconds per round, by method; entry i of every method is from round i."""


@dataclass(frozen=True)
class LatencyStats:
    """Summary of one method's rounds, in milliseconds."""

    median: float
    p10: float
    p90: float
    mean: float
    runs: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a figure that was computed within each round."""

    median: float
    q25: float
    q75: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def quantile(samples: Sequence[float], q: float) -> float:
    """The `q` quantile, 0 <= q <= 1, linearly interpolated between order statistics. ValueError where empty."""
    if not samples:
        raise ValueError("no samples: at least one run is needed")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarize(samples: Sequence[float]) -> LatencyStats:
    """Median, 10th and 90th percentile and mean of one method's rounds. ValueError where empty."""
    return LatencyStats(
        median=quantile(samples, 0.5),
        p10=quantile(samples, 0.1),
        p90=quantile(samples, 0.9),
        mean=statistics.fmean(samples),
        runs=len(samples),
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(quantile(values, 0.5), quantile(values, 0.25), quantile(values, 0.75))


def paired_ratio(samples: Samples, method: str, baseline: str) -> Spread:
    """Latency of `method` over that of `baseline`, round by round; below 1 is faster than the baseline."""
    return _spread([a / b for a, b in zip(samples[method], samples[baseline], strict=True)])


def paired_drop(samples: Samples, full: str, without: str) -> Spread:
    """Milliseconds by which `without` is shorter than `full`, round by round."""
    return _spread([a - b for a, b in zip(samples[full], samples[without], strict=True)])


def order_of_round(index: int, count: int) -> list[int]:
    """The order of `count` methods in round `index`, by their numbers: it begins with `index` modulo `count`.

    Were the start alone to move, each method would still follow the same one but once in `count` rounds. So the others
    come from both sides in turn (i, i + 1, i - 1, i + 2, ...; in the next `count` rounds i, i - 1, i + 1, ...). This is
    Williams' design: within 2 `count` rounds each method comes right after each other one equally often.
    """
    side = -1 if index // count % 2 else 1
    steps = [(place + 1) // 2 * (1 if place % 2 else -1) for place in range(count)]  # 0, 1, -1, 2, -2, ...
    return [(index + side * step) % count for step in steps]


def time_alternating(
    methods: Mapping[str, Callable[[], object]],
    runs: int,
    *,
    warmup: int = 2,
    settle_ms: float | None = 10.0,
    synchronize: Callable[[], None] | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
    timer: Callable[[Callable[[], object]], float] | None = None,
    limit_s: float | None = None,
) -> Samples:
    """Time `methods` for `runs` rounds, each method once per round, in the order of order_of_round. Samples have the
    order of `methods`.

    `warmup` untimed rounds go first. Before each timed call the method runs untimed, LEAST_SETTLING times and then on
    until `settle_ms` milliseconds have passed; not at all where that is None. `synchronize` waits for the device (none
    on a CPU) before each time is taken. `clock` gives nanoseconds. `timer` takes the place of both: milliseconds of the
    call it is given (gpu.CudaTimer). After `limit_s` seconds, and at least LEAST_ROUNDS rounds, no other round begins.
    ValueError where there is nothing to time.
    """
    if not methods or runs < 1:
        raise ValueError(f"nothing to time: {len(methods)} methods, {runs} runs; at least one of each is needed")
    wait = synchronize or (lambda: None)

    def by_clock(call: Callable[[], object]) -> float:
        wait()
        start = clock()
        call()
        wait()
        return (clock() - start) / 1e6

    timed = timer or by_clock
    samples: Samples = {name: [] for name in methods}
    numbered = list(methods.items())
    started = clock()
    for index in range(-warmup, runs):
        if limit_s is not None and index >= LEAST_ROUNDS and clock() - started > limit_s * 1e9:
            break
        for name, call in (numbered[number] for number in order_of_round(index, len(numbered))):
            if settle_ms is not None:
                settled = sum(max(1e-6, timed(call)) for _ in range(LEAST_SETTLING))
                while settled < settle_ms:
                    settled += max(1e-6, timed(call))
            if index >= 0:
                samples[name].append(timed(call))
            elif settle_ms is None:
                timed(call)
    return samples


def random_images(config: SwinConfig, batch: int) -> Tensor:
    """Images f32 [batch, C, H, W] to time a model on, the same in every run."""
    import torch

    return torch.randn(batch, config.in_chans, *config.img_size, generator=torch.Generator().manual_seed(0))


def need_positive(args: argparse.Namespace, *flags: str) -> None:
    """HarnessError where one of the options `flags` (as on the command line, "--runs") is given and below 1."""
    for flag in flags:
        value = getattr(args, flag.lstrip("-").replace("-", "_"))
        if value is not None and value < 1:
            raise HarnessError(f"{flag} must be at least 1, found {value}")


def need_above_zero(args: argparse.Namespace, *flags: str) -> None:
    """HarnessError where one of the options `flags` is given and not a finite number above zero."""
    for flag in flags:
        value = getattr(args, flag.lstrip("-").replace("-", "_"))
        if value is not None and not 0 < value < math.inf:
            raise HarnessError(f"{flag} must be finite and above zero, found {value:g}")


def set_threads(threads: int | None) -> int:
    """Use `threads` CPU threads in PyTorch and the engine; None leaves the default. Returns the number in use."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name and core count, e.g. `AMD EPYC 7763 (family 25 model 1), 2 cores`.

    Where Linux tells family and model they are part of it: a virtual machine often says no more than `AMD EPYC`, which
    is every generation since 2017.
    """
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        first = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0]
        told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        name = told.get("model name", name)
        if {"cpu family", "model"} <= told.keys():
            name += f" (family {told['cpu family']} model {told['model']})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} core{'s' if cores != 1 else ''}"


def git_state(root: Path = ROOT) -> dict[str, object]:
    """`{"commit": hash or None, "dirty": bool or None}` of the checkout; None where it is no git checkout, be it within
    one: an installed package may lie in a virtual environment inside some repository of the user's.

    Files below results/ do not count as changes: the measurement itself writes them. A copy without git's folder may
    say what it was made from by the environment variable SWIN_COMMIT; whether it was changed since is not known.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    is_checkout = bool(top) and Path(top).resolve() == Path(root).resolve()
    commit = git("rev-parse", "HEAD") if is_checkout else None
    changes = git("status", "--porcelain", "--", ".", ":(exclude)results") if commit else None
    commit = commit or os.environ.get("SWIN_COMMIT") or None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command that runs, with paths below the repository written from its root."""
    words = list(sys.argv if argv is None else argv)
    return " ".join(["python", *(word.replace(f"{ROOT}{os.sep}", "") for word in words)])


def environment(engine: Mapping[str, object] | None, threads: int) -> dict[str, object]:
    """The conditions of a measurement, for a result file's `meta`. `engine` is what `engine_info()` said."""
    import timm
    import torch

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **git_state(),
        "device": cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "driver": None,
        "cuda": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "engine": dict(engine) if engine else None,
        "threads": threads,
        "command": command_line(),
    }

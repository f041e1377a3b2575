"""What the training programs share: repeatable arithmetic, seeds, progress on stderr, logs."""

from __future__ import annotations

import csv
import functools
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyharness import distributed
from pyharness.atomic import atomic_path

LINE_SECONDS = 60.0
"""Without a terminal, seconds between two lines about the steps of a training run."""


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Inside, PyTorch's random numbers follow from `seed` and its operations add in a fixed order.

    Needed even on a CPU: in models with many heads, the gradient of the relative position bias table is otherwise added
    up by several threads in any order. With the same number of threads on the same kind of CPU, results then repeat
    bit for bit. On CUDA, operations without a fixed order only warn. The caller's random state and settings come back
    at the end.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def derived_seed(*parts: int | str) -> int:
    """A seed for one purpose; neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "little")


def progress(
    items: Iterable, *, total: int, initial: int, label: str, unit: str = "batch", every: float | None = None
) -> Iterable:
    """`items`, each a `unit`, with a progress bar on stderr.

    Without a terminal a line at most `every` seconds; where that is None nothing (the caller reports each step's end).
    Of many processes, the first alone shows either.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    if every is not None and not terminal:
        return _with_lines(items, total, initial, f"{label}: {{}} of {total} {_plural(unit)}", every)
    hidden = not (terminal and distributed.is_main())
    return tqdm(items, total=total, initial=initial, desc=label, unit=unit, leave=False, disable=hidden)


def _with_lines(items: Iterable, total: int, done: int, line: str, every: float) -> Iterator:
    due = Due(every)
    for item in items:
        yield item
        done += 1
        if done < total and due():
            report(line.format(done))


def _plural(unit: str) -> str:
    return unit + ("es" if unit.endswith("ch") else "s")


class Due:
    """Called, whether `every` seconds have passed since it was made or last said so."""

    def __init__(self, every: float) -> None:
        self._every, self._since = every, time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._since < self._every:
            return False
        self._since = now
        return True


class StepLines:
    """Without a terminal, a line about a training run's steps every `LINE_SECONDS`, by the first of many processes."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Measure the speed from now on: what went before was no step."""
        self._images, self._steps, self._since, self._due = 0, 0, time.monotonic(), Due(LINE_SECONDS)

    def count(self, images: int, left: int, where: Callable[[], str]) -> None:
        """A step of `images` images is done, `left` are to come; `where` says in words how far the run is."""
        self._images, self._steps = self._images + images, self._steps + 1
        if not self._due():
            return
        if not sys.stderr.isatty():
            seconds = max(time.monotonic() - self._since, 1e-9)
            rest = _duration(left * seconds / self._steps)
            report(f"{where()}, {self._images / seconds:.3g} images/s, about {rest} of training left")
        self.restart()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def report(line: str, *, anywhere: bool = False) -> None:
    """One line of progress on stderr, of many processes from the first alone, or `anywhere`: what one of them met."""
    if anywhere or distributed.is_main():
        print(line, file=sys.stderr, flush=True)


@functools.cache
def report_once(line: str) -> None:
    """`report`, once in a process: of a file, which a program may open more than once."""
    report(line)


def write_csv(path: Path, fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` under the header `fields`, atomically. None becomes an empty cell."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class Stopwatch:
    """Seconds of wall time, continued over interruptions by starting from those already spent."""

    def __init__(self, spent: float = 0.0) -> None:
        self._begin = time.perf_counter() - spent

    def seconds(self) -> float:
        return time.perf_counter() - self._begin

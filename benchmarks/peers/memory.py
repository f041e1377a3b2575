"""Peak memory of a model in a process of its own: load it, run it three times, read the highest resident size.

    python -m benchmarks.peers.memory onnx_runtime FILE 1x3x224x224 2

It counts what the process ever held at once: Python, the libraries it needs, the model and its buffers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RUNS = 3


def peak_mb() -> float | None:
    """Highest resident size of this process since it started its program, in 10^6 bytes; None where the system does not
    say. Not getrusage's ru_maxrss, which a new program takes over from the process that started it."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024 / 1e6


def measure_call(build: Callable[[], Callable[[], Any]]) -> float | None:
    """`peak_mb` after `build()` and RUNS calls of what it gave."""
    call = build()
    for _ in range(RUNS):
        call()
    return peak_mb()


def answer(peak: float | None) -> None:
    """Print a child's result, as its last line."""
    print(json.dumps({"peak_memory_mb": peak}), flush=True)


def engine(file: Path, images: Any, threads: int) -> Callable[[], Any]:
    """This engine on an engine file; images float32 [B, C, H, W] in NumPy."""
    import functools

    import torch

    from pyharness.engine import SwinInt8

    torch.set_num_threads(threads)
    return functools.partial(SwinInt8.from_file(file), torch.from_numpy(images))


def main(words: Sequence[str]) -> int:
    import numpy as np

    from benchmarks.peers import runtimes

    runtime, file, shape, threads, *more = words
    images = np.random.default_rng(0).standard_normal([int(size) for size in shape.split("x")], dtype=np.float32)
    if runtime == "engine":
        answer(measure_call(lambda: engine(Path(file), images, int(threads))))
    else:
        answer(measure_call(lambda: getattr(runtimes, runtime)(Path(file), images, int(threads), *more).call))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

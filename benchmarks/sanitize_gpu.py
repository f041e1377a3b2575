"""A small workload for compute-sanitizer: FT's graphs in both int8 modes, the fused one of Swin-V1 and -V2 with both
activations, odd batches, a replayed recording.

    compute-sanitizer --tool memcheck python benchmarks/sanitize_gpu.py

Run it once without the tool before, with the same SWIN_GEMM_CONFIG: then no GEMM is tuned under it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor its own allocation: its end is checked
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from pyharness import gpu, measure
from pyharness.config import FUSED_GRAPH, GRAPHS, MICRO_DIGITS
from pyharness.engine import SwinInt8
from pyharness.errors import HarnessError, run_cli
from pyharness.random_engine import random_engine_file

BATCHES = (3, 1)


def main() -> int:
    device = gpu.use_device("cuda" if len(sys.argv) < 2 else sys.argv[1])
    files = {
        f"{graph}, int8_mode {int8_mode}": random_engine_file(MICRO_DIGITS, graph, int8_mode)
        for graph in GRAPHS
        for int8_mode in (1, 2)
    }
    for version, activation in itertools.product((1, 2), ("relu", "gelu")):
        config = dataclasses.replace(MICRO_DIGITS, version=version)
        file = random_engine_file(config, FUSED_GRAPH, activation=activation)
        files[f"{FUSED_GRAPH} of Swin-V{version}, {activation}"] = file
    for name, file in files.items():
        model = SwinInt8.from_engine_file(file).to(device)
        for batch in BATCHES:
            images = measure.random_images(MICRO_DIGITS, batch).to(device)
            first = model(images)
            for _ in range(2):  # on a GPU the second call records and the third replays
                if not torch.equal(model(images), first):
                    raise HarnessError(f"{name}, batch {batch}: calls give different logits")
            if not first.isfinite().all():
                raise HarnessError(f"{name}, batch {batch}: logits are not finite")
    print(f"{len(files)} models, batches {BATCHES}: finite, and the same in every call")
    return 0


if __name__ == "__main__":
    run_cli(main)

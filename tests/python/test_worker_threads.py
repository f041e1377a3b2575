"""The CPU engine's own threads: what they are called, and on which processors they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROCESSORS = sorted(os.sched_getaffinity(0))
SCRIPT = """
import json, os, sys
import torch
from pyharness.config import MICRO_DIGITS
from pyharness.engine import SwinInt8
from pyharness.random_engine import random_engine_file

if sys.argv[1] != "all":
    os.sched_setaffinity(0, json.loads(sys.argv[1]))
torch.set_num_threads(2)
SwinInt8.from_engine_file(random_engine_file(MICRO_DIGITS, "ft_int8"))(torch.zeros(8, 1, 28, 28))
workers = [
    sorted(os.sched_getaffinity(int(task)))
    for task in os.listdir("/proc/self/task")
    if open(f"/proc/self/task/{task}/comm").read().strip() == "swin_int8"
]
print(json.dumps([sorted(os.sched_getaffinity(0)), workers]))
"""


def run(processors: list[int] | None = None, **variables: str) -> list:
    """The processors of the caller, and of each worker."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    argument = "all" if processors is None else json.dumps(processors)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, argument], env={**environment, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_workers_have_a_name_and_the_callers_processors() -> None:
    caller, workers = run()
    assert caller == PROCESSORS and workers == [PROCESSORS]


@pytest.mark.skipif(len(PROCESSORS) < 2, reason="needs two processors")
def test_openmp_binds_the_caller_and_not_the_workers() -> None:
    caller, workers = run(OMP_PROC_BIND="true", OMP_NUM_THREADS="2")
    if len(caller) != 1:
        pytest.skip("PyTorch's OpenMP does not bind the thread that loads it")
    assert workers == [PROCESSORS]


@pytest.mark.skipif(len(PROCESSORS) < 2, reason="needs two processors")
def test_openmps_places_are_not_left() -> None:
    """Whoever gives a process one processor, as taskset does, gets its threads there, OpenMP's and these."""
    places = ",".join(f"{{{number}}}" for number in PROCESSORS[:2])
    _, workers = run(OMP_PROC_BIND="true", OMP_NUM_THREADS="2", OMP_PLACES=places)
    assert workers == [PROCESSORS[:2]]
    caller, workers = run(PROCESSORS[:1])
    assert caller == PROCESSORS[:1] and workers == [PROCESSORS[:1]]


@pytest.mark.skipif(len(PROCESSORS) < 3, reason="needs three processors")
def test_a_caller_with_processors_enough_is_followed() -> None:
    caller, workers = run(PROCESSORS[:2], OMP_PROC_BIND="true", OMP_NUM_THREADS="2")
    assert caller == PROCESSORS[:2] and workers == [PROCESSORS[:2]]

"""What test_trainer.py has several processes do: distillations into the folder given, one line of JSON from each."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset

from pyharness import distill as d
from pyharness import distributed, models
from pyharness.config import MICRO_DIGITS
from pyharness.data import DigitsDataset
from pyharness.errors import run_cli

MICRO = MICRO_DIGITS.name
SHORT = d.DistillOptions(batch_size=8, subset=1.0, seed=3)
"""With 20 images: four blocks of 3 steps."""
UNEVEN = replace(SHORT, batch_size=3)
"""With 19 images: six batches of 3, which two processes share as 2 + 1, and one of a single image."""


class Digits(Dataset):
    """The first training images in float64, noting which were asked for."""

    def __init__(self, count: int) -> None:
        self.images = Subset(DigitsDataset(train=True), range(count))
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        self.asked.append(index)
        image, label = self.images[index]
        return image.double(), label


def run_uneven(out: Path, **more):
    """UNEVEN in float64, where what the processes' sums round away cannot grow into anything."""
    teacher, images = models.create_model(MICRO, weights="pretrained").double(), Digits(19)
    summary = d.distill(teacher, MICRO, images, UNEVEN, out, eval_dataset=images, **more)
    return summary, images.asked


def run_short(out: Path, **more):
    """SHORT, as the program runs it."""
    teacher = models.create_model(MICRO, weights="pretrained")
    return d.distill(teacher, MICRO, Subset(DigitsDataset(train=True), range(20)), SHORT, out, **more)


def signal_to(rank: int, step: int) -> None:
    """SIGTERM to process `rank` alone, in its step number `step`."""
    original, calls = d._Run._train_step, []

    def with_signal(run, *batch):
        calls.append(1)
        if len(calls) == step and distributed.rank() == rank:
            signal.raise_signal(signal.SIGTERM)
        original(run, *batch)

    d._Run._train_step = with_signal


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    with distributed.session():
        uneven, asked = run_uneven(out / "uneven")
        run_short(out / "short")
        run_short(out / "from_one")  # test_trainer.py began it in one process
        assert run_short(out / "for_one", stop_after_steps=7) is None
        signal_to(rank=1, step=5)
        try:
            run_short(out / "signal")
            stopped = False
        except KeyboardInterrupt:
            stopped = True
    print(json.dumps({"asked": asked, "eval": uneven.rows[-1]["eval_accuracy"], "stopped": stopped}))


if __name__ == "__main__":
    run_cli(main)

"""What test_qat.py also has two processes do: learn every amax, in float64, where sums round little away; one line of JSON from each process."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Subset
from train_worker import Digits

from pyharness import distributed, models, qat
from pyharness.config import MICRO_DIGITS
from pyharness.data import DigitsDataset, make_loader
from pyharness.errors import run_cli
from pyharness.quantize import quantize
from pyharness.train_options import Machine

OPTIONS = qat.QatOptions(batch_size=8, subset=1.0, epochs=1, seed=5, learn_amax=True)
IMAGES = 17
"""Two batches of 8, and one of a single image, of which a second process gets a stand-in."""


def learned(accumulate: int = 1) -> tuple[dict[str, float], dict[str, float]]:
    """Every amax of the GELU-less micro model by name, before and after the training; the same in every process."""
    student = models.create_model(MICRO_DIGITS.name, weights="pretrained", activation="relu")
    batches = (x for x, _ in make_loader(Subset(DigitsDataset(train=True), range(100, 132)), 8))
    checkpoint = quantize(student, MICRO_DIGITS, list(itertools.islice(batches, 4)))
    teacher = models.create_model(MICRO_DIGITS.name, weights="pretrained").double()
    machine = Machine(accumulate=accumulate, state_every=100)
    with tempfile.TemporaryDirectory() as out:
        run = qat._Run(checkpoint, teacher, Digits(IMAGES), OPTIONS, Path(out), None, machine)
        run.student.double()
        _leave_ties(run.student)
        before = amax_of(run.student)
        assert run.train(None)
        return before, amax_of(run.student)


@torch.no_grad()
def _leave_ties(model: torch.nn.Module) -> None:
    """Change every amax by up to 1 %. One that is the greatest of a GEMM's results puts others of them, which are
    multiples of one step, exactly on ties, which any rounding breaks."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, qat.LearnedQuantizer):
            module._amax.mul_(1 + 0.01 * torch.rand((), generator=generator, dtype=torch.float64))


def amax_of(model: torch.nn.Module) -> dict[str, float]:
    return {name: float(tensor.detach()) for name, tensor in model.state_dict().items() if name.endswith("._amax")}


def main() -> None:
    torch.set_num_threads(1)
    with distributed.session():
        _, after = learned(int(sys.argv[1]))
    print(json.dumps(after))


if __name__ == "__main__":
    run_cli(main)

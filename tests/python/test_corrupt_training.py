"""Training and calibration on a folder with an image that cannot be read: all is written, and the run says so."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from quant_helpers import one_thread

from pyharness import data, distill, distributed, qat, quantize
from pyharness.config import MICRO_DIGITS
from pyharness.errors import DataError
from pyharness.models import MICRO_TEACHER, create_model

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

BROKEN = "3/1.png"


@pytest.fixture
def folder(tmp_path):
    """Ten classes with three grey images each in train/, one of them cut short, and one each in val/."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for label in range(10):
            place = tmp_path / "images" / split / str(label)
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    broken = tmp_path / "images" / "train" / BROKEN
    broken.write_bytes(broken.read_bytes()[:60])
    return tmp_path / "images"


def test_every_program_lists_it_and_ends_with_an_error_after_writing(folder, tmp_path):
    out, teacher = tmp_path / "out", str(MICRO_TEACHER)
    machine = ["--threads", "1", "--no-tensorboard", "--batch", "10", "--subset", "1"]
    calibrated = out / "quantize" / "calibrated.safetensors"
    named = ["--model", MICRO_DIGITS.name, "--weights", teacher]
    programs = {
        "distill": (distill, [*named, "--out", str(out / "distill"), *machine], out / "distill" / "student.safetensors"),
        "quantize": (quantize, [*named, "--out", str(calibrated), "--batch-size", "30", "--method", "max"], calibrated),
        "qat": (qat, [str(calibrated), "--teacher", teacher, "--out", str(out / "qat"), "--epochs", "1", *machine],
                out / "qat" / "calibrated.safetensors"),
    }  # fmt: skip
    for name, (program, arguments, written) in programs.items():
        with pytest.raises(DataError, match=rf"1 of 30 images cannot be read, more than 1 %: .*{BROKEN}"):
            program.main([*arguments, "--data", str(folder)])
        assert written.exists(), name
        assert (out / name / "corrupt.txt").read_text() == f"{BROKEN}\n", name


def test_one_in_a_hundred_and_less_is_only_listed(folder, tmp_path, monkeypatch):
    dataset = data.imagefolder(folder, "train", create_model(MICRO_DIGITS.name))
    for index in range(len(dataset)):
        dataset[index]
    monkeypatch.setattr(data.check_corrupt, "__defaults__", (0.04,))
    data.check_training_images(dataset, tmp_path)
    assert (tmp_path / "corrupt.txt").read_text() == f"{BROKEN}\n"


@pytest.mark.parametrize("main", [True, False])
def test_processes_count_together_and_one_writes(folder, tmp_path, monkeypatch, main):
    """Each of two processes met one: 2 of 60, in all, on both, and the file is the first one's."""
    dataset = data.imagefolder(folder, "train", create_model(MICRO_DIGITS.name))
    for index in range(len(dataset)):
        dataset[index]
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, (["9/2.png"], 30)])
    monkeypatch.setattr(distributed, "is_main", lambda: main)
    with pytest.raises(DataError, match=r"2 of 60 images cannot be read.*3/1\.png, 9/2\.png"):
        data.check_training_images(dataset, tmp_path)
    assert (tmp_path / "corrupt.txt").exists() == main

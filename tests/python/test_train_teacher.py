"""The teacher's training program, on a handful of images, and the committed teacher's record."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from pyharness import models
from pyharness import train_teacher as t
from pyharness.data import digits_split
from pyharness.errors import HarnessError

QUICK = t.TeacherOptions(epochs=5, warmup_epochs=1, batch_size=16)


@pytest.fixture
def few_digits(monkeypatch):
    train, train_labels, test, test_labels = digits_split()
    few = (train[:48], train_labels[:48], test[:20], test_labels[:20])
    monkeypatch.setattr(t, "digits_split", lambda: few)


def test_learning_rate_rises_then_falls_to_zero():
    options = t.TeacherOptions(lr=1.0, epochs=10, warmup_epochs=2)
    rates = [t.learning_rate(options, x) for x in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_augmentation_without_amounts_changes_nothing_and_with_them_moves_little():
    images = digits_split()[0][:8]
    still = t.TeacherOptions(max_turn_degrees=0, max_scale=0, max_shift_pixels=0)
    torch.testing.assert_close(t.augment(images, still), images, atol=1e-4, rtol=0)
    moved = t.augment(images, t.TeacherOptions())
    assert moved.shape == images.shape and not torch.allclose(moved, images, atol=0.1)
    assert ((moved - images).mean((1, 2, 3)).abs() < 0.2).all(), "the digit must stay in the picture"


def test_shift_is_in_pixels():
    image = torch.zeros(64, 1, 28, 28)
    image[:, :, 14, 14] = 1
    options = t.TeacherOptions(max_turn_degrees=0, max_scale=0, max_shift_pixels=3)
    places = t.augment(image, options).flatten(1).argmax(1)
    distance = torch.stack([places // 28, places % 28]) - 14
    assert distance.abs().max() == 3


def test_training_learns_and_repeats_bit_for_bit(few_digits):
    (first, rows), (again, _) = t.train_teacher(QUICK), t.train_teacher(QUICK)
    assert rows[-1]["loss"] < rows[0]["loss"] and len(rows) == 5
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not models.is_geluless(first) and not first.training


def test_program_writes_checkpoint_log_and_record(few_digits, tmp_path, capsys):
    path = tmp_path / "teacher.safetensors"
    assert t.main(["--out", str(path), "--epochs", "5"]) == 0
    _, meta = models.load_model(path)
    record = json.loads(path.with_suffix(".json").read_text())
    rows = list(csv.DictReader(path.with_suffix(".csv").read_text().splitlines()))
    assert len(rows) == 5
    assert meta["heldout_accuracy"] == record["heldout_accuracy"] == float(rows[-1]["heldout_accuracy"])
    with pytest.raises(HarnessError, match="--epochs"):
        t.main(["--out", str(path), "--epochs", "4"])


def test_committed_teacher_agrees_with_its_record():
    record = json.loads(models.MICRO_TEACHER.with_suffix(".json").read_text())
    rows = list(csv.DictReader(models.MICRO_TEACHER.with_suffix(".csv").read_text().splitlines()))
    meta = models.load_checkpoint(models.MICRO_TEACHER)[1]
    assert record["heldout_accuracy"] == float(rows[-1]["heldout_accuracy"]) == meta["heldout_accuracy"] >= 97.0
    assert record["options"]["epochs"] == len(rows)

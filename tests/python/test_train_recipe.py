"""train.py computes what it says: the recipe written out plainly, the order of the images, modes and precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from quant_helpers import one_thread
from torch.utils.data import Dataset, Subset

from pyharness import train as t
from pyharness.config import MICRO_DIGITS
from pyharness.data import DigitsDataset, procedural_set
from pyharness.errors import CheckpointError
from pyharness.models import create_model

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MICRO = MICRO_DIGITS.name


class Doubles(Dataset):
    """The first training digits in float64, where what two ways of summing round away does not grow."""

    def __init__(self, count: int) -> None:
        self.digits = Subset(DigitsDataset(train=True), range(count))

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int):
        image, label = self.digits[index]
        return image.double(), label


def test_the_weights_and_the_log_are_those_of_the_recipe_written_out(tmp_path):
    """42 digits in batches of 8, two of an epoch left over: AdamW, warm-up and half a cosine, smoothed labels, gradients
    clipped to a norm that most exceed. Only the order of the images is the program's own."""
    options = t.TrainingOptions(
        epochs=2, batch_size=8, lr=2e-3, weight_decay=0.2, warmup_epochs=0.7, label_smoothing=0.3, max_norm=0.5, seed=4
    )
    model, images = create_model(MICRO, seed=4).double(), Doubles(42)
    expected = copy.deepcopy(model)
    run = t.Training(model, MICRO, images, images, options, tmp_path, eval_every=4, eval_images=12)
    assert run.run() and run.step == 10

    named = list(expected.named_parameters())
    plain = [p for name, p in named if p.ndim < 2 or "relative_position" in name]
    decayed = [p for name, p in named if not (p.ndim < 2 or "relative_position" in name)]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.2}, {"params": plain, "weight_decay": 0.0}])
    norms, losses, rates = [], [], []
    for step in range(10):
        epoch, within = divmod(step, 5)
        batch = t.epoch_order(42, 4, epoch)[8 * within : 8 * within + 8].tolist()
        x, y = torch.stack([images[i][0] for i in batch]), torch.tensor([images[i][1] for i in batch])
        done = (step + 1) / 5
        rates.append(2e-3 * (done / 0.7 if done < 0.7 else 0.5 * (1 + math.cos(math.pi * (done - 0.7) / 1.3))))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        logs = expected(x).log_softmax(1)
        loss = -(0.7 * logs.gather(1, y[:, None]).mean() + 0.3 * logs.mean())
        optimizer.zero_grad()
        loss.backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for _, p in named)))
        for _, p in named:
            p.grad *= min(1.0, 0.5 / norms[-1])
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(norm > 0.6 for norm in norms) > 5, "the clipping must matter"
    found = run.model.state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")

    assert [(row["step"], row["eval_images"]) for row in run.rows] == [(4, 12), (8, 12), (10, 42)]
    means = [sum(losses[a:b]) / (b - a) for a, b in ((0, 4), (4, 8), (8, 10))]
    assert [row["loss"] for row in run.rows] == pytest.approx(means, abs=2e-5)
    assert [row["lr"] for row in run.rows] == pytest.approx([rates[3], rates[7], 0], abs=1e-8)
    with torch.no_grad():
        right = sum(int(expected.eval()(image[None]).argmax()) == label for image, label in images)
    _, result = run.finish()
    assert result == {"heldout_accuracy": round(100 * right / 42, 3), "heldout_images": 42}


def test_every_epoch_has_its_own_order():
    orders = [t.epoch_order(50, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    torch.manual_seed(9)
    assert t.epoch_order(50, 0, 0).tolist() == orders[0]


@pytest.mark.parametrize(("size", "limit"), [(50_000, 2000), (50_000, 1999), (101, 100), (7, 7), (7, 100), (5, 1)])
def test_a_row_of_the_log_is_over_images_from_everywhere(size, limit):
    found = t.evaluation_indices(size, limit).tolist()
    assert len(found) == min(size, limit) and found == sorted(set(found)) and 0 <= found[0] and found[-1] < size
    stretch = size / len(found)
    assert all(abs(index - i * stretch) <= stretch + 1 for i, index in enumerate(found))
    if size == 50_000:  # ImageNet's: 50 images of each of 1000 classes, in order
        assert len({index // 50 for index in found}) == 1000
        assert len({index % 50 for index in found}) == 50, "not always the same of a class"
    torch.manual_seed(3)
    assert t.evaluation_indices(size, limit).tolist() == found, "the same for each row and run"


@pytest.mark.parametrize("kind", ["digits", "procedural"])
def test_the_images_of_a_row_and_of_the_last_one(tmp_path, kind):
    digits = Subset(DigitsDataset(train=True), range(16))
    heldout = DigitsDataset(train=False) if kind == "digits" else procedural_set("procedural:classes=10,val=40", "val", create_model(MICRO))
    batches = list(t.evaluation_batches(heldout, 4, 10, 0, torch.device("cpu")))
    indices = t.evaluation_indices(len(heldout), 10).tolist()
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.tensor([heldout[i][1] for i in indices]))
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), torch.stack([heldout[i][0] for i in indices]))
    options = t.TrainingOptions(epochs=2, batch_size=8, warmup_epochs=0)
    run = t.Training(create_model(MICRO), MICRO, digits, Subset(heldout, range(40)), options, tmp_path, eval_every=3, eval_images=10)
    assert run.run() and [row["eval_images"] for row in run.rows] == [10, 40]


class Draws(Dataset):
    """What an image's transforms would draw."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int):
        return torch.rand(1), index


def test_batches_are_full_and_an_images_crop_is_another_each_epoch():
    options = t.TrainingOptions(batch_size=4, seed=2)

    def epoch(number, skip=0):
        batches = list(t.training_batches(Draws(), options, number, skip, 0, torch.device("cpu")))
        assert all(len(labels) == 4 for _, labels in batches) and len(batches) == 5 - skip
        images, labels = (torch.cat(parts).flatten() for parts in zip(*batches))
        return dict(zip(labels.tolist(), images.tolist()))

    first, second = epoch(0), epoch(1)
    assert len(set(first.values())) == len(first) == 20
    assert all(first[i] != second[i] for i in first.keys() & second.keys())
    torch.manual_seed(1)
    assert epoch(0, skip=2) == dict(list(first.items())[8:])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_modes_and_precision_of_training_and_evaluation(tmp_path, precision):
    options = t.TrainingOptions(epochs=2, batch_size=8, warmup_epochs=0, precision=precision)
    model, digits, seen = create_model(MICRO), Subset(DigitsDataset(train=True), range(16)), []
    model.register_forward_pre_hook(lambda m, _: seen.append((m.training, torch.is_autocast_enabled("cpu"))))
    assert t.Training(model, MICRO, digits, Subset(digits, range(8)), options, tmp_path, eval_every=1).run()
    assert seen == [(True, precision == "bf16"), (False, precision == "bf16")] * 4


def test_a_state_of_another_geometry_or_set_is_refused(tmp_path):
    options = t.TrainingOptions(epochs=2, batch_size=8, warmup_epochs=0)
    digits = Subset(DigitsDataset(train=True), range(16))
    assert not t.Training(create_model(MICRO), MICRO, digits, digits, options, tmp_path).run(max_seconds=0)
    for change, message in (
        ((create_model(MICRO, num_classes=7), digits), "model was"),
        ((create_model(MICRO), Subset(digits, range(8))), "training images was 16, now 8"),
    ):
        with pytest.raises(CheckpointError, match=message):
            t.Training(change[0], MICRO, change[1], digits, options, tmp_path).run()

"""The procedural set: it repeats, its geometry is right, it varies where it should, and simple statistics fail on it."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from pyharness import procedural as p
from pyharness.config import MICRO_DIGITS, SwinConfig
from pyharness.data import get_dataset, make_loader
from pyharness.errors import DataError
from pyharness.models import create_model, model_from_config

ROUNDING = 2e-4
"""Pixels are float32 sums of some tens of terms, multiplied by up to 112 (half the size) at an edge."""

FIRST_QUARTERS = [
    [0.55404, 0.62175, 0.56898, 0.61621],
    [0.37759, 0.34966, 0.36923, 0.33647],
    [0.49516, 0.45635, 0.48773, 0.43181],
    [0.39258, 0.35723, 0.40096, 0.36349],
]
"""Mean of the upper left, upper right, lower left and lower right quarter of four images, red channel, at 32x32."""


def quarters() -> list[list[float]]:
    images, _ = p.render([0, 1, 99_999, 2**31 - 1], seed=3, split="val", size=32)
    return F.adaptive_avg_pool2d(images[:, 0], 2).flatten(1).tolist()


def test_images_are_the_committed_ones():
    """Another processor, process or version must not give other images: trained models would be of another set."""
    torch.testing.assert_close(torch.tensor(quarters()), torch.tensor(FIRST_QUARTERS), atol=ROUNDING, rtol=0)


def test_another_process_draws_the_same_bits(repository):
    program = "from pyharness import procedural as p; i, y = p.render(range(7), size=40); print(i.double().sum().item(), y.tolist())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    images, labels = p.render(range(7), size=40)
    assert done.stdout.strip() == f"{images.double().sum().item()} {labels.tolist()}"


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (33, 3), (224, 3)])
def test_an_image_does_not_depend_on_its_batch(size, channels):
    options = {"size": size, "channels": channels, "split": "val"}
    together, labels = p.render([5, 901, 17, 6], **options)
    for place, index in enumerate((5, 901, 17, 6)):
        alone, label = p.render([index], **options)
        torch.testing.assert_close(alone[0], together[place], atol=ROUNDING, rtol=0)
        assert label[0] == labels[place]
    assert together.shape == (4, channels, size, size) and together.min() >= 0 and together.max() <= 1


def test_seed_split_and_index_each_make_another_image():
    base = p.render([3], size=28)[0]
    for other in (p.render([4], size=28), p.render([3], size=28, seed=1), p.render([3], size=28, split="val")):
        assert (other[0] - base).abs().mean() > 0.05


def test_labels_are_balanced_and_not_periodic():
    labels = p.labels_of(torch.arange(3000), 100)
    assert labels.bincount().tolist() == [30] * 100
    assert len(labels[::100].unique()) > 15, "every 100th image must not be of one class"


def test_classes_are_all_pairs_and_any_first_ones_need_both():
    names = [p.class_name(c) for c in range(p.MAX_CLASSES)]
    assert len(set(names)) == p.MAX_CLASSES == 256
    for part in (0, 1):
        shared = [name.split("-")[part] for name in names[:100]]
        assert max(map(shared.count, shared)) <= 7, "a shape or a texture alone must not give the class away"


def test_random_numbers_are_uniform_and_unrelated():
    u = p._uniforms(p._keys(torch.arange(4000), 0, "train"), p._UNIFORMS)
    # The mean of 4000 uniform numbers has the deviation 1 / sqrt(12 * 4000) = 0.0046; 5 of them, over 96 columns.
    assert (u.mean(0) - 0.5).abs().max() < 5 * 0.0046
    assert (u.std(0) - 12**-0.5).abs().max() < 0.02
    correlation = torch.corrcoef(torch.cat([u[:-1].T, u[1:].T]))
    assert (correlation - torch.eye(2 * p._UNIFORMS)).abs().max() < 6 / math.sqrt(4000)


AREAS = {
    "disc": math.pi,
    "triangle": 3 * math.sqrt(3) / 4,
    "square": 2.0,
    "pentagon": 2.5 * math.sin(2 * math.pi / 5),
    "star5": 5 * 0.45 * math.sin(math.pi / 5),
    "gear8": 8 * 0.68 * math.sin(math.pi / 8),
    "star4": 4 * 0.36 * math.sin(math.pi / 4),
    "ellipse": math.pi * 0.45,
    "ring": math.pi * (1 - 0.62**2),
    "half_disc": math.pi / 2,
    "flower3": math.pi * (0.74**2 + 0.26**2 / 2),
    "flower6": math.pi * (0.84**2 + 0.16**2 / 2),
}
"""Area at radius 1. A flower's is the integral of r^2 / 2 over r = 1 - a + a cos(n angle)."""


@pytest.mark.parametrize("name", AREAS)
def test_shapes_have_their_area_wherever_they_lie(name):
    size = 200
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    one = torch.ones(1, 1, 1)
    place = (0.1 * one, -0.2 * one, 0.6 * one, 1.0 * one, 0.15 * one)
    cover, _, _ = p._shape(axis.view(1, 1, -1), axis.view(1, -1, 1), *place, torch.tensor([p.SHAPES.index(name)]))
    area = float(cover.sum()) * (2 / size) ** 2 / 0.6**2
    assert area == pytest.approx(AREAS[name], rel=0.03)


def test_textures_differ_from_each_other():
    axis = (torch.arange(64) + 0.5) / 32 - 1
    x, y = axis.view(1, 1, -1).expand(1, 64, 64), axis.view(1, -1, 1).expand(1, 64, 64)
    away, angle = torch.hypot(x, y), torch.atan2(y, x)
    drawn = []
    for row in range(len(p.TEXTURES)):
        draw = p._Draw(p._uniforms(torch.tensor([77]), p._UNIFORMS))
        drawn.append(p._texture(draw, x, y, away, angle, torch.tensor(4.0), 0.6, torch.tensor([row])))
    for a in range(len(drawn)):
        for b in range(a):
            assert (drawn[a] - drawn[b]).abs().mean() > 0.08, (p.TEXTURES[a], p.TEXTURES[b])


def test_everything_but_the_class_varies():
    """Images of one class: no pixel is the same in all of them, and their mean is a grey blur."""
    labels = p.labels_of(torch.arange(6400), 100)
    images, _ = p.render((labels == 42).nonzero().flatten(), size=32)
    assert len(images) == 64
    assert images.std(0).min() > 0.1, "place, colours and background must reach every pixel"
    assert images.mean(0).std() < 0.06
    grey = images.mean(1)
    assert (grey.amax((1, 2)) - grey.amin((1, 2))).min() > 0.25, "something is to be seen in every image"


def test_pixels_and_colours_alone_do_not_tell_the_class(seed):
    """Nearest class mean on 16x16 pixels and on colours. 20 classes, chance 5 %; of 400 images the deviation is 1.1
    points, so 5 of them above chance is 10.5 %. scripts/procedural_report.py measures more and finds as little."""
    train, labels = p.render(range(1000), size=28, classes=20)
    test, truth = p.render(range(400), size=28, classes=20, split="val")
    for look in (lambda x: F.adaptive_avg_pool2d(x, 16).flatten(1), _colours):
        means = torch.stack([look(train)[labels == c].mean(0) for c in range(20)])
        right = (torch.cdist(look(test), means).argmin(1) == truth).float().mean()
        assert right < 0.105


def _colours(images):
    codes = ((images * 4).long().clamp(max=3) * torch.tensor([16, 4, 1]).view(1, 3, 1, 1)).sum(1).flatten(1)
    return torch.stack([code.bincount(minlength=64) for code in codes]).float()


def test_a_word_names_the_set():
    assert p.ProceduralSpec.parse("procedural") == p.ProceduralSpec(100, None, 100_000, 10_000, 0)
    full = p.ProceduralSpec.parse("procedural:classes=7,size=56,train=20,val=10,seed=5")
    assert full == p.ProceduralSpec(7, 56, 20, 10, 5)
    assert p.is_procedural("procedural:x") and not p.is_procedural("/data/procedural") and not p.is_procedural(None)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("procedural:classes=257", "classes must be from 2 to 256, found 257"),
        ("procedural:size=8", "size must be from 16"),
        ("procedural:colour=3", "'colour=3' is not understood"),
        ("procedural:classes", "'classes' is not understood"),
        ("procedural:val=1,val=2", "'val=2' is not understood"),
        ("procedural:seed=-1", "'seed=-1' is not understood"),
    ],
)
def test_a_wrong_word_is_explained(word, message):
    with pytest.raises(DataError, match=message):
        p.ProceduralSpec.parse(word)


def test_a_seed_whose_splits_share_random_numbers_is_refused():
    """Seed 37 is the first one whose held-out images are, in another order, drawn from the training images' numbers."""
    train, val = (set(p._keys(torch.arange(100_000), 37, split).tolist()) for split in p.SPLITS)
    assert len(train & val) > 10_000
    with pytest.raises(DataError, match="seed=37, some of the 10000 held-out images .* give another seed"):
        p.ProceduralSpec.parse("procedural:seed=37")
    p.ProceduralSpec.parse("procedural:seed=37,train=1000,val=1000")
    for seed in range(37):
        p.ProceduralSpec(seed=seed)


def test_whether_keys_meet_is_exact():
    for first in range(1, 14):
        for second in range(1, 14):
            for difference in range(20):
                shared = {i ^ difference for i in range(first)} & set(range(second))
                assert p._meet(first, second, difference) == bool(shared), (first, second, difference)


def test_any_model_takes_it_at_its_own_size_and_channels():
    grey = create_model(MICRO_DIGITS.name)
    train = get_dataset("procedural:classes=10,train=30,val=20", MICRO_DIGITS.name, train=True, model=grey)
    assert (len(train), train[29][0].shape) == (30, (1, 28, 28))
    with pytest.raises(IndexError):
        train[30]
    wide = SwinConfig("swin_x", (56, 56), 4, 3, 12, 32, (1, 1), (1, 2), (7, 7))
    colour = model_from_config(wide)
    heldout = get_dataset("procedural:classes=12,size=56,val=20", "swin_x", train=False, model=colour)
    images, labels = next(iter(make_loader(heldout, 20)))
    raw, truth = p.render(range(20), split="val", size=56, classes=12)
    expected = (raw - heldout.mean) / heldout.std
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    assert torch.equal(labels, truth) and heldout.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert heldout[4][1] == truth[4]
    with pytest.raises(DataError, match="takes 56x56"):
        get_dataset("procedural:classes=12,size=64", "swin_x", train=False, model=colour)
    with pytest.raises(DataError, match="has 100 classes, the model has 12"):
        get_dataset("procedural", "swin_x", train=False, model=colour)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_images():
    """Its sines and square roots round otherwise; a pixel on an edge multiplies that by half the size."""
    cpu, labels = p.render(range(40), size=64)
    cuda, same = p.render(range(40), size=64, device="cuda")
    torch.testing.assert_close(cuda.cpu(), cpu, atol=2e-3, rtol=0)
    assert torch.equal(same.cpu(), labels)

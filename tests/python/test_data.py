"""The digits, image folders, and loaders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pyharness import data
from pyharness.config import MICRO_DIGITS
from pyharness.errors import DataError
from pyharness.models import create_model, model_from_config

TRAIN_BEGINS = [765, 1439, 1436, 333, 1559, 847, 360, 54]
TEST_BEGINS = [1107, 822, 876, 376, 329, 1242, 639, 1051]
"""First indices of the committed split."""


def test_digits_split_is_whole_stratified_and_normalized():
    train, train_labels, test, test_labels = data.digits_split()
    assert train.shape == (1200, 1, 28, 28) and test.shape == (597, 1, 28, 28)
    assert train.dtype == test.dtype == torch.float32 and train_labels.dtype == torch.int64
    assert abs(train.mean()) < 0.01 and abs(train.std() - 1) < 0.01
    totals = train_labels.bincount() + test_labels.bincount()
    assert ((train_labels.bincount() - totals * 1200 / 1797).abs() < 1).all()


def test_no_held_out_image_is_trained_on():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = data._stratified_split(digits.target, data.DIGITS_TRAIN)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(1797))


def test_the_split_is_the_committed_one():
    """The teacher's held-out accuracy means something only on the split it was trained without."""
    from sklearn.datasets import load_digits

    train, test = data._stratified_split(load_digits().target, data.DIGITS_TRAIN)
    assert train[:8].tolist() == TRAIN_BEGINS and test[:8].tolist() == TEST_BEGINS


def test_digits_are_the_scikit_learn_images_scaled():
    from sklearn.datasets import load_digits

    digits = load_digits()
    _, test = data._stratified_split(digits.target, data.DIGITS_TRAIN)
    image, label = data.DigitsDataset(train=False)[11]
    assert label == digits.target[test[11]]
    pixels = image[0] * data.DIGITS_STD + data.DIGITS_MEAN
    # Bilinear at 3.5 times the size: output (i, j) lies at input (i + 0.5) / 3.5 - 0.5; 12 is at 3.071.., 13 at 3.357..
    source = digits.images[test[11]] / 16
    row = (12 + 0.5) / 3.5 - 0.5 - 3
    column = (13 + 0.5) / 3.5 - 0.5 - 3
    square = source[3:5, 3:5]
    expected = np.array([1 - row, row]) @ square @ np.array([1 - column, column])
    assert abs(float(pixels[12, 13]) - expected) < 1e-5


@pytest.fixture
def folder(tmp_path):
    """Three classes with two images of distinct grey in train/, one in val/."""
    for split, count in (("train", 2), ("val", 1)):
        for c, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                grey = np.full((40, 50, 3), 40 * c + 10 * i + 20, dtype=np.uint8)
                Image.fromarray(grey).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.fixture(scope="module")
def small_swin():
    return create_model("swin_tiny_patch4_window7_224", num_classes=3)


def test_image_folder_goes_through_the_models_transforms(folder, small_swin):
    dataset = data.imagefolder(folder, "val", small_swin)
    assert len(dataset) == 3
    image, label = dataset[2]
    assert image.shape == (3, 224, 224) and label == 2
    expected = (100 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(image.amin((1, 2)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(image.amax((1, 2)), expected, atol=1e-5, rtol=0)


def test_training_transforms_keep_the_colours(folder, small_swin):
    dataset = data.imagefolder(folder, "train", small_swin, is_training=True)
    plain = data.imagefolder(folder, "train", small_swin)
    assert len(dataset) == 6
    torch.testing.assert_close(dataset[3][0], plain[3][0], atol=1e-5, rtol=0)


def test_grey_models_read_folders_in_grey(folder):
    model = create_model(MICRO_DIGITS.name, num_classes=3)
    with pytest.raises(DataError, match="3 classes, the model has 10"):
        data.get_dataset(folder, MICRO_DIGITS.name, train=False)
    image, _ = data.get_dataset(folder, MICRO_DIGITS.name, train=False, model=model)[0]
    assert image.shape == (1, 28, 28)


def test_folder_mistakes_are_explained(folder, small_swin, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        data.imagefolder(folder / "nowhere", "val", small_swin)
    (tmp_path / "empty" / "val").mkdir(parents=True)
    with pytest.raises(DataError, match="no class folders"):
        data.imagefolder(tmp_path / "empty", "val", small_swin)
    (tmp_path / "empty" / "val" / "ant").mkdir()
    with pytest.raises(DataError, match="no image found"):
        data.imagefolder(tmp_path / "empty", "val", small_swin)
    with pytest.raises(DataError, match="3 classes, the model has 10"):
        data.imagefolder(folder, "val", create_model(MICRO_DIGITS.name))
    two_channels = model_from_config(MICRO_DIGITS.__class__(**{**MICRO_DIGITS.__dict__, "in_chans": 2}))
    with pytest.raises(DataError, match="1 or 3 channels"):
        data.imagefolder(folder, "val", two_channels)


def test_get_dataset_defaults_to_the_digits_of_the_micro_model():
    assert len(data.get_dataset(None, MICRO_DIGITS.name, train=True)) == 1200
    assert len(data.get_dataset(None, MICRO_DIGITS.name, train=False)) == 597
    with pytest.raises(DataError, match="--data"):
        data.get_dataset(None, "swin_tiny_patch4_window7_224", train=False)


def test_loader_keeps_every_image_and_its_order_follows_the_seed():
    dataset = data.DigitsDataset(train=False)
    labels = torch.cat([y for _, y in data.make_loader(dataset, 64)])
    assert torch.equal(labels, dataset.labels)
    first, again, other = (
        torch.cat([y for _, y in data.make_loader(dataset, 64, shuffle=True, seed=seed)]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.sort().values, labels.sort().values)

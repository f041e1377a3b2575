"""Image data: scikit-learn's digits, which need no download, and ImageNet-style folders.

The digits are 1797 real 8x8 grey-scale images of hand-written digits, scaled here to 28x28 for the micro Swin.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyharness.config import MICRO_DIGITS
from pyharness.errors import DataError
from pyharness.models import create_model

DIGITS_TRAIN = 1200
DIGITS_SIZE = MICRO_DIGITS.img_size
DIGITS_MEAN = 0.305
"""Mean and standard deviation of the 1200 training images' pixels at 28x28, in [0, 1]."""
DIGITS_STD = 0.325


@functools.cache
def digits_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train_images f32 [1200, 1, 28, 28], train_labels i64 [1200], test_images f32 [597, 1, 28, 28], test_labels).

    The split is the same on every machine, and keeps the classes' shares. It is not by writer: people who wrote
    training images also wrote held-out ones. Scaled bilinearly and normalized. Do not write to the tensors.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    pixels = torch.from_numpy(digits.images.astype(np.float32) / 16.0).unsqueeze(1)
    images = torch.nn.functional.interpolate(pixels, size=DIGITS_SIZE, mode="bilinear", align_corners=False)
    images = (images - DIGITS_MEAN) / DIGITS_STD
    train, test = _stratified_split(digits.target, DIGITS_TRAIN)
    return images[train], labels[train], images[test], labels[test]


def _stratified_split(labels: np.ndarray, n_train: int) -> tuple[Tensor, Tensor]:
    """Indices of `n_train` and of the other samples; each class is split in the same proportion, rounded down, and the
    classes with the largest remainders give one more."""
    random = np.random.RandomState(0)  # the legacy generator: its stream is frozen across versions of NumPy
    classes = [random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    shares = np.array([len(members) * n_train / len(labels) for members in classes])
    counts = shares.astype(int)
    for c in np.argsort(counts - shares, kind="stable")[: n_train - counts.sum()]:
        counts[c] += 1
    train = np.concatenate([members[:count] for members, count in zip(classes, counts)])
    test = np.concatenate([members[count:] for members, count in zip(classes, counts)])
    return torch.from_numpy(random.permutation(train)), torch.from_numpy(random.permutation(test))


class DigitsDataset(Dataset):
    """scikit-learn's digits as (image f32 [1, 28, 28], label): the 1200 training or the 597 held-out images."""

    classes = [str(digit) for digit in range(10)]

    def __init__(self, train: bool) -> None:
        train_images, train_labels, test_images, test_labels = digits_split()
        self.images = train_images if train else test_images
        self.labels = train_labels if train else test_labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def data_config(model: torch.nn.Module) -> dict[str, Any]:
    """timm's data configuration of a timm model (mean, std, crop, interpolation), at the model's own input size.

    A model of one channel takes grey-scale images, with the mean of the three channels' constants.
    """
    from timm.data import resolve_data_config

    in_chans = model.patch_embed.proj.in_channels
    size = {"input_size": (in_chans, *model.patch_embed.img_size)}
    cfg = resolve_data_config(size, pretrained_cfg=getattr(model, "pretrained_cfg", None) or {})
    if in_chans == 1:
        cfg["mean"] = (sum(cfg["mean"]) / len(cfg["mean"]),)
        cfg["std"] = (sum(cfg["std"]) / len(cfg["std"]),)
    elif in_chans != 3:
        raise DataError(f"image folders give images of 1 or 3 channels; the model takes {in_chans}")
    return cfg


def imagefolder(root: str | Path, split: str, model: torch.nn.Module, is_training: bool = False) -> Dataset:
    """ImageNet-style folder `root/split/<class>/<image>` through the transforms of the timm `model`.

    `is_training` selects random crops and flips (no colour changes); otherwise the model's own resize and centre crop.
    Classes are the sorted folder names. DataError where a folder is missing or empty, or where the number of classes
    is not the model's.
    """
    from timm.data import ImageDataset, create_transform

    folder = Path(root) / split
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; an image folder is laid out as {root}/train/<class>/ and {root}/val/<class>/"
        )
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise DataError(f"{folder}: has no class folders; images belong in {folder}/<class>/")
    cfg = data_config(model)
    if is_training:
        transform = create_transform(**cfg, is_training=True, color_jitter=0.0)
    else:
        transform = create_transform(**cfg)
    try:
        dataset = ImageDataset(
            str(folder), transform=transform, input_img_mode="L" if cfg["input_size"][0] == 1 else "RGB"
        )
    except RuntimeError:
        raise DataError(f"{folder}: no image found in its class folders; .jpg, .jpeg and .png are read") from None
    classes = len(dataset.reader.class_to_idx)
    if model.num_classes and classes != model.num_classes:
        raise DataError(
            f"{folder}: has {classes} classes, the model has {model.num_classes}; the folder must be of the data set "
            "that the weights were trained on"
        )
    return dataset


def get_dataset(
    data: str | Path | None,
    model_name: str,
    train: bool,
    *,
    model: torch.nn.Module | None = None,
    augment: bool = False,
) -> Dataset:
    """The data set a program works on: the digits for the micro model where `data` is None, else the folder `data`.

    `train` selects training or held-out images; `augment` random crops for image folders (the digits have none).
    Image folders go through the transforms of the timm `model`, by default the one that `model_name` stands for.
    """
    if data is None:
        if model_name != MICRO_DIGITS.name:
            raise DataError(
                f"{model_name} needs images: give an ImageNet-style folder (--data DIR, with train/ and val/)"
            )
        return DigitsDataset(train)
    if model is None:
        model = create_model(model_name)
    return imagefolder(data, "train" if train else "val", model, is_training=augment)


def make_loader(
    dataset: Dataset, batch_size: int, *, shuffle: bool = False, seed: int = 0, workers: int = 0
) -> DataLoader:
    """Batches of (images f32 [B, C, H, W], labels i64 [B]); the last may be smaller. `seed` fixes a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=shuffle, generator=generator, num_workers=workers)

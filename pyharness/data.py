"""Image data: scikit-learn's digits, the procedural set, and images in folders and archives.

The digits are 1797 real 8x8 grey-scale images of hand-written digits, scaled here to 28x28 for the micro Swin. What
`--data` may name is told by `DATA_HELP`. An image that cannot be read ends no run: training takes the next one that
can, evaluation leaves it out, both say which it was, and where there are too many, the result is refused.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from pyharness.atomic import atomic_path
from pyharness.config import MICRO_DIGITS
from pyharness.errors import ClassesError, DataError, HarnessError
from pyharness.image_input import CENTER, fault_of
from pyharness.models import create_model, noted_classes, noted_input
from pyharness.procedural import MAX_CLASSES, ProceduralDataset, ProceduralSpec, is_procedural
from pyharness.signals import SignalSafeLoader
from pyharness.training import derived_seed, report, report_once

if TYPE_CHECKING:
    from PIL import Image
    from timm.data.readers.reader import Reader

SCHEMES = ("folder", "tar", "wds", "parquet")
"""What may stand before a colon and a path, to say how the images there are kept; without, the files say it."""
DATA_HELP = (
    "folder with train/ and val/, each holding a folder per class, tar files, WebDataset shards or parquet files; or "
    "procedural[:classes=100,size=224,train=100000,val=10000,seed=0], images computed as they are needed"
)
CORRUPT = -1
"""The label of an image that could not be read; it counts neither as right nor as wrong."""
MAX_CORRUPT_SHARE = 0.01
"""The share of unreadable images beyond which a result is refused."""
_NAMED_AT_MOST = 5
_READ, _UNREADABLE = 1, 2
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError)
"""What Pillow raises for damaged files; an unknown kind of file is an OSError."""

DIGITS_TRAIN = 1200
DIGITS_SIZE = MICRO_DIGITS.img_size
DIGITS_MEAN = 0.305
"""Mean and standard deviation of the 1200 training images' pixels at 28x28, in [0, 1]."""
DIGITS_STD = 0.325
IMAGE_CHANNELS = (1, 3)
"""Channels of a model that images in files are read for, in grey or in colour."""


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
    shuffle = np.random.RandomState(0)  # the legacy generator: its stream is frozen across versions of NumPy
    classes = [shuffle.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    shares = np.array([len(members) * n_train / len(labels) for members in classes])
    counts = shares.astype(int)
    for c in np.argsort(counts - shares, kind="stable")[: n_train - counts.sum()]:
        counts[c] += 1
    train = np.concatenate([members[:count] for members, count in zip(classes, counts)])
    test = np.concatenate([members[count:] for members, count in zip(classes, counts)])
    return torch.from_numpy(shuffle.permutation(train)), torch.from_numpy(shuffle.permutation(test))


class DigitsDataset(Dataset):
    """scikit-learn's digits as (image f32 [1, 28, 28], label): the 1200 training or the 597 held-out images, normalized
    by `mean` and `std`."""

    classes = [str(digit) for digit in range(10)]

    def __init__(self, train: bool, mean: float = DIGITS_MEAN, std: float = DIGITS_STD) -> None:
        train_images, train_labels, test_images, test_labels = digits_split()
        self.images = train_images if train else test_images
        if (mean, std) != (DIGITS_MEAN, DIGITS_STD):
            self.images = (self.images * DIGITS_STD + DIGITS_MEAN - mean) / std
        self.labels = train_labels if train else test_labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def data_config(model: torch.nn.Module) -> dict[str, Any]:
    """timm's data configuration of a timm model (mean, std, crop, interpolation), at the model's own input size.

    What the model's file says of them (`models.note_data`) goes before what timm says of its name; a crop_pct without a
    crop_mode is of timm's centre crop. A model of one channel takes grey-scale images, with the mean of the three
    channels' constants. DataError where the file says what no image can be prepared by.
    """
    from timm.data import resolve_data_config

    in_chans = model.patch_embed.proj.in_channels
    size = {"input_size": (in_chans, *model.patch_embed.img_size)}
    cfg = resolve_data_config(size, pretrained_cfg=getattr(model, "pretrained_cfg", None) or {})
    noted = noted_input(model)
    if fault := fault_of(noted):
        raise DataError(
            f'"input" of the meta data of the model\'s file, how its images come in, {fault[0]}; needed is {fault[1]}. '
            "Write it anew: python pyharness/convert.py to-timm FILE OUT, with --interpolation, --crop-pct, --crop-mode"
        )
    cfg |= {key: tuple(noted[key]) for key in ("mean", "std") if key in noted}
    cfg |= {key: noted[key] for key in ("interpolation", "crop_pct") if key in noted}
    if noted.keys() & {"crop_pct", "crop_mode"}:
        cfg["crop_mode"] = noted.get("crop_mode", CENTER)
    if in_chans == 1:
        cfg["mean"] = (sum(cfg["mean"]) / len(cfg["mean"]),)
        cfg["std"] = (sum(cfg["std"]) / len(cfg["std"]),)
    elif in_chans not in IMAGE_CHANNELS:
        raise DataError(f"image folders give images of 1 or 3 channels; the model takes {in_chans}")
    return cfg


class ImageSet(Dataset):
    """(image f32 [C, H, W], label) through the transforms of a timm model, from a reader of timm's kind.

    Where an image cannot be read, `substitute` takes the next that can (of the last, the first), always the same one;
    without it, the image is zeros and the label is `CORRUPT`. What was met is remembered, over all loader processes.
    """

    def __init__(self, reader: Reader, cfg: dict[str, Any], *, is_training: bool, substitute: bool) -> None:
        from timm.data import create_transform

        self.reader, self.substitute = reader, substitute
        self.input_size = tuple(cfg["input_size"])
        self.mode = "L" if self.input_size[0] == 1 else "RGB"
        options = {"is_training": True, "color_jitter": 0.0} if is_training else {}
        self.transform = create_transform(**cfg, **options)
        self.numbers: list[int] | None = None
        """The number of each class of the reader, where it is another than the reader's (`number_as`)."""
        self.met = torch.zeros(len(reader), dtype=torch.uint8).share_memory_()
        """Of every image: 0 where it was not asked for, 1 where it was read, 2 where it could not be."""

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for number in range(index, index + len(self) if self.substitute else index + 1):
            number %= len(self)
            sample = self._read(number)
            if sample is not None:
                return sample
        if self.substitute:
            raise DataError(f"none of the {len(self)} images can be read, as {self.filename(index)}")
        return torch.zeros(self.input_size), CORRUPT

    def _read(self, number: int) -> tuple[Tensor, int] | None:
        from PIL import Image

        try:
            file, label = self.reader[number]
            with file:
                image = _in_eight_bits(Image.open(file)).convert(self.mode)
        except (*_DAMAGE, Image.DecompressionBombError) as error:
            if self.met[number] != _UNREADABLE:
                self.met[number] = _UNREADABLE
                reason = (str(error).splitlines() or [""])[0]
                report(f"warning: {self.filename(number)} cannot be read ({reason})", anywhere=True)
            return None
        if self.met[number] == 0:  # once unreadable it stays so, though the file was mended since
            self.met[number] = _READ
        return self.transform(image), int(label) if self.numbers is None else self.numbers[int(label)]

    def filename(self, index: int) -> str:
        """The image's name in its folder or archive."""
        return self.reader.filename(index)

    def corrupt(self) -> list[int]:
        """The numbers of the images that could not be read so far."""
        return (self.met == _UNREADABLE).nonzero().flatten().tolist()

    def asked(self) -> int:
        """How many different images were asked for so far."""
        return int((self.met != 0).sum())

    def remember(self, met: Tensor | None) -> None:
        """Take over what another process or an earlier run met, `met` of the same images; None: nothing."""
        if met is not None:
            self.met.copy_(torch.maximum(self.met, met))


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """`image`, or in place of 16-bit grey its nearest 8-bit grey: Pillow's own conversion cuts all above 255 off.

    ValueError for wider pixels (32-bit, float), whose range no file tells.
    """
    from PIL import Image

    # Older versions of Pillow open 16-bit PNG files in mode I; other files in that mode may hold any 32-bit numbers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = (np.asarray(image).astype(np.int64) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of Pillow's mode {image.mode}, of no known range; convert it to 8 bits, or to a 16-bit PNG"
        )
    return image


class SeededImages(Dataset):
    """A data set asked by (index, seed): an image's random crop depends on its seed alone, not on what came before."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            torch.manual_seed(seed)
            try:
                return self.dataset[index]
            finally:
                random.setstate(state)


def name_of(dataset: Dataset, index: int) -> str:
    """What to call an image in a message: its file name, else its number."""
    return dataset.filename(index) if isinstance(dataset, ImageSet) else f"image {index}"


def check_corrupt(names: list[str], asked: int, list_path: Path | None, max_share: float = MAX_CORRUPT_SHARE) -> None:
    """Add the `names` of unreadable images to the list in `list_path` (where there are any), and DataError where they
    are more than `max_share` of the `asked` ones. Names that are no UTF-8 are written as the bytes they are."""
    if not names:
        return
    if list_path is not None:
        any_bytes = {"encoding": "utf-8", "errors": "surrogateescape"}
        known = filter(None, list_path.read_text(**any_bytes).split("\n")) if list_path.exists() else []
        with atomic_path(list_path) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in sorted({*known, *names})), **any_bytes)
    if len(names) > max_share * asked:
        more = "" if len(names) <= _NAMED_AT_MOST else ", ..."
        raise DataError(
            f"{len(names)} of {asked} images cannot be read, more than {100 * max_share:g} %: "
            f"{', '.join(names[:_NAMED_AT_MOST])}{more}. Mend the data set, or allow a larger share (--max-corrupt)"
        )


def check_images(dataset: Dataset, list_path: Path | None, max_share: float = MAX_CORRUPT_SHARE) -> None:
    """`check_corrupt` of all images that `dataset` was asked for; of sets without files, nothing."""
    if isinstance(dataset, ImageSet):
        names = [dataset.filename(number) for number in dataset.corrupt()]
        check_corrupt(names, dataset.asked(), list_path, max_share)


def add_max_corrupt(parser: argparse._ActionsContainer) -> None:
    """The argument --max-corrupt; what it holds is for `need_share`."""
    parser.add_argument(
        "--max-corrupt", type=float, default=MAX_CORRUPT_SHARE, metavar="SHARE",
        help="share of unreadable images that is put up with (default: %(default)s)",
    )  # fmt: skip


def need_share(max_corrupt: float) -> None:
    """HarnessError where --max-corrupt is no share."""
    if not 0 <= max_corrupt <= 1:
        raise HarnessError(f"--max-corrupt must be a share from 0 to 1, found {max_corrupt}")


def take_reading_options(args: argparse.Namespace, *positive: str) -> None:
    """HarnessError where --batch, --threads, --workers, --max-corrupt, or the options `positive`, are no use; sets
    PyTorch's threads."""
    from pyharness.measure import need_positive

    need_positive(args, "--batch", "--threads", *positive)
    if args.workers < 0:
        raise HarnessError(f"--workers must be at least 0, found {args.workers}")
    need_share(args.max_corrupt)
    if args.threads:
        torch.set_num_threads(args.threads)


def imagefolder(root: str | Path, split: str, model: torch.nn.Module, is_training: bool = False) -> ImageSet:
    """ImageNet-style folder `root/split/<class>/<image>` through the transforms of the timm `model`.

    `is_training` selects random crops and flips (no colour changes); otherwise the model's own resize and centre crop.
    Classes are the folder names in natural order (2 before 10), as timm has them; names that are equal in it ("1" and
    "01", "a" and "A") are sorted as text. DataError where a folder is missing
    or empty, where the number of classes is not the model's, or where `train` and `val` have other classes.
    """
    reader = open_folder(Path(root), split)
    _check_classes(reader, Path(root), split, "folder")
    return _image_set(reader, str(Path(root) / split), split, model, is_training)


def open_folder(root: Path, split: str) -> Reader:
    """A reader of `root/split/<class>/<image>`."""
    from pyharness.archives import FolderReader, types_text

    folder = root / split
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; an image folder is laid out as {root}/train/<class>/ and {root}/val/<class>/"
        )
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise DataError(f"{folder}: has no class folders; images belong in {folder}/<class>/")
    reader = FolderReader(folder)
    if not len(reader):
        raise DataError(f"{folder}: no image found in its class folders; {types_text()}")
    return reader


def _archive_files(root: Path, split: str, scheme: str | None) -> list[Path]:
    """The tar or parquet files of a split, or `root` itself where it is such a file; empty where there are none that
    `scheme` allows."""
    from pyharness.archives import split_files

    for suffix, kinds in ((".tar", ("tar", "wds")), (".parquet", ("parquet",))):
        if scheme is not None and scheme not in kinds:
            continue
        if root.is_file() and root.suffix == suffix:
            return [root]
        if files := split_files(root, split, suffix):
            return files
    return []


def _open_archives(root: Path, split: str, scheme: str | None) -> Reader | None:
    """A reader of the tar or parquet files of a split; None where there are none and `scheme` asks for none."""
    from pyharness.archives import ParquetReader, TarReader

    files = _archive_files(root, split, scheme)
    if not files:
        if scheme is not None:
            raise DataError(f"{root}: has no {scheme} files for {split}; they belong in {root}/{split}/")
        return None
    suffix, trained_on = files[0].suffix, files == [root] and split == "train"
    no_split = DataError(f"{root}: one file has no split to train on; give the folder of the {suffix} files")
    if suffix == ".parquet":
        if trained_on:
            raise no_split
        return ParquetReader(files)
    reader = TarReader(files, split)
    if trained_on and reader.folder is None:
        raise no_split
    return reader


def _has_classes(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())


def _reads_archives(root: Path, split: str, scheme: str | None) -> bool:
    """Whether archives are looked for: where `scheme` says so, or says nothing and there are no class folders."""
    return scheme != "folder" and (scheme is not None or not _has_classes(root / split))


def open_images(
    data: str, split: str, model: torch.nn.Module, is_training: bool = False, *, labels: bool = True
) -> ImageSet:
    """The images that a `--data` word names, of `split` "train" or "val"; DataError as `imagefolder`.

    Without `labels` their number of classes does not matter, and a folder may hold images at any depth, in its folder
    `split`, or where it has folders of neither split, in itself.
    """
    scheme, colon, path = data.partition(":")
    if not colon or scheme not in SCHEMES:
        scheme, path = None, data
    root = Path(path)
    reader = _open_archives(root, split, scheme) if _reads_archives(root, split, scheme) else None
    if not labels:
        reader = reader or _open_unlabelled(_unlabelled_folder(root, split))
        return ImageSet(reader, data_config(model), is_training=is_training, substitute=split == "train")
    reader = reader or open_folder(root, split)
    _check_classes(reader, root, split, scheme)
    return _image_set(reader, f"{root} ({split})", split, model, is_training)


def _unlabelled_folder(root: Path, split: str) -> Path:
    """Where in `root` the images of a split lie that need no labels. DataError where there is the other split alone."""
    from pyharness.archives import SPLIT_NAMES

    if own := [root / name for name in SPLIT_NAMES[split] if (root / name).is_dir()]:
        return own[0]
    other = "val" if split == "train" else "train"
    for name in SPLIT_NAMES[other]:
        if (root / name).is_dir():
            images = "training" if split == "train" else "held-out"
            raise DataError(
                f"{root}: holds {name}/ but no {split}/; give a folder of {images} images "
                f"({root / name} itself to use those all the same)"
            )
    return root


def _open_unlabelled(folder: Path) -> Reader:
    """A reader of all images below `folder`."""
    from pyharness.archives import FolderReader, types_text

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    reader = FolderReader(folder)
    if not len(reader):
        raise DataError(f"{folder}: no image found in it or below; {types_text()}")
    return reader


def reader_classes(reader: Reader) -> list[str]:
    """The classes' names in the order of their numbers; empty where the labels are numbers."""
    return list(getattr(reader, "classes", None) or getattr(reader, "class_to_idx", None) or ())


def class_names(dataset: Dataset) -> list[str]:
    """The names of the classes of images in files, in the order of their numbers, for a file's meta data; empty where
    the labels are numbers."""
    if not isinstance(dataset, ImageSet):
        return []
    names = [str(name) for name in reader_classes(dataset.reader)]
    return names if dataset.numbers is None else [name for _, name in sorted(zip(dataset.numbers, names))]


def number_as(dataset: Dataset, names: Sequence[str], source: str) -> bool:
    """Number the classes of `dataset`, which `source` names, as `names` does, where these are the names of its classes,
    each once; whether they are. A line says it where that changes a number."""
    found = class_names(dataset)
    if found == list(names):
        return True
    if len(set(found)) != len(found) or sorted(found) != sorted(names):
        return False
    dataset.numbers = [names.index(str(name)) for name in reader_classes(dataset.reader)]
    first = next(number for number, pair in enumerate(zip(found, names)) if pair[0] != pair[1])
    report_once(
        f"note: {source}: its classes are numbered as the model's file has them, by their names: number {first} is "
        f"{names[first]!r}, not {found[first]!r}"
    )
    return True


def read_labels(path: Path, classes: int) -> list[str]:
    """The names of `classes` classes, one a line. HarnessError where the file cannot be read or has another number."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise HarnessError(f"cannot read {path} ({error.strerror}); --labels needs a file of one name a line") from None
    except UnicodeDecodeError:
        raise HarnessError(f"{path} is not text in UTF-8; --labels needs a file of one name a line") from None
    labels = [line.strip() for line in lines]
    while labels and not labels[-1]:
        labels.pop()
    if len(labels) != classes:
        raise HarnessError(
            f"{path}: has {len(labels)} names, the model has {classes} classes; one name a line is needed, in the "
            "classes' order"
        )
    return labels


def add_labels(parser: argparse._ActionsContainer) -> None:
    """The argument --labels of programs that write a model's file; what it holds is for `read_labels`."""
    parser.add_argument(
        "--labels", type=Path, metavar="FILE",
        help="names of the classes to write into the file: a text file, one a line, in their order (default: those of "
        "the model's own file)",
    )  # fmt: skip


def number_of_classes(dataset: Dataset) -> int | None:
    """How many classes a data set has; of labels that are numbers, one more than the greatest. None for kinds that
    nothing here knows."""
    if isinstance(dataset, ImageSet):
        return len(reader_classes(dataset.reader)) or dataset.reader.num_classes
    return len(dataset.classes) if isinstance(dataset, (DigitsDataset, ProceduralDataset)) else None


def _check_classes(reader: Reader, root: Path, split: str, scheme: str | None) -> None:
    """DataError where `root` has the other split too, and classes in it that differ from those of `reader`: each split
    numbers its own, so that labels of one would be wrong in the other."""
    mine = reader_classes(reader)
    if not mine or (root.is_file() and getattr(reader, "folder", None) is None):
        return
    other = "val" if split == "train" else "train"
    try:
        theirs = _classes_of(root, other, scheme, mine)
    except DataError as error:
        report(f"note: {root}: the classes of {split} could not be compared with those of {other} ({error})")
        return
    if not theirs or theirs == mine:
        return
    train, val = (mine, theirs) if split == "train" else (theirs, mine)
    number, (trained, held_out) = next(
        (i, pair) for i, pair in enumerate(itertools.zip_longest(train, val, fillvalue="none")) if pair[0] != pair[1]
    )
    raise DataError(
        f"{root}: class {number} is {trained} in train, {held_out} in val (of {len(train)} and {len(val)} classes); "
        "each split numbers its own, so both need the same classes, with an image in each: rename those that differ, "
        "and leave a class that one split lacks out of the other"
    )


def _classes_of(root: Path, split: str, scheme: str | None, expected: list[str]) -> list[str] | None:
    """The names of a split's classes, in order; None where it is not there or its labels are numbers. Images in folders
    are listed only where the folders' names are not the `expected` ones."""
    from pyharness.archives import FolderReader, open_tar_index, parquet_classes

    folder = root / split
    if _reads_archives(root, split, scheme):
        files = _archive_files(root, split, scheme)
        if not files:
            return None
        return parquet_classes(files[0]) if files[0].suffix == ".parquet" else open_tar_index(files, split).classes
    if not _has_classes(folder):
        return None
    if {entry.name for entry in folder.iterdir() if entry.is_dir()} == set(expected):
        return expected
    return list(FolderReader(folder).class_to_idx)


def _image_set(reader: Reader, source: str, split: str, model: torch.nn.Module, is_training: bool) -> ImageSet:
    dataset = ImageSet(reader, data_config(model), is_training=is_training, substitute=split == "train")
    named = reader_classes(reader)
    classes = number_of_classes(dataset)
    if model.num_classes and (classes != model.num_classes if named else classes > model.num_classes):
        raise ClassesError(
            f"{source}: has {classes} classes, the model has {model.num_classes}; the folder must be of the data set "
            f"that the weights were trained on (train.py --classes {classes} trains a model for it)",
            classes,
        )
    noted = noted_classes(model)
    if not number_as(dataset, noted, source):
        _need_same_numbers(named, noted, source)
        _tell_order(named, source)
    return dataset


def _need_same_numbers(named: list[str], noted: list[str], source: str) -> None:
    """DataError where a class of the images has another number than in the model's file, and the classes are not the
    same ones (`number_as`): each would be taken for another. Names that the other side has not say nothing: one may
    have ImageNet's words, and one its identifiers."""
    times = Counter(noted)
    once = {name: number for number, name in enumerate(noted) if times[name] == 1}
    for number, name in enumerate(named):
        if once.get(name, number) != number:
            raise DataError(
                f"{source}: class {name!r} is number {number} here, and number {once[name]} to the model, as its file "
                "says, and not all names are the same; give the images that it was trained on, or name their classes "
                "as it does"
            )


def _tell_order(classes: list[str], source: str) -> None:
    """Say it where the number of a class is not the one that torchvision would give: accuracy would be wrong without a
    word."""
    from timm.utils.misc import natural_key

    timms, torchvisions = sorted(classes, key=natural_key), sorted(classes)
    if timms != torchvisions:
        first = next(i for i, pair in enumerate(zip(timms, torchvisions)) if pair[0] != pair[1])
        report(
            f"note: {source}: classes are numbered in timm's order, where class {first} is {timms[first]}; a model "
            f"that torchvision's ImageFolder fed has them sorted as text, where it is {torchvisions[first]}"
        )


def procedural_set(data: str, split: str, model: torch.nn.Module, *, labels: bool = True) -> ProceduralDataset:
    """The procedural set that `data` describes, at the size, channels and normalization of the timm `model`. Without
    `labels` its number of classes need not be the model's."""
    spec, cfg = ProceduralSpec.parse(data), data_config(model)
    _, height, width = cfg["input_size"]
    if height != width or spec.size not in (None, height):
        raise DataError(f"{data}: the model takes {height}x{width} images; leave size out, or take another model")
    if labels and model.num_classes and spec.classes != model.num_classes:
        can_be = 2 <= model.num_classes <= MAX_CLASSES
        advice = f"give classes={model.num_classes}, or" if can_be else f"the set can have 2 to {MAX_CLASSES};"
        raise DataError(
            f"{data}: has {spec.classes} classes, the model has {model.num_classes}; {advice} a model that was trained "
            f"on it (train.py --classes {spec.classes})"
        )
    return ProceduralDataset(spec, split, height, cfg["mean"], cfg["std"])


def _is_digits(data: str | Path | None, model_name: str) -> bool:
    """Whether a program that is given `data` works on the digits."""
    return data is None and model_name == MICRO_DIGITS.name


def _digits_normalization(model: torch.nn.Module | None) -> tuple[float, float]:
    """Mean and standard deviation by which the digits go to the micro model: those its file says, else their own."""
    noted = {} if model is None else noted_input(model)
    return noted.get("mean", [DIGITS_MEAN])[0], noted.get("std", [DIGITS_STD])[0]


def input_normalization(data: str | Path | None, model_name: str, model: torch.nn.Module) -> dict[str, Any] | None:
    """How `get_dataset` normalizes the images of `data`, for the meta data of a file (key "input").

    `{"mean": [...], "std": [...]}`, a number per channel: pixels 0..255 are divided by 255, then (x - mean) / std. But
    for the digits also the `"interpolation"` and `"crop_pct"` of timm's configuration of `model`, by which images in
    files are resized and cropped, and where that is no centre crop, the `"crop_mode"` (`image_input`). Without `data`
    the digits' numbers for the micro model, timm's for others. What the model's file says itself goes before either
    (`models.note_data`).
    None where there are no such images: for a model of other channels.
    """
    in_chans = model.patch_embed.proj.in_channels
    if _is_digits(data, model_name):
        mean, std = _digits_normalization(model)
        return {"mean": [mean], "std": [std]} if in_chans == MICRO_DIGITS.in_chans else None
    if in_chans not in IMAGE_CHANNELS:
        return None
    cfg = data_config(model)
    found = {
        "mean": [float(value) for value in cfg["mean"]],
        "std": [float(value) for value in cfg["std"]],
        "interpolation": str(cfg["interpolation"]),
        "crop_pct": float(cfg["crop_pct"]),
    }
    return found if cfg["crop_mode"] == CENTER else {**found, "crop_mode": str(cfg["crop_mode"])}


def get_dataset(
    data: str | Path | None,
    model_name: str,
    train: bool,
    *,
    model: torch.nn.Module | None = None,
    augment: bool = False,
    labels: bool = True,
) -> Dataset:
    """The data set a program works on: the digits for the micro model where `data` is None, else what `data` names
    (`DATA_HELP`).

    `train` selects training or held-out images; `augment` random crops for files of images (the others have none);
    without `labels`, images of any classes or none do (`open_images`). ClassesError where the model has fewer classes
    than the digits.
    Images go through the transforms of the timm `model`, by default the one that `model_name` stands for; how they are
    normalized tells `input_normalization`.
    """
    if _is_digits(data, model_name):
        classes = len(DigitsDataset.classes)
        if labels and model is not None and 0 < model.num_classes < classes:
            raise ClassesError(
                f"the digits have {classes} classes, the model has {model.num_classes}; give the images that it is for "
                "(--data)",
                classes,
            )
        return DigitsDataset(train, *_digits_normalization(model))
    if data is None:
        raise DataError(
            f"{model_name} needs images: give an ImageNet-style folder (--data DIR, with train/ and val/), or "
            "--data procedural"
        )
    if model is None:
        model = create_model(model_name)
    split = "train" if train else "val"
    if is_procedural(data):
        return procedural_set(str(data), split, model, labels=labels)
    return open_images(str(data), split, model, is_training=augment, labels=labels)


def evaluation_indices(size: int, limit: int) -> Tensor:
    """`limit` of `size` images in order, i64: one from each of as many equal stretches, drawn once and for all, so that
    every class has its share where images are sorted by class. All, where there are no more."""
    count = min(size, limit)
    bounds = torch.arange(count + 1) * size // count
    generator = torch.Generator().manual_seed(derived_seed("held-out images"))
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    return bounds[:-1] + (drawn * bounds.diff()).long()


class _FirstBatches:
    """The first `count` batches of the sampler `batches`."""

    def __init__(self, batches: BatchSampler, count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return min(self.count, len(self.batches))

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self.batches, self.count)


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    batches: int | None = None,
) -> DataLoader:
    """Batches of (images f32 [B, C, H, W], labels i64 [B]); the last may be smaller. `seed` fixes a shuffled order.

    `batches`: the first so many alone. Who stops sooner than the loader leaves images behind that `workers` have read
    ahead, and that count as asked for (`check_images`).
    """
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
    chosen = BatchSampler(sampler, batch_size, drop_last=False)
    if batches is not None:
        chosen = _FirstBatches(chosen, batches)
    return SignalSafeLoader(dataset, batch_sampler=chosen, generator=generator, num_workers=workers)

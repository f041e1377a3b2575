"""Images in folders and archives, read at random and without a network: tar files, WebDataset shards, parquet files.

Each reader is one of timm's (`timm.data.readers.reader.Reader`): `reader[i]` is (open file, label). A tar file is read
through once, and where each image lies in it is kept in an index, so that a subset of the images can be asked for in
any order, as Algorithm 1 needs. The index lies beside the archives, or where that folder is not writable, in the user's
cache; one that does not fit the archives any more is made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from pyharness.atomic import atomic_path
from pyharness.errors import DataError
from pyharness.training import report

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Files that are read as images, by the ends of their names, in any case."""
OTHER_IMAGE_TYPES = (
    ".apng", ".avif", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jxl", ".pbm", ".pnm", ".svg", ".tga",
)  # fmt: skip
"""Files that are images too, and are left out: a note says how many there are."""
INDEX_VERSION = 4
LABEL_MEMBERS = ("cls", "json")
"""Where a WebDataset sample keeps its label: a number, or an object with "label". The first that has one counts."""
IMAGE_COLUMNS = ("image", "img", "jpg")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
"""Under which names a split is looked for, the first found counts."""


def split_files(root: Path, split: str, suffix: str) -> list[Path]:
    """The files `*suffix` of a split, in natural order: in `root/<split>/`, or in `root` or `root/data` with the split
    as a word of their names. Empty where there are none."""
    for name in SPLIT_NAMES[split]:
        if found := sorted((root / name).glob(f"*{suffix}"), key=_natural):
            return found
        for folder in (root, root / "data"):
            named = [p for p in folder.glob(f"*{suffix}") if name in re.split(r"[-_.]", p.name.lower())]
            if named:
                return sorted(named, key=_natural)
    return []


def _natural(path: Path) -> tuple[list[Any], str]:
    return natural_order(path.name)


def natural_order(name: str) -> tuple[list[Any], str]:
    """What names are sorted by: timm's natural order, in which 2 stands before 10, and for names that are equal there
    ("a" and "A", "1" and "01") the text."""
    return natural_key(name), name


def types_text() -> str:
    """The types of files that are read as images, for messages."""
    return f"{', '.join(IMAGE_TYPES[:-1])} and {IMAGE_TYPES[-1]} are read"


def _type_of(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


LABEL_ALONE = "label alone"
"""Among what is left out, by type: labels of samples that have no image of any type."""


def _tell_left_out(left_out: Mapping[str, int], source: Path) -> None:
    """Say how many images of types that are not read there are in `source`, and how many labels without an image, where
    there are any."""
    types = {kind: count for kind, count in left_out.items() if kind != LABEL_ALONE}
    if types:
        each = ", ".join(f"{count} {kind}" for kind, count in sorted(types.items()))
        report(f"note: {source}: images of other types are left out ({each}); {types_text()}")
    if alone := left_out.get(LABEL_ALONE):
        report(f"note: {source}: {alone} of the labels {'has' if alone == 1 else 'have'} no image beside them")


# --- folders ----------------------------------------------------------------------------------------------------------


class FolderReader(Reader):
    """Images at any depth of a folder, in natural order, with the name of the folder they lie in as their class.

    Numbers and order are those of timm's `ReaderImageFolder`, which leaves to chance what is equal in its natural order
    (`natural_order`). Holds (path, label) in `samples` and the classes' numbers in `class_to_idx`. May be empty.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.root = str(folder)
        found: list[tuple[str, str]] = []
        left_out: Counter[str] = Counter()
        for place, _, files in os.walk(self.root, followlinks=True):
            name = os.path.basename(place) if place != self.root else ""
            for file in files:
                kind = _type_of(file)
                if kind in IMAGE_TYPES:
                    found.append((os.path.join(place, file), name))
                elif kind in OTHER_IMAGE_TYPES:
                    left_out[kind] += 1
        classes = sorted({name for _, name in found}, key=natural_order)
        self.class_to_idx = {name: number for number, name in enumerate(classes)}
        found.sort(key=lambda image: natural_order(image[0]))
        self.samples = [(path, self.class_to_idx[name]) for path, name in found]
        _tell_left_out(left_out, folder)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


# --- tar files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarSample:
    """One image: its bytes are [offset, offset + size) of the archive number `archive`."""

    archive: int
    offset: int
    size: int
    name: str
    label: int


@dataclass(frozen=True)
class TarIndex:
    """Where the images of some archives lie. `classes` is None where the archives hold numbers as labels. Of images of
    types that are not read, `left_out` has the number by type. `folder` is the one of a split that alone was taken,
    None where the archives do not hold several splits."""

    samples: list[TarSample]
    classes: list[str] | None
    left_out: Mapping[str, int]
    folder: str | None = None


class TarReader(Reader):
    """Images in tar files, of either layout: a folder (or a tar file, also one inside another) per class; or WebDataset
    shards, in which files of the same name up to the first dot belong together: one image, and `.cls` has its label, or
    where there is none, `.json`. Of archives that hold `train/` and `val/` (`_split_folder`), those of `split` alone;
    `folder` says which folder that is."""

    def __init__(self, paths: Sequence[Path], split: str | None = None) -> None:
        super().__init__()
        self.paths = [Path(path) for path in paths]
        index = open_tar_index(self.paths, split)
        self.folder = index.folder
        _tell_left_out(index.left_out, self.paths[0].parent)
        self.samples, self.classes = index.samples, index.classes
        self.num_classes = len(self.classes) if self.classes else 1 + max(s.label for s in self.samples)
        self._handles: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        sample = self.samples[index]
        data = os.pread(self._handle(sample.archive), sample.size, sample.offset)
        return io.BytesIO(data), sample.label

    def _handle(self, archive: int) -> int:
        """A file descriptor of this process; `pread` moves no position, so processes cannot disturb each other."""
        key = (os.getpid(), archive)
        if key not in self._handles:
            self._handles[key] = os.open(self.paths[archive], os.O_RDONLY)
        return self._handles[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        sample = self.samples[index]
        name = sample.name.rsplit("/", 1)[-1] if basename else f"{self.paths[sample.archive].name}/{sample.name}"
        return str(self.paths[sample.archive].parent / name) if absolute else name


def open_tar_index(paths: Sequence[Path], split: str | None = None) -> TarIndex:
    """The index of `paths`, from its file where there is one that fits, else made and kept. Where they hold folders of
    both splits, of the images of `split`.

    DataError where an archive is missing, compressed or damaged, or no image has a label.
    """
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(f"{missing[0]}: no such archive")
    identity = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    places = _index_places(paths, split)
    for place in places:
        if (found := _read_index(place, identity)) is not None:
            return found
    report(f"reading through {len(paths)} archives of {paths[0].parent} once, to index them")
    index = _build_index(paths, split)
    content = {
        "version": INDEX_VERSION,
        "archives": identity,
        "folder": index.folder,
        "classes": index.classes,
        "left_out": index.left_out,
        "samples": [[s.archive, s.offset, s.size, s.name, s.label] for s in index.samples],
    }
    place = next((p for p in places if os.access(p.parent, os.W_OK | os.X_OK)), places[-1])
    with atomic_path(place) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
    return index


def _index_places(paths: Sequence[Path], split: str | None) -> list[Path]:
    """Beside the archives, and in the user's cache."""
    words = [*(str(path.resolve()) for path in paths), *filter(None, [split])]
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swin_int8"
    return [paths[0].parent / f".swin-index-{digest}.json", cache / f"index-{digest}.json"]


def _read_index(place: Path, identity: list[list[Any]]) -> TarIndex | None:
    """None where there is no index at `place`, or it is of other archives, or damaged."""
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        if content["version"] != INDEX_VERSION or content["archives"] != identity:
            return None
        samples = [TarSample(*sample) for sample in content["samples"]]
        return TarIndex(samples, content["classes"], content["left_out"], content["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class _Member:
    archive: int
    folder: str
    name: str
    offset: int
    size: int


def _members(path: Path, archive: int) -> Iterator[_Member]:
    """All files of a tar file, and of tar files inside it, at their place in `path`."""
    try:
        with tarfile.open(path, "r:") as outer:
            for info, file in _files(outer, str(path)):
                if info.name.endswith(".tar"):
                    stem = info.name.rsplit("/", 1)[-1].removesuffix(".tar")
                    prefix = f"{info.name.removeprefix('./')}/"
                    with tarfile.open(fileobj=outer.extractfile(file), mode="r:") as inner:
                        for child, data in _files(inner, f"{path}: {info.name}"):
                            yield _member(archive, child, data, file.offset_data, stem, prefix)
                else:
                    yield _member(archive, info, file, 0, path.stem, "")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: not a readable tar file ({error}); it must be complete and not compressed"
        ) from None


def _files(tar: tarfile.TarFile, where: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    """Each file of `tar`, and the member that holds its bytes: itself, or of a hard link, which tar writes where a file
    has several names, what it links to. DataError where that is not in the same archive."""
    held: dict[str, tarfile.TarInfo] = {}
    for info in tar:
        if info.islnk():
            file = held.get(posixpath.normpath(info.linkname))
            if file is None:
                raise DataError(
                    f"{where}: {info.name} is a hard link to {info.linkname}, which does not stand before it in the "
                    "archive; make the archive again, with both, or with `tar --hard-dereference`"
                )
        elif info.isfile():
            file = info
        else:
            continue
        held[posixpath.normpath(info.name)] = file
        yield info, file


def _member(
    archive: int, info: tarfile.TarInfo, file: tarfile.TarInfo, begin: int, stem: str, prefix: str
) -> _Member:
    name = info.name.removeprefix("./")
    folders = name.split("/")[:-1]
    return _Member(archive, folders[-1] if folders else stem, prefix + name, begin + file.offset_data, file.size)


def _build_index(paths: Sequence[Path], split: str | None) -> TarIndex:
    members = [member for number, path in enumerate(paths) for member in _members(path, number)]
    images = [member for member in members if _type_of(member.name) in IMAGE_TYPES]
    if not images:
        raise DataError(f"{paths[0]}: no image in it ({types_text()}); are these the right archives?")
    folder = _split_folder(members, images, split)
    if folder is not None:
        images, members = ([m for m in some if m.name.startswith(f"{folder}/")] for some in (images, members))
    left_out = dict(Counter(kind for kind in (_type_of(m.name) for m in members) if kind in OTHER_IMAGE_TYPES))
    labels, alone = _labels(members)
    if labels:
        if alone:
            left_out[LABEL_ALONE] = alone
        return TarIndex(_webdataset_samples(paths, images, labels), None, left_out, folder)
    classes = sorted({m.folder for m in images}, key=natural_order)
    if len(classes) == 1:
        where = "" if folder is None else f"{folder}/: "
        raise DataError(
            f"{paths[0]}: {where}its {len(images)} images have no labels; needed is a folder or a tar file per class, "
            "or WebDataset samples with .cls"
        )
    number = {name: i for i, name in enumerate(classes)}
    samples = [TarSample(m.archive, m.offset, m.size, m.name, number[m.folder]) for m in images]
    return TarIndex(samples, classes, left_out, folder)


def _labels(members: Sequence[_Member]) -> tuple[dict[tuple[int, str], dict[str, _Member]], int]:
    """The labels (LABEL_MEMBERS) of WebDataset samples, by sample and kind, and how many samples have no image of any
    type. No labels where no image has one, and all are `.json`: these may be about folders of classes."""
    found: dict[tuple[int, str], dict[str, _Member]] = {}
    for member in members:
        if _extension(member) in LABEL_MEMBERS:
            found.setdefault(_sample_key(member), {})[_extension(member)] = member
    shown = {_sample_key(m) for m in members if _type_of(m.name) in (*IMAGE_TYPES, *OTHER_IMAGE_TYPES)}
    if not any(key in shown or "cls" in files for key, files in found.items()):
        return {}, 0
    return found, len(found.keys() - shown)


def _split_folder(members: Sequence[_Member], images: Sequence[_Member], split: str | None) -> str | None:
    """The folder of `split` (SPLIT_NAMES; or a tar file of that name) where the archives hold a whole data set: images
    in folders of both splits, at the top or below the one folder that is there. None where they do not.

    Two classes may have such names. Splits hold images in folders of their own, or labels beside them.
    """
    if split is None:
        return None
    places = {tuple(image.name.split("/")[:-1]) for image in images}
    level = 1 if all(places) and len({place[0] for place in places}) == 1 else 0
    folders = {
        place[level].lower().removesuffix(".tar"): place[: level + 1]
        for place in sorted(places, reverse=True)
        if len(place) > level
    }
    found = {
        each: next((folders[name] for name in names if name in folders), None) for each, names in SPLIT_NAMES.items()
    }
    if None in found.values():
        return None
    if not _labels(members)[0] and not any(len(p) > level + 1 and p[: level + 1] in found.values() for p in places):
        return None
    return "/".join(found[split])


def _sample_key(member: _Member) -> tuple[int, str]:
    folder, _, base = member.name.rpartition("/")
    return member.archive, f"{folder}/{base.split('.', 1)[0]}"


def _extension(member: _Member) -> str:
    return member.name.rsplit("/", 1)[-1].partition(".")[2].lower()


def _webdataset_samples(
    paths: Sequence[Path], images: Sequence[_Member], labels: dict[tuple[int, str], dict[str, _Member]]
) -> list[TarSample]:
    samples = []
    files = [open(path, "rb") for path in paths]
    try:
        for image in _one_of_each_sample(paths, images):
            found = labels.get(_sample_key(image))
            if found is None:
                raise DataError(
                    f"{paths[image.archive]}: {image.name} has no label beside it (.{' or .'.join(LABEL_MEMBERS)})"
                )
            texts = {kind: os.pread(files[m.archive].fileno(), m.size, m.offset) for kind, m in found.items()}
            names = {kind: f"{paths[m.archive]}: {m.name}" for kind, m in found.items()}
            samples.append(TarSample(image.archive, image.offset, image.size, image.name, _label_of(texts, names)))
    finally:
        for file in files:
            file.close()
    return samples


def _one_of_each_sample(paths: Sequence[Path], images: Sequence[_Member]) -> Iterator[_Member]:
    """The image of each sample, in order: the one of which nothing but its type stands behind the first dot, as in
    `7.png`; `7.mask.png` belongs to it. DataError where a sample has none or several of them."""
    samples: dict[tuple[int, str], list[_Member]] = {}
    for member in images:
        samples.setdefault(_sample_key(member), []).append(member)
    for members in samples.values():
        named = [member for member in members if f".{_extension(member)}" in IMAGE_TYPES]
        if len(named) != 1:
            names = [member.name for member in named or members]
            raise DataError(
                f"{paths[members[0].archive]}: of {' and '.join(names)}, {'each' if named else 'none'} could be the "
                "image of its sample; needed is one with its type alone behind the first dot, as 7.png beside 7.cls"
            )
        yield named[0]


def _label_of(texts: dict[str, bytes], names: dict[str, str]) -> int:
    """The label of one sample, from its files by kind (LABEL_MEMBERS). A `.json` beside a `.cls` may hold none.

    DataError where none is found, or two that differ.
    """
    labels = {kind: _label_from(texts[kind]) for kind in LABEL_MEMBERS if kind in texts}
    first = next(iter(labels))
    if labels[first] is None:
        raise DataError(
            f"{names[first]}: holds no label; a number from 0 up is needed, or JSON with one as \"label\""
        )
    for kind, label in labels.items():
        if label not in (None, labels[first]):
            raise DataError(
                f"{names[first]} says label {labels[first]}, the .{kind} of the same sample {label}; "
                "mend the sample, or leave one of them out of the archive"
            )
    return labels[first]


def _label_from(text: bytes) -> int | None:
    """The label that a file of a sample holds; None where there is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    label = value.get("label") if isinstance(value, dict) else value
    return label if isinstance(label, int) and not isinstance(label, bool) and label >= 0 else None


# --- parquet ----------------------------------------------------------------------------------------------------------


class ParquetReader(Reader):
    """Images in parquet files, by Hugging Face `datasets`, which keeps a memory-mapped copy in its own cache.

    The image column holds encoded images, as bytes or as `datasets.Image`; the label column holds class numbers.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self.paths = [Path(path) for path in paths]
        try:
            import datasets
        except ImportError:
            raise DataError(
                "parquet files are read by the package `datasets`, which is not installed: run "
                "`pip install 'swin-int8[data]'`"
            ) from None
        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
        except Exception as error:  # pyarrow's and datasets' kinds differ between versions
            first = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{paths[0]}: not a readable parquet file ({first})") from None
        self.image, self.label = (
            _column(rows, names, what, paths[0])
            for names, what in ((IMAGE_COLUMNS, "image"), (LABEL_COLUMNS, "label"))
        )
        if isinstance(rows.features[self.image], datasets.Image):
            rows = rows.cast_column(self.image, datasets.Image(decode=False))
        self.classes = getattr(rows.features[self.label], "names", None)
        self.paths = [Path(path) for path in paths]
        self.rows, self.source = rows, paths[0].parent
        highest = _highest_label(rows.data.column(self.label), self.label, paths[0])
        self.num_classes = len(self.classes) if self.classes else highest + 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        row = self.rows[int(index)]
        image = row[self.image]
        data = image.get("bytes") if isinstance(image, dict) else image
        return io.BytesIO(data or b""), int(row[self.label])

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"{self.source}/row {index}" if absolute else f"row {index}"


def parquet_classes(path: Path) -> list[str] | None:
    """The names of the classes as the head of a parquet file has them, None where it has none; no row is read.
    DataError where it cannot be read."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from None
    label = next((name for name in LABEL_COLUMNS if name in features), None)
    return getattr(features.get(label), "names", None)


def _column(rows: Any, names: Sequence[str], what: str, path: Path) -> str:
    for name in names:
        if name in rows.column_names:
            return name
    raise DataError(
        f"{path}: has no {what} column ({', '.join(names)} are looked for); it has {', '.join(rows.column_names)}"
    )


def _highest_label(column: Any, name: str, path: Path) -> int:
    """The largest of the labels, a pyarrow column; -1 where there is none. DataError where one is no class number."""
    import pyarrow
    import pyarrow.compute

    def refuse(found: str, advice: str) -> NoReturn:
        raise DataError(f"{path}: column {name!r} holds {found}; class numbers from 0 up are needed: {advice}")

    def first(wrong: Any) -> int:
        return pyarrow.compute.index(wrong, True).as_py()

    if column.null_count:
        row = first(column.is_null())
        refuse(f"no value in row {row}", "leave such rows out, or give a split that has labels")
    try:
        if not (pyarrow.types.is_integer(column.type) or pyarrow.types.is_floating(column.type)):
            raise pyarrow.ArrowInvalid
        numbers = column.cast(pyarrow.int64())
    except pyarrow.ArrowInvalid:
        found = f"{str(column[0].as_py())[:40]!r} in row 0, " if len(column) else ""
        refuse(f"{found}{column.type} values", "write the classes' numbers, as integers or as `datasets.ClassLabel`")
    wrong = pyarrow.compute.less(numbers, 0)
    if pyarrow.compute.any(wrong).as_py():
        row = first(wrong)
        refuse(
            f"{numbers[row].as_py()} in row {row}",
            "test splits without labels have such numbers; give a split that has labels",
        )
    return pyarrow.compute.max(numbers).as_py() if len(numbers) else -1

"""What a state knows its training set by: the same wherever the files lie, another for other files."""

from __future__ import annotations

import io
import shutil
import tarfile

import pytest
from PIL import Image
from torch.utils.data import Subset

from pyharness.config import MICRO_DIGITS
from pyharness.data import DigitsDataset, get_dataset
from pyharness.models import create_model
from pyharness.trainer import data_identity

MICRO = MICRO_DIGITS.name


@pytest.fixture(scope="module")
def model():
    return create_model(MICRO)


def png(level):
    buffer = io.BytesIO()
    Image.new("L", (28, 28), level).save(buffer, "png")
    return buffer.getvalue()


def make_folder(root, name="0.png"):
    for label in range(10):
        folder = root / "train" / f"c{label}"
        folder.mkdir(parents=True)
        for file in (name, "1.png"):
            (folder / file).write_bytes(png(label))


def make_tar(root, level=0):
    (root / "train").mkdir(parents=True)
    with tarfile.open(root / "train" / "all.tar", "w") as archive:
        for label in range(10):
            content = png(label) + b"\0" * level
            entry = tarfile.TarInfo(f"c{label}/0.png")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def identity(root, model):
    return data_identity(get_dataset(str(root), MICRO, train=True, model=model))


@pytest.mark.parametrize("make", [make_folder, make_tar])
def test_files_are_known_wherever_they_lie(tmp_path, model, make, monkeypatch):
    make(tmp_path / "a")
    before = identity(tmp_path / "a", model)
    assert "in 10 classes" in before
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "a", tmp_path / "elsewhere" / "b")
    assert identity(tmp_path / "elsewhere" / "b", model) == before
    monkeypatch.chdir(tmp_path / "elsewhere" / "b")
    assert identity(".", model) == before


def test_other_names_classes_and_sizes_are_other_sets(tmp_path, model):
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "renamed", "00.png")
    make_folder(tmp_path / "classes")
    (tmp_path / "classes" / "train" / "c3").rename(tmp_path / "classes" / "train" / "c3b")
    make_tar(tmp_path / "tar")
    make_tar(tmp_path / "longer", 1)
    names = ("a", "renamed", "classes", "tar", "longer")
    assert len({identity(tmp_path / name, model) for name in names}) == 5


def test_parquet_files_are_known_by_their_names_and_sizes(tmp_path, model, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    for name, levels in (("a", (0, 0)), ("b", (0, 0)), ("c", (0, 77))):
        (tmp_path / name / "train").mkdir(parents=True)
        content = {"image": [{"bytes": png(level), "path": None} for level in levels], "label": [0, 9]}
        datasets.Dataset.from_dict(content).to_parquet(str(tmp_path / name / "train" / "train.parquet"))
    sizes = {n: (tmp_path / n / "train" / "train.parquet").stat().st_size for n in "abc"}
    assert sizes["a"] == sizes["b"] != sizes["c"]
    found = [identity(tmp_path / name, model) for name in "abc"]
    assert found[0] == found[1] != found[2]


def test_sets_without_files(model):
    def procedural(words):
        return data_identity(get_dataset(f"procedural:classes=10{words}", MICRO, train=True, model=model))

    assert procedural(",train=40") == "procedural:classes=10,size=28,train=40,seed=0"
    assert procedural(",train=40,val=7,seed=0,size=28") == procedural(",train=40"), "what training does not see"
    assert len({procedural(words) for words in (",train=40", ",train=41", ",train=40,seed=1")}) == 3
    digits = DigitsDataset(train=True)
    sets = [digits, DigitsDataset(train=False), Subset(digits, range(5)), Subset(digits, [0, 1, 2, 3, 5])]
    assert len({data_identity(dataset) for dataset in sets}) == 4
    assert data_identity(Subset(digits, [0, 1])) == data_identity(Subset(digits, range(2)))
    assert data_identity([1, 2]) is None and data_identity(Subset([1, 2], [0])) is None

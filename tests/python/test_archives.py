"""Tar files of every layout, WebDataset shards and parquet files, and images that cannot be read in any of them."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from pyharness import archives, data
from pyharness.config import MICRO_DIGITS, SwinConfig
from pyharness.data import CORRUPT, check_corrupt, get_dataset, make_loader
from pyharness.errors import DataError
from pyharness.models import model_from_config

NAME = "swin_three_classes"
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def model():
    """Takes 28x28 grey images of three classes."""
    return model_from_config(SwinConfig(**{**MICRO_DIGITS.__dict__, "name": NAME, "num_classes": 3}))


def png(level: int) -> bytes:
    """An image of one grey, which tells it apart."""
    out = io.BytesIO()
    Image.fromarray(np.full((40, 36), level, dtype=np.uint8)).save(out, "png")
    return out.getvalue()


def level_of(image: torch.Tensor, model) -> int:
    cfg = data.data_config(model)
    return round(float(image.mean() * cfg["std"][0] + cfg["mean"][0]) * 255)


def write_tar(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def tar_bytes(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


# Two images of each class, each of its own grey: class c, image i has 20 + 40 c + 10 i.
GREYS = {(c, i): 20 + 40 * c + 10 * i for c in range(3) for i in range(2)}


def make_class_folders(root):
    write_tar(root / "val.tar", {f"./{CLASSES[c]}/{i}.png": png(v) for (c, i), v in GREYS.items()})


def make_tar_per_class(root):
    for c, name in enumerate(CLASSES):
        write_tar(root / "val" / f"{name}.tar", {f"{i}.png": png(GREYS[c, i]) for i in range(2)})


def make_tar_of_tars(root):
    inner = {f"{n}.tar": tar_bytes({f"{i}.png": png(GREYS[c, i]) for i in range(2)}) for c, n in enumerate(CLASSES)}
    write_tar(root / "images_val.tar", inner)


def make_shards(root):
    for i in range(2):
        members = {}
        for c in range(3):
            members[f"s{c}_{i}.png"] = png(GREYS[c, i])
            members[f"s{c}_{i}.cls"] = str(c).encode()
        write_tar(root / f"set-validation-000{i}.tar", members)


def make_json_shards(root):
    members = {}
    for (c, i), v in GREYS.items():
        members[f"a/{c}_{i}.json"] = json.dumps({"label": c, "name": CLASSES[c]}).encode()
        members[f"a/{c}_{i}.png"] = png(v)
    write_tar(root / "val" / "0.tar", members)


def make_parquet(root):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"image": [{"bytes": png(v), "path": None} for v in GREYS.values()], "label": [c for c, _ in GREYS]}
    (root / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "data" / "validation-00000-of-00001.parquet")


def make_plain_parquet(root):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (root / "val").mkdir(parents=True)
    table = pa.table({"label": [c for c, _ in GREYS], "img": [png(v) for v in GREYS.values()]})
    pq.write_table(table, root / "val" / "0.parquet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


LAYOUTS = (
    make_class_folders, make_tar_per_class, make_tar_of_tars, make_shards, make_json_shards, make_parquet,
    make_plain_parquet,
)  # fmt: skip


@pytest.mark.parametrize("make", LAYOUTS)
def test_every_layout_gives_every_image_its_label(make, tmp_path, model):
    make(tmp_path / "set")
    dataset = get_dataset(tmp_path / "set", NAME, train=False, model=model)
    found = sorted((label, level_of(image, model)) for image, label in dataset)
    assert found == sorted((c, v) for (c, _), v in GREYS.items())
    backwards = [dataset[i] for i in reversed(range(len(dataset)))][::-1]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(backwards, dataset)), "any order must give the same images"
    assert len({dataset.filename(i) for i in range(6)}) == 6


def test_a_scheme_overrules_what_the_folder_looks_like(tmp_path, model):
    make_class_folders(tmp_path)
    for c, name in enumerate(CLASSES):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "x.png").write_bytes(png(200 + c))
    assert len(get_dataset(tmp_path, NAME, train=False, model=model)) == 3
    assert len(get_dataset(f"folder:{tmp_path}", NAME, train=False, model=model)) == 3
    with pytest.raises(DataError, match="no parquet files for val"):
        get_dataset(f"parquet:{tmp_path}", NAME, train=False, model=model)
    (tmp_path / "val.tar").rename(tmp_path / "x_val.tar")
    assert len(get_dataset(f"tar:{tmp_path}", NAME, train=False, model=model)) == 6
    assert len(get_dataset(f"tar:{tmp_path}/x_val.tar", NAME, train=False, model=model)) == 6
    with pytest.raises(DataError, match="no split to train on"):
        get_dataset(tmp_path / "x_val.tar", NAME, train=True, model=model)


def test_classes_equal_in_natural_order_have_the_same_numbers_in_every_run(tmp_path):
    names = [name for letter in "abcdefgh" for name in (letter.upper(), letter)]
    write_tar(tmp_path / "val.tar", {f"{name}/0.png": png(1) for name in reversed(names)})
    assert archives.TarReader([tmp_path / "val.tar"]).classes == names
    for name in ("01.tar", "1.tar", "001.tar"):
        write_tar(tmp_path / "train" / name, {"0.png": png(1)})
    found = [path.name for path in archives.split_files(tmp_path, "train", ".tar")]
    assert found == ["001.tar", "01.tar", "1.tar"]


def test_other_types_of_images_are_read_or_named(tmp_path, model, capsys):
    out = io.BytesIO()
    Image.new("L", (40, 36), 60).save(out, "webp", lossless=True)
    members = {"ant/0.png": png(20), "bee/0.webp": out.getvalue(), "cat/0.png": png(99), "cat/1.gif": b""}
    write_tar(tmp_path / "val.tar", members)
    for indexed in (False, True):
        dataset = get_dataset(tmp_path, NAME, train=False, model=model)
        assert [(label, level_of(image, model)) for image, label in dataset] == [(0, 20), (1, 60), (2, 99)]
        err = capsys.readouterr().err
        assert f"note: {tmp_path}: images of other types are left out (1 .gif); .jpg, .jpeg, .png" in err
        assert ("to index them" in err) == (not indexed)


def test_labels_without_an_image_are_counted(tmp_path, model, capsys):
    samples = {"0.png": png(20), "0.cls": b"0", "1.cls": b"1", "2.gif": b"", "2.cls": b"2", "3.png": png(9), "3.cls": b"2"}
    write_tar(tmp_path / "val.tar", {**samples, "4.json": b'{"label": 1}'})
    for _ in range(2):  # the second reads the index
        dataset = get_dataset(tmp_path, NAME, train=False, model=model)
        assert [label for _, label in dataset] == [0, 2]
        assert "2 of the labels have no image beside them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["about.json", "ant/about.json", "ant/0.txt.json", "0.json"])
def test_json_that_belongs_to_no_image_leaves_class_folders_what_they_are(name, tmp_path, model, capsys):
    members = {f"{CLASSES[c]}/{i}.png": png(v) for (c, i), v in GREYS.items()}
    write_tar(tmp_path / "val.tar", {**members, name: b'{"label": 1}'})
    for data_set in (tmp_path, f"tar:{tmp_path}"):
        dataset = get_dataset(data_set, NAME, train=False, model=model)
        assert sorted((label, level_of(image, model)) for image, label in dataset) == sorted((c, v) for (c, _), v in GREYS.items())
    assert "no image beside" not in capsys.readouterr().err


def test_json_that_belongs_to_no_image_makes_no_splits_of_classes(tmp_path, model):
    members = {f"{name}/{i}.png": png(9) for name in ("bus", "test", "train") for i in range(2)}
    write_tar(tmp_path / "a.tar", {**members, "about.json": b"{}"})
    assert len(get_dataset(tmp_path / "a.tar", NAME, train=False, model=model)) == 6


def whole_set(top="", train="train", val="val", **more):
    """A tar file's members: three classes, in val/ with the levels of GREYS and in train/ with those one higher."""
    members = {f"{top}{train}/{CLASSES[c]}/{i}.png": png(v + 1) for (c, i), v in GREYS.items()}
    return members | {f"{top}{val}/{CLASSES[c]}/{i}.png": png(v) for (c, i), v in GREYS.items()} | more


@pytest.mark.parametrize(
    "members",
    [
        whole_set(), whole_set("./my_set/"), whole_set("x/", "Training", "validation"), whole_set(val="test"),
        whole_set(**{f"test/{name}/9.png": png(250) for name in CLASSES}, about=b"no image"),
        {f"{folder}.tar": tar_bytes({f"{CLASSES[c]}/{i}.png": png(v + more) for (c, i), v in GREYS.items()})
         for folder, more in (("train", 1), ("val", 0))},
        {f"{folder}/{c}{i}.{kind}": png(v + more) if kind == "png" else b"%d" % c
         for folder, more in (("train", 1), ("val", 0)) for (c, i), v in GREYS.items() for kind in ("png", "cls")},
    ],
)  # fmt: skip
def test_one_tar_file_of_a_whole_data_set_gives_the_split_alone(members, tmp_path, model):
    write_tar(tmp_path / "all.tar", members)
    for data_set in (tmp_path / "all.tar", f"tar:{tmp_path}/all.tar"):
        for train in (False, True):
            dataset = get_dataset(data_set, NAME, train=train, model=model)
            found = sorted((label, level_of(image, model)) for image, label in dataset)
            assert found == sorted((c, v + train) for (c, _), v in GREYS.items())


def parquet_of(path, names) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    path.parent.mkdir(exist_ok=True)
    rows = {"image": [{"bytes": png(9), "path": None}] * 3, "label": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def one_tar_file(root, names):
    write_tar(root / "all.tar", {f"{split}/{n}/0.png": png(9) for split in names for n in names[split]})
    return root / "all.tar"


def two_tar_files(root, names):
    for split in names:
        write_tar(root / f"{split}.tar", {f"{name}/0.png": png(9) for name in names[split]})
    return root


def folders_and_tar(root, names):
    write_tar(root / "train.tar", {f"{name}/0.png": png(9) for name in names["train"]})
    for name in names["val"]:
        (root / "val" / name).mkdir(parents=True)
        (root / "val" / name / "0.png").write_bytes(png(9))
    return root


def parquet_files(root, names):
    for split in names:
        parquet_of(root / split / "0.parquet", list(names[split]))
    return root


@pytest.mark.parametrize("make", [one_tar_file, two_tar_files, folders_and_tar, parquet_files])
def test_splits_of_other_classes_are_refused(make, tmp_path, model):
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
    same = make(tmp_path / "same", {"train": CLASSES, "val": CLASSES})
    other = make(tmp_path / "other", {"train": CLASSES, "val": ("ant", "bee", "dog")})
    for train in (False, True):
        assert len(get_dataset(same, NAME, train=train, model=model)) == 3
        with pytest.raises(DataError, match=r"class 2 is cat in train, dog in val"):
            get_dataset(other, NAME, train=train, model=model)


def test_a_damaged_training_set_does_not_hinder_evaluation(tmp_path, model, capsys):
    two_tar_files(tmp_path, {"train": CLASSES, "val": CLASSES})
    (tmp_path / "train.tar").write_bytes(b"no tar file")
    assert len(get_dataset(tmp_path, NAME, train=False, model=model)) == 3
    assert "the classes of val could not be compared with those of train" in capsys.readouterr().err


def test_classes_may_have_the_names_of_splits(tmp_path, model):
    write_tar(tmp_path / "a.tar", {f"{name}/{i}.png": png(9) for name in ("bus", "test", "train") for i in range(2)})
    assert len(get_dataset(tmp_path / "a.tar", NAME, train=False, model=model)) == 6
    with pytest.raises(DataError, match="no split to train on"):
        get_dataset(tmp_path / "a.tar", NAME, train=True, model=model)


def test_a_split_without_classes_inside_a_tar_file_is_explained(tmp_path, model):
    members = {f"train/{name}/0.png": png(9) for name in CLASSES} | {"val/0.png": png(9), "val/1.png": png(9)}
    write_tar(tmp_path / "all.tar", members)
    with pytest.raises(DataError, match="all.tar: val/: its 2 images have no labels"):
        get_dataset(tmp_path / "all.tar", NAME, train=False, model=model)


def test_webdatasets_own_writer_is_understood(tmp_path, model):
    wds = pytest.importorskip("webdataset")
    (tmp_path / "train").mkdir()
    with wds.ShardWriter(str(tmp_path / "train" / "s-%04d.tar"), maxcount=4, verbose=0) as sink:
        for (c, i), v in GREYS.items():
            sink.write({"__key__": f"{c}{i}", "png": Image.open(io.BytesIO(png(v))), "cls": c})
    dataset = get_dataset(tmp_path, NAME, train=True, model=model)
    assert [(label, level_of(image, model)) for image, label in dataset] == [(c, v) for (c, _), v in GREYS.items()]


def test_the_index_is_made_once_and_again_when_an_archive_changes(tmp_path, monkeypatch):
    make_shards(tmp_path)
    paths = archives.split_files(tmp_path, "val", ".tar")
    first = archives.open_tar_index(paths)
    assert list(tmp_path.glob(".swin-index-*.json")) and not (tmp_path / "cache").exists()
    built = []
    build = archives._build_index
    monkeypatch.setattr(archives, "_build_index", lambda *a: built.append(a) or build(*a))
    assert archives.open_tar_index(paths) == first and not built
    (index,) = tmp_path.glob(".swin-index-*.json")
    index.write_text(index.read_text()[:100])
    assert archives.open_tar_index(paths) == first and len(built) == 1
    write_tar(paths[1], {"n.png": png(3), "n.cls": b"1"})
    assert len(archives.open_tar_index(paths).samples) == 4 and len(built) == 2


def test_the_index_goes_to_the_users_cache_where_the_folder_is_read_only(tmp_path, monkeypatch):
    make_shards(tmp_path / "set")
    paths = archives.split_files(tmp_path / "set", "val", ".tar")
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: "cache" in str(p) and access(p, mode))
    archives.open_tar_index(paths)
    assert not list((tmp_path / "set").glob(".swin*"))
    assert len(list((tmp_path / "cache" / "swin_int8").glob("index-*.json"))) == 1


def test_loader_processes_do_not_disturb_each_other(tmp_path, model):
    make_shards(tmp_path)
    dataset = get_dataset(tmp_path, NAME, train=False, model=model)
    alone = [image for image, _ in dataset]  # opens the archives before the loader's processes begin
    loader = make_loader(dataset, 1, workers=2)
    assert all(torch.equal(a, b[0][0]) for a, b in zip(alone, loader, strict=True))


def test_broken_archives_are_explained(tmp_path, model):
    (tmp_path / "val").mkdir()
    path = tmp_path / "val" / "a.tar"
    path.write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match="not a readable tar file"):
        get_dataset(tmp_path, NAME, train=False, model=model)
    write_tar(path, {"readme.txt": b"x"})
    with pytest.raises(DataError, match="no image in it"):
        get_dataset(tmp_path, NAME, train=False, model=model)
    write_tar(path, {"1.png": png(1), "2.png": png(2)})
    with pytest.raises(DataError, match="its 2 images have no labels"):
        get_dataset(tmp_path, NAME, train=False, model=model)
    write_tar(path, {"1.png": png(1), "1.cls": b"one"})
    with pytest.raises(DataError, match="1.cls: holds no label"):
        get_dataset(tmp_path, NAME, train=False, model=model)
    write_tar(path, {"1.png": png(1), "1.cls": b"1", "2.png": png(2)})
    with pytest.raises(DataError, match="2.png has no label beside it"):
        get_dataset(tmp_path, NAME, train=False, model=model)
    write_tar(path, {"a/1.png": png(1), "b/2.png": png(2), "3.cls": b"1"})
    with pytest.raises(DataError, match="a/1.png has no label beside it"):
        get_dataset(tmp_path, NAME, train=False, model=model)
    write_tar(path, {"1.png": png(1), "1.cls": b"7"})
    with pytest.raises(DataError, match="has 8 classes, the model has 3"):
        get_dataset(tmp_path, NAME, train=False, model=model)
    path.unlink()
    with pytest.raises(DataError, match="no class folders"):
        get_dataset(tmp_path, NAME, train=False, model=model)


def test_a_caption_beside_the_label_is_no_label(tmp_path, model):
    write_tar(tmp_path / "val.tar", {"1.cls": b"2", "1.json": b'{"caption": "a cat"}', "1.png": png(1)})
    write_tar(tmp_path / "train.tar", {"1.cls": b"2", "1.jpg": png(1), "1.json": b'{"label": 2}', "2.cls": b"1", "2.png": png(9)})
    assert [label for _, label in get_dataset(tmp_path, NAME, train=False, model=model)] == [2]
    assert [label for _, label in get_dataset(tmp_path, NAME, train=True, model=model)] == [2, 1]


def test_a_sample_is_one_image(tmp_path, model):
    members = {"1.mask.png": png(9), "1.png": png(50), "1.cls": b"2", "2.JPEG": png(60), "2.cls": b"0", "2.seg.jpg": b""}
    write_tar(tmp_path / "val.tar", members)
    dataset = get_dataset(tmp_path, NAME, train=False, model=model)
    assert [(label, level_of(image, model)) for image, label in dataset] == [(2, 50), (0, 60)]


@pytest.mark.parametrize(
    ("images", "found"),
    [(["1.png", "1.jpg"], r"1.png and a/1.jpg, each"), (["1.mask.png"], "1.mask.png, none"), (["1.png"] * 2, "1.png and")],
)
def test_a_sample_of_no_or_several_images_is_refused(images, found, tmp_path, model):
    write_tar(tmp_path / "val.tar", {"a/0.png": png(1), "a/0.cls": b"1", "a/1.cls": b"1"})
    with tarfile.open(tmp_path / "val.tar", "a") as tar:
        for name in images:
            info = tarfile.TarInfo(f"a/{name}")
            info.size = len(png(1))
            tar.addfile(info, io.BytesIO(png(1)))
    with pytest.raises(DataError, match=f"val.tar: of a/{found}.* could be the image of its sample; needed is one"):
        get_dataset(tmp_path, NAME, train=False, model=model)


@pytest.mark.parametrize("order", [("cls", "json"), ("json", "cls")])
def test_two_labels_of_one_sample_are_refused(order, tmp_path, model):
    contents = {"cls": b"2", "json": b'{"label": 1}'}
    write_tar(tmp_path / "val.tar", {"a/1.png": png(1), **{f"a/1.{kind}": contents[kind] for kind in order}})
    with pytest.raises(DataError, match=r"val.tar: a/1.cls says label 2, the .json of the same sample 1; mend"):
        get_dataset(tmp_path, NAME, train=False, model=model)


@pytest.mark.parametrize("text", [b'{"caption": "a cat"}', b'{"label": "cat"}', b'{"label": null}', b"true", b"-1", b"[2]", b"2.5"])
def test_json_without_a_label_is_explained(text, tmp_path, model):
    write_tar(tmp_path / "val.tar", {"1.json": text, "1.png": png(1)})
    with pytest.raises(DataError, match="1.json: holds no label"):
        get_dataset(tmp_path, NAME, train=False, model=model)


def tar_with_links(links: dict[str, str], members: dict[str, bytes]) -> bytes:
    out = io.BytesIO(tar_bytes(members))
    with tarfile.open(fileobj=out, mode="a") as tar:
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize("nested", [False, True])
def test_hard_links_are_read_as_what_they_link_to(nested, tmp_path, model):
    members = {"ant/0.png": png(20), "./bee/0.png": png(60)}
    links = {"./cat/0.png": "ant/0.png", "cat/1.png": "./bee/0.png", "cat/2.png": "cat/1.png"}
    content = tar_with_links(links, members)
    (tmp_path / "val.tar").write_bytes(tar_bytes({"x/all.tar": content}) if nested else content)
    dataset = get_dataset(tmp_path, NAME, train=False, model=model)
    found = sorted((label, level_of(image, model)) for image, label in dataset)
    assert found == [(0, 20), (1, 60), (2, 20), (2, 60), (2, 60)]


def test_a_hard_link_to_an_inner_tar_is_that_tar(tmp_path, model):
    members = {"ant.tar": tar_bytes({"0.png": png(20)}), "bee.tar": tar_bytes({"0.png": png(60)})}
    (tmp_path / "val.tar").write_bytes(tar_with_links({"cat.tar": "ant.tar"}, members))
    found = [(label, level_of(image, model)) for image, label in get_dataset(tmp_path, NAME, train=False, model=model)]
    assert found == [(0, 20), (1, 60), (2, 20)]


def test_a_hard_link_out_of_the_archive_is_refused(tmp_path, model):
    (tmp_path / "val.tar").write_bytes(tar_with_links({"bee/1.png": "cat/9.png"}, {"ant/0.png": png(20)}))
    with pytest.raises(DataError, match=r"val.tar: bee/1.png is a hard link to cat/9.png, which does not stand before"):
        get_dataset(tmp_path, NAME, train=False, model=model)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"], r"holds 'cat' in row 0, string values; .* write the classes' numbers"),
        ([True, False], r"holds 'True' in row 0, bool values"),
        ([0.0, 1.5], r"holds '0.0' in row 0, double values"),
        ([0, None], r"holds no value in row 1; .* leave such rows out"),
        ([None, None], r"holds no value in row 0"),
        ([0, -1], r"holds -1 in row 1; .* test splits without labels"),
    ],
)
def test_parquet_labels_that_are_no_class_numbers_are_explained(labels, message, tmp_path, model):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    (tmp_path / "val").mkdir()
    pq.write_table(pa.table({"fine_label": labels, "image": [png(1), png(2)]}), tmp_path / "val" / "a.parquet")
    with pytest.raises(DataError, match=f"a.parquet: column 'fine_label' {message}"):
        get_dataset(tmp_path, NAME, train=False, model=model)


def test_parquet_labels_may_be_whole_floating_point_numbers(tmp_path, model):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    (tmp_path / "val").mkdir()
    pq.write_table(pa.table({"label": [2.0, 0.0], "image": [png(1), png(2)]}), tmp_path / "val" / "a.parquet")
    assert [label for _, label in get_dataset(tmp_path, NAME, train=False, model=model)] == [2, 0]


def test_broken_parquet_is_explained(tmp_path, model):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    (tmp_path / "val").mkdir()
    path = tmp_path / "val" / "a.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="a.parquet: not a readable parquet file"):
        get_dataset(tmp_path, NAME, train=False, model=model)
    pq.write_table(pa.table({"label": [1], "picture": [png(1)]}), path)
    with pytest.raises(DataError, match="has no image column .* it has label, picture"):
        get_dataset(tmp_path, NAME, train=False, model=model)


# --- images that cannot be read ---------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Class folders in a tar file; of the six images, numbers 2 (cut off) and 5 (no image, and the last) are damaged."""
    for split in ("train", "val"):
        members = {f"{CLASSES[c]}/{i}.png": png(v) for (c, i), v in GREYS.items()}
        members["bee/0.png"] = members["bee/0.png"][:-40]
        members["cat/1.png"] = b"this is no image"
        write_tar(tmp_path / f"{split}.tar", members)
    return tmp_path


def test_evaluation_leaves_unreadable_images_out(damaged, model, capsys):
    dataset = get_dataset(damaged, NAME, train=False, model=model)
    labels = torch.cat([y for _, y in make_loader(dataset, 4, workers=1)])
    assert labels.tolist() == [0, 0, CORRUPT, 1, 2, CORRUPT]
    assert dataset.corrupt() == [2, 5] and dataset.asked() == 6, "what a loader's process met must be known here"
    assert [dataset.filename(i) for i in dataset.corrupt()] == ["val.tar/bee/0.png", "val.tar/cat/1.png"]
    assert dataset[2][0].shape == (1, 28, 28)
    dataset[2]
    assert capsys.readouterr().err.count("bee/0.png") <= 1, "said once, not each time"


def test_training_takes_the_next_readable_image(damaged, model):
    dataset = get_dataset(damaged, NAME, train=True, model=model)
    samples = [(label, level_of(image, model)) for image, label in dataset]
    good = [(c, GREYS[c, i]) for c, i in ((0, 0), (0, 1), (1, 1), (1, 1), (2, 0), (0, 0))]
    assert samples == good


def test_where_nothing_can_be_read_training_says_so(tmp_path, model):
    write_tar(tmp_path / "train.tar", {f"{name}/0.png": b"nothing" for name in CLASSES})
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        get_dataset(tmp_path, NAME, train=True, model=model)[1]


def test_too_many_unreadable_images_are_an_error_and_all_are_listed(tmp_path):
    path = tmp_path / "corrupt.txt"
    check_corrupt([], 10, path)
    assert not path.exists()
    check_corrupt(["b", "a"], 200, path)
    check_corrupt(["c"], 200, path)
    assert path.read_text() == "a\nb\nc\n"
    with pytest.raises(DataError, match=r"3 of 200 images cannot be read, more than 1 %: a, b, c\."):
        check_corrupt(["a", "b", "c"], 200, path)
    check_corrupt(["a", "b", "c"], 200, path, max_share=0.02)

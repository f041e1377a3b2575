"""The digits, image folders, and loaders."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pyharness import archives, compare, data, quantize
from pyharness.config import MICRO_DIGITS
from pyharness.errors import ClassesError, DataError
from pyharness.models import checkpoint_meta, create_model, model_from_config, save_checkpoint

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


def test_calibration_takes_images_of_any_classes_or_none(folder, small_swin, tmp_path):
    """As they lie in train/, at any depth of a folder without one, and beside each other; never a random crop."""
    flat = tmp_path / "flat"
    (flat / "deep" / "er").mkdir(parents=True)
    for i, file in enumerate(sorted(folder.glob("train/*/*.png"))):
        shutil.copy(file, (flat / "deep" / "er" if i % 2 else flat) / f"{i}.png")
    other = create_model("swin_tiny_patch4_window7_224", num_classes=1000)
    with pytest.raises(DataError, match="has 3 classes, the model has 1000.*--classes 3"):
        data.get_dataset(folder, other.default_cfg["architecture"], train=True, model=other)
    for place in (folder, folder / "train", flat, f"folder:{flat}"):
        found = data.get_dataset(place, "swin_tiny_patch4_window7_224", train=True, model=other, labels=False)
        assert len(found) == 6 and found[0][0].shape == (3, 224, 224), place
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="bare: no image found in it or below"):
        data.get_dataset(tmp_path / "bare", "swin_tiny_patch4_window7_224", train=True, model=other, labels=False)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        data.get_dataset(tmp_path / "nowhere", "swin_tiny_patch4_window7_224", train=True, model=other, labels=False)


@pytest.mark.parametrize(
    ("changed", "new", "message"),
    [
        ("bee", "cow", r"class 1 is bee in train, cat in val \(of 3 and 3 classes\)"),
        ("cat", "dog", r"class 2 is cat in train, dog in val"),
        ("cat", None, r"class 2 is cat in train, none in val \(of 3 and 2 classes\)"),
    ],
)
def test_splits_of_other_classes_are_refused(changed, new, message, folder, small_swin):
    """Each numbers its own: the accuracy would be of wrong labels, without a word."""
    if new is None:
        shutil.rmtree(folder / "val" / changed)
    else:
        (folder / "val" / changed).rename(folder / "val" / new)
    for train in (True, False):
        with pytest.raises(DataError, match=f"{message}.*both need the same classes"):
            data.get_dataset(folder, "swin_tiny_patch4_window7_224", train=train, model=small_swin)
        data.get_dataset(folder, "swin_tiny_patch4_window7_224", train=train, model=small_swin, labels=False)
    with pytest.raises(DataError, match=message):
        data.imagefolder(folder, "val", small_swin)
    shutil.rmtree(folder / "train")
    if new is not None:
        assert len(data.imagefolder(folder, "val", small_swin)) == 3


def test_splits_of_the_same_classes_are_compared_without_listing_images(folder, small_swin, monkeypatch):
    listed = []
    reader = archives.FolderReader
    monkeypatch.setattr(archives, "FolderReader", lambda path: listed.append(path.name) or reader(path))
    data.imagefolder(folder, "val", small_swin)
    assert listed == ["val"]
    (folder / "train" / ".cache").mkdir()  # no class: no image is in it
    data.imagefolder(folder, "val", small_swin)
    assert listed == ["val", "val", "train"]


def test_the_procedural_set_does_for_any_model_where_labels_do_not_matter(tmp_path):
    words = "procedural:classes=7,train=8,val=8"
    model = create_model(MICRO_DIGITS.name, num_classes=1000)
    for train in (True, False):
        found = data.get_dataset(words, "grey", train=train, model=model, labels=False)
        assert len(found) == 8 and found[0][0].shape == (1, 28, 28)
        with pytest.raises(DataError, match=r"has 7 classes, the model has 1000; the set can have 2 to 256; .*--classes 7\)"):
            data.get_dataset(words, "grey", train=train, model=model)
    with pytest.raises(DataError, match=r"has 7 classes, the model has 10; give classes=10, or a model .*--classes 7\)"):
        data.get_dataset(words, "grey", train=True, model=create_model(MICRO_DIGITS.name))
    save_checkpoint(file := tmp_path / "w.pth", model, checkpoint_meta(model, MICRO_DIGITS.name))
    calibrated = tmp_path / "c.pth"
    assert quantize.main(["--weights", str(file), "--data", words, "--batches", "1", "--out", str(calibrated)]) == 0
    assert compare.main([str(file), str(calibrated), "--data", words, "--images", "8"]) == 0


def test_the_digits_are_not_for_models_of_fewer_classes():
    """Labels beyond a model's classes are an IndexError of PyTorch's in training."""
    few = create_model(MICRO_DIGITS.name, num_classes=3)
    for train in (True, False):
        with pytest.raises(ClassesError, match="the digits have 10 classes, the model has 3"):
            data.get_dataset(None, MICRO_DIGITS.name, train=train, model=few)
    assert len(data.get_dataset(None, MICRO_DIGITS.name, train=True, model=few, labels=False)) == 1200
    for classes in (0, 10, 12):
        model = create_model(MICRO_DIGITS.name, num_classes=classes)
        assert len(data.get_dataset(None, MICRO_DIGITS.name, train=False, model=model)) == 597


@pytest.mark.parametrize(
    ("train", "missing", "other", "images"),
    [(True, "train", "val", "training"), (True, "train", "test", "training"), (False, "val", "train", "held-out")],
)
def test_the_other_split_does_not_stand_in(train, missing, other, images, folder, small_swin):
    """Images to calibrate on must not be those that accuracy is measured on, nor the other way round."""
    shutil.rmtree(folder / missing)
    if not (folder / other).exists():
        (folder / "val").rename(folder / other)
    options = {"train": train, "model": small_swin, "labels": False}
    with pytest.raises(DataError, match=f"holds {other}/ but no {missing}/; give a folder of {images} images"):
        data.get_dataset(folder, "swin_tiny_patch4_window7_224", **options)
    here = data.get_dataset(folder / other, "swin_tiny_patch4_window7_224", **options)
    assert len(here) == (6 if other == "train" else 3)


def test_without_labels_a_split_may_have_any_of_its_names(folder, small_swin):
    (folder / "val").rename(folder / "validation")
    options = {"model": small_swin, "labels": False}
    assert len(data.get_dataset(folder, "swin_tiny_patch4_window7_224", train=False, **options)) == 3
    (folder / "train").rename(folder / "training")
    assert len(data.get_dataset(folder, "swin_tiny_patch4_window7_224", train=True, **options)) == 6


def test_16_bit_grey_is_scaled_to_8(folder, small_swin):
    """Pillow's own conversion makes everything above 255 of 65535 white."""
    for c, name in enumerate(("ant", "bee", "cat")):
        level = np.full((40, 50), (0, 100 * 257, 65535)[c], dtype=np.uint16)
        Image.fromarray(level).save(folder / "val" / name / "0.png")
    for model in (small_swin, create_model(MICRO_DIGITS.name, num_classes=3)):
        dataset = data.imagefolder(folder, "val", model)
        normalization = data.input_normalization(folder, "any", model)
        for (image, _), expected in zip(dataset, (0, 100, 255), strict=True):
            pixels = denormalized(image, normalization)
            torch.testing.assert_close(pixels, torch.full_like(pixels, expected), atol=1e-2, rtol=0)


def test_every_16_bit_grey_goes_to_the_nearest_8_bit_one():
    levels = np.arange(65536).reshape(256, 256)
    as_png = Image.fromarray(levels.astype(np.int32))
    as_png.format = "PNG"  # as older versions of Pillow open it
    for image in (Image.fromarray(levels.astype("<u2")), Image.fromarray(levels.astype(">u2")), as_png):
        found = data._in_eight_bits(image)
        assert found.mode == "L" and (np.asarray(found) == np.round(levels / 257)).all(), image.mode


@pytest.mark.parametrize(("kind", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pixels_of_unknown_range_are_unreadable(kind, mode, folder, small_swin, capsys):
    Image.fromarray(np.full((40, 50), 200, dtype=kind)).save(folder / "val" / "bee" / "0.png", "tiff")
    dataset = data.imagefolder(folder, "val", small_swin)
    assert [label for _, label in dataset] == [0, data.CORRUPT, 2] and dataset.corrupt() == [1]
    assert f"bee/0.png cannot be read (its pixels are of Pillow's mode {mode}," in capsys.readouterr().err


def test_it_is_said_where_torchvision_numbers_classes_otherwise(folder, capsys):
    for split in ("train", "val"):
        for old, new in (("ant", "2"), ("bee", "10"), ("cat", "1")):
            (folder / split / old).rename(folder / split / new)
    model = create_model(MICRO_DIGITS.name, num_classes=3)
    dataset = data.get_dataset(folder, MICRO_DIGITS.name, train=False, model=model)
    assert "where class 1 is 2; a model that torchvision's ImageFolder fed" in capsys.readouterr().err
    assert dataset.reader.class_to_idx == {"1": 0, "2": 1, "10": 2}
    for split in ("train", "val"):
        (folder / split / "10").rename(folder / split / "3")
    data.get_dataset(folder, MICRO_DIGITS.name, train=False, model=model)
    assert capsys.readouterr().err == ""


def write_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(folder / name, "png")


def test_folders_are_read_as_timm_reads_them(tmp_path):
    """States and results know a data set by this order and these numbers."""
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    root = tmp_path / "val"
    write_images(root, "n2/10.png", "n2/9.JPEG", "n10/b.jpg", "N3/x/deep/1.png", "n2/x/2.png", "0.png")
    (root / "n10" / "about.txt").write_text("no image")
    mine, timms = data.open_folder(tmp_path, "val"), ReaderImageFolder(str(root))
    assert mine.samples == timms.samples and mine.class_to_idx == timms.class_to_idx and len(mine) == 6
    for how in ({}, {"basename": True}, {"absolute": True}):
        assert mine.filenames(**how) == timms.filenames(**how)
    assert mine[3][0].read() == timms[3][0].read() and mine[3][1] == timms[3][1]


def test_classes_equal_in_natural_order_have_the_same_numbers_in_every_run(tmp_path):
    """timm sorts a set of names by a key in which "1" and "01" are equal: the seed of text hashes decided."""
    names = [name for i in range(1, 9) for name in (f"00{i}", f"0{i}", f"{i}")]
    write_images(tmp_path, *(f"val/{name}/{file}.png" for name in names for file in ("7", "07")))
    reader = data.open_folder(tmp_path, "val")
    assert reader.class_to_idx == {name: number for number, name in enumerate(names)}
    assert reader.filenames()[:4] == ["001/07.png", "001/7.png", "01/07.png", "01/7.png"]


def test_other_types_of_images_are_read_or_named(folder, small_swin, capsys):
    for name in ("a.webp", "a.BMP", "a.tif", "a.tiff", "a.ppm", "a.pgm"):
        Image.new("L", (40, 40), 77).save(folder / "val" / "bee" / name)
    dataset = data.imagefolder(folder, "val", small_swin)
    assert [label for _, label in dataset] == [0] + 7 * [1] + [2] and not dataset.corrupt()
    assert capsys.readouterr().err == ""
    for name in ("a.gif", "b.GIF", "b.jp2", "b.txt"):
        (folder / "val" / "bee" / name).write_bytes(b"")
    assert len(data.imagefolder(folder, "val", small_swin)) == 9
    err = capsys.readouterr().err
    assert err == f"note: {folder}/val: images of other types are left out (2 .gif, 1 .jp2); {archives.types_text()}\n"


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


def denormalized(image, normalization):
    """Pixels 0..255 f32 [..., C, H, W] of normalized images, by what the meta data says."""
    mean, std = (torch.tensor(normalization[key]).view(-1, 1, 1) for key in ("mean", "std"))
    assert len(mean) == len(std) == image.shape[-3]
    return (image * std + mean) * 255


def test_what_the_meta_data_says_undoes_the_normalization_of_every_data_set(folder, small_swin):
    """The folder's and the digits' pixels are known; the procedural ones come without normalization from `render`."""
    from sklearn.datasets import load_digits

    from pyharness.procedural import ProceduralSpec, render

    tiny, micro = "swin_tiny_patch4_window7_224", MICRO_DIGITS.name
    grey = create_model(micro, num_classes=3)
    for name, model in ((tiny, small_swin), (micro, grey)):
        dataset = data.get_dataset(folder, name, train=False, model=model)
        normalization = data.input_normalization(folder, name, model)
        for image, label in dataset:
            pixels = denormalized(image, normalization)
            torch.testing.assert_close(pixels, torch.full_like(pixels, 40 * label + 20), atol=1e-2, rtol=0)
        words = "procedural:classes=3,train=4,val=4"
        image, _ = data.get_dataset(words, name, train=True, model=model)[2]
        spec = ProceduralSpec.parse(words)
        plain, _ = render([2], seed=spec.seed, split="train", size=image.shape[1], classes=3, channels=len(image))
        normalization = data.input_normalization(words, name, model)
        torch.testing.assert_close(denormalized(image, normalization), plain[0] * 255, atol=1e-2, rtol=0)
    held_out = data.get_dataset(None, micro, train=False)
    pixels = denormalized(held_out.images, data.input_normalization(None, micro, create_model(micro)))
    digits = load_digits()
    _, test = data._stratified_split(digits.target, data.DIGITS_TRAIN)
    corners = digits.images[test][:, ::7, ::7] / 16 * 255  # bilinear interpolation leaves the corners alone
    assert corners.max() > 200
    torch.testing.assert_close(pixels[:, 0, ::27, ::27].double(), torch.from_numpy(corners), atol=1e-2, rtol=0)


def test_the_normalization_is_plain_json_of_timms_numbers(small_swin):
    found = data.input_normalization("images", "swin_tiny_patch4_window7_224", small_swin)
    text = json.dumps(found)
    assert text == (
        '{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic", "crop_pct": 0.9}'
    )
    assert found == data.input_normalization(None, "swin_tiny_patch4_window7_224", small_swin)
    micro = create_model(MICRO_DIGITS.name)
    assert data.input_normalization(None, MICRO_DIGITS.name, micro) == {"mean": [0.305], "std": [0.325]}
    grey = data.input_normalization("images", MICRO_DIGITS.name, micro)
    assert grey["mean"] == [pytest.approx(0.449)] and grey["std"] == [pytest.approx(0.226)]


@pytest.mark.parametrize("words", [None, "images", "procedural"])
def test_models_of_other_channels_have_no_normalization(words):
    two_channels = model_from_config(dataclasses.replace(MICRO_DIGITS, in_chans=2))
    assert data.input_normalization(words, MICRO_DIGITS.name, two_channels) is None
    assert data.input_normalization(words, "two_channels", two_channels) is None


def test_loader_keeps_every_image_and_its_order_follows_the_seed():
    dataset = data.DigitsDataset(train=False)
    labels = torch.cat([y for _, y in data.make_loader(dataset, 64)])
    assert torch.equal(labels, dataset.labels)
    first, again, other = (
        torch.cat([y for _, y in data.make_loader(dataset, 64, shuffle=True, seed=seed)]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.sort().values, labels.sort().values)
    shuffled = torch.utils.data.DataLoader(dataset, 64, shuffle=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, torch.cat([y for _, y in shuffled])), "PyTorch's own order"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_some_batches_gives_the_first_of_all(workers):
    numbers = data.make_loader(list(range(50)), 8, shuffle=True, seed=3)
    for count, expected in ((2, 2), (7, 7), (9, 7)):
        some = data.make_loader(list(range(50)), 8, shuffle=True, seed=3, workers=workers, batches=count)
        assert len(some) == expected
        for _ in range(2):
            numbers.generator.manual_seed(3)
            some.generator.manual_seed(3)
            assert [x.tolist() for x in some] == [x.tolist() for x in numbers][:expected]

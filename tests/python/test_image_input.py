"""How a model's images are normalized: read from Hugging Face's preprocessor_config.json, handed on from file to file,
followed by every data set, and written again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from quant_helpers import exercised_model, one_thread

from pyharness import data, distill, evaluate, models, predict, quantize, train
from pyharness.calibrated import load_calibrated
from pyharness.config import MICRO_DIGITS
from pyharness.convert import main
from pyharness.engine_file import load_engine_file
from pyharness.errors import CheckpointError, DataError, HarnessError
from pyharness.export import Source, export, image_input, open_source, resized
from pyharness.hf_format import PROCESSOR_NAME, read_processor, write_processor
from pyharness.image_input import crop_pct_of, scaled_size

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MICRO, TINY = MICRO_DIGITS.name, "swin_tiny_patch4_window7_224"
COLOUR = dataclasses.replace(MICRO_DIGITS, name="colour", in_chans=3)
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
TIMMS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic", "crop_pct": 0.875}
WHOLE = {"crop_pct": 1.0, "crop_mode": "squash"}
"""The whole image pressed into the model's size, as ViTImageProcessor does it where it is not told to crop."""
SWINS = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 28, "width": 28}, "resample": 3}
"""What published Swins say, but for the size."""


@pytest.fixture
def folder(tmp_path, seed):
    """A Hugging Face folder of a colour model, with the preprocessor_config.json of somebody who normalizes by 0.5."""
    export(Source(exercised_model(COLOUR, seed).eval(), COLOUR, {"model": "colour"}), "to-hf", tmp_path / "hf")
    write(tmp_path / "hf", image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    return tmp_path / "hf"


def write(folder, **fields) -> None:
    (folder / PROCESSOR_NAME).write_text(json.dumps(fields))


def processor_of(folder) -> dict:
    return json.loads((folder / PROCESSOR_NAME).read_text())


def grey_image(folder, value: int):
    """A data set of ten classes with one image each, all pixels `value`."""
    for split in ("train", "val"):
        for c in range(10):
            (folder / split / str(c)).mkdir(parents=True)
            Image.fromarray(np.full((40, 40, 3), value, dtype=np.uint8)).save(folder / split / str(c) / "0.png")
    return folder


def test_a_folders_normalization_reaches_images_files_and_the_next_folder(folder, tmp_path):
    model, meta = models.load_model(folder)
    assert meta["input"] == HALF
    images = grey_image(tmp_path / "images", 51)
    image, _ = data.get_dataset(images, "colour", train=False, model=model)[0]
    torch.testing.assert_close(image, torch.full((3, 28, 28), -0.6), atol=1e-6, rtol=0)  # (51 / 255 - 0.5) / 0.5
    whole = {**HALF, "interpolation": "bicubic", "crop_pct": 0.875}
    assert data.input_normalization(images, "colour", model) == whole

    calibrated, engine = tmp_path / "c.safetensors", tmp_path / "e.safetensors"
    words = ["--weights", str(folder), "--data", str(images), "--out", str(calibrated), "--batches", "1"]
    assert quantize.main([*words, "--batch-size", "4", "--method", "max"]) == 0
    assert load_calibrated(calibrated).meta["input"] == whole
    assert main(["to-engine", str(calibrated), str(engine)]) == 0
    assert load_engine_file(engine).meta["input"] == whole
    for source in (calibrated, engine):
        opened = evaluate.open_predictor(source)
        assert data.data_config(opened.timm_model)["mean"] == (0.5, 0.5, 0.5)
        assert main(["to-hf", str(source), str(tmp_path / "again")]) == 0
        assert processor_of(tmp_path / "again")["image_mean"] == [0.5, 0.5, 0.5]
        assert models.load_model(tmp_path / "again")[1]["input"] == whole

    for command, out in (("to-timm", tmp_path / "t.safetensors"), ("to-microsoft", tmp_path / "m.pth")):
        assert main([command, str(folder), str(out), "--img-size", "56"]) == 0
        assert models.load_model(out)[1]["input"] == HALF
        for again in (models.load_model(out)[0], models.create_model("colour", weights=out)):
            assert data.data_config(again)["mean"] == (0.5, 0.5, 0.5)
            assert models.checkpoint_meta(again, "colour")["input"] == HALF
    assert data.data_config(resized(open_source(folder), (56, 56), None).model)["std"] == (0.5, 0.5, 0.5)


def test_the_digits_too_are_normalized_as_the_models_file_says(tmp_path):
    assert main(["to-hf", str(models.MICRO_TEACHER), str(tmp_path / "hf")]) == 0
    assert processor_of(tmp_path / "hf")["image_mean"] == [data.DIGITS_MEAN]
    same, meta = models.load_model(tmp_path / "hf")
    assert meta["input"] == {"mean": [0.305], "std": [0.325]}
    plain = data.get_dataset(None, MICRO, train=False)
    assert data.get_dataset(None, MICRO, train=False, model=same).images is plain.images
    write(tmp_path / "hf", image_mean=0.5, image_std=[0.25])
    other, _ = models.load_model(tmp_path / "hf")
    assert data.input_normalization(None, MICRO, other) == {"mean": [0.5], "std": [0.25]}
    images = data.get_dataset(None, MICRO, train=False, model=other).images
    torch.testing.assert_close(images * 0.25 + 0.5, plain.images * data.DIGITS_STD + data.DIGITS_MEAN)


def test_an_image_that_was_pressed_into_its_size_is_so_in_every_program(folder, tmp_path, monkeypatch):
    """From the usual processor of a published Swin through every kind of file and back. Bands of an image: the centre
    crop does not see the outer ones."""
    write(folder, **SWINS, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model, meta = models.load_model(folder)
    whole = {**HALF, "interpolation": "bicubic", **WHOLE}
    assert meta["input"] == whole and data.input_normalization("images", "colour", model) == whole
    bands = np.zeros((40, 160, 3), dtype=np.uint8)
    bands[:, :40], bands[:, 120:] = (255, 0, 0), (0, 0, 255)
    for split in ("train", "val"):
        for c in range(10):
            (tmp_path / split / str(c)).mkdir(parents=True)
            Image.fromarray(bands).save(tmp_path / split / str(c) / "0.png")
    image, _ = data.get_dataset(tmp_path, "colour", train=False, model=model)[0]
    red, _, blue = (image * 0.5 + 0.5)[:, 14]
    assert red[:6].min() > 0.99 and blue[-6:].min() > 0.99 and red[8:].max() < 0.01 and red.sum() == pytest.approx(7, abs=0.1)
    del model.image_input["crop_mode"]
    assert (data.get_dataset(tmp_path, "colour", train=False, model=model)[0][0] * 0.5 + 0.5).max() < 0.01, "timm's crop"

    calibrated, engine = tmp_path / "c.safetensors", tmp_path / "e.safetensors"
    words = ["--weights", str(folder), "--data", str(tmp_path), "--out", str(calibrated), "--batches", "1"]
    assert quantize.main([*words, "--batch-size", "4", "--method", "max"]) == 0
    assert main(["to-engine", str(calibrated), str(engine)]) == 0
    assert load_calibrated(calibrated).meta["input"] == load_engine_file(engine).meta["input"] == whole
    for source in (folder, calibrated, engine):
        opened = evaluate.open_predictor(source)
        found, _ = data.get_dataset(tmp_path, "colour", train=False, model=opened.timm_model)[0]
        assert torch.equal(found, image)
        assert torch.equal(predict.open_files([str(tmp_path / "val" / "0" / "0.png")], opened.timm_model)[0][0], image)
        assert predict.preprocessing_of(opened.timm_model)["crop_mode"] == "squash"
        assert main(["to-hf", str(source), str(tmp_path / "again")]) == 0
        back = processor_of(tmp_path / "again")
        assert back["size"] == {"height": 28, "width": 28} and back["do_center_crop"] is False and "crop_size" not in back
        assert models.load_model(tmp_path / "again")[1]["input"] == whole
    asked = {}
    monkeypatch.setattr(distill, "distill", lambda teacher, *_, **options: asked.update(teacher=teacher, **options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distill.main(["--weights", str(folder), "--data", str(tmp_path), "--out", str(tmp_path / "kd")])
    assert models.noted_input(asked["teacher"]) == whole and torch.equal(asked["eval_dataset"][0][0], image)
    words = ["--weights", str(folder), "--data", str(tmp_path), "--batch", "10", "--epochs", "1", "--warmup-epochs", "0"]
    assert train.main([*words, "--out", str(tmp_path / "run")]) == 0
    assert models.load_model(tmp_path / "run" / "model.safetensors")[1]["input"] == whole


def test_a_border_goes_where_it_can(tmp_path, seed, capsys):
    """timm's third way, which Hugging Face's processor has not; our own meta data beside it says it."""
    models.save_checkpoint(tmp_path / "m.pth", exercised_model(COLOUR, seed), models.checkpoint_meta(exercised_model(COLOUR, seed), "colour"))
    words = ["--crop-mode", "border", "--crop-pct", "1", "--mean", *["0.2"] * 3, "--std", *["0.4"] * 3]
    assert main(["to-timm", str(tmp_path / "m.pth"), str(tmp_path / "b.pth"), *words]) == 0
    model, meta = models.load_model(tmp_path / "b.pth")
    assert meta["input"] == {"mean": [0.2] * 3, "std": [0.4] * 3, "crop_pct": 1.0, "crop_mode": "border"}
    Image.new("RGB", (160, 40), (255, 255, 255)).save(tmp_path / "white.png")
    image = predict.open_files([str(tmp_path / "white.png")], model)[0][0]
    assert image.amax((0, 2))[12:15].min() == pytest.approx(2) and image[:, :8].abs().max() < 1e-5, "the mean at the edge"
    capsys.readouterr()
    assert main(["to-hf", str(tmp_path / "b.pth"), str(tmp_path / "hf")]) == 0
    assert 'has not the crop_mode "border"' in capsys.readouterr().out
    assert processor_of(tmp_path / "hf")["do_center_crop"] is False
    assert models.load_model(tmp_path / "hf")[1]["input"] == {**meta["input"], "interpolation": "bicubic"}
    write(tmp_path / "hf", **{**processor_of(tmp_path / "hf"), "resample": 2})
    changed = models.load_model(tmp_path / "hf")[1]["input"]
    assert (changed["crop_mode"], changed["interpolation"]) == ("squash", "bilinear"), "who changes it means what it says"


def test_a_crop_is_noted_by_itself(tmp_path, seed):
    """And one thing with its mode: what comes later replaces both."""
    plain = exercised_model(MICRO_DIGITS, seed)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    command = ["to-timm", str(tmp_path / "plain.pth"), str(tmp_path / "noted.pth"), "--model", MICRO]
    assert main([*command, "--crop-pct", "1", "--crop-mode", "squash", "--interpolation", "lanczos"]) == 0
    model, meta = models.load_model(tmp_path / "noted.pth")
    assert meta["input"] == {**WHOLE, "interpolation": "lanczos"}
    cfg = data.data_config(model)
    assert (cfg["crop_mode"], cfg["crop_pct"], cfg["interpolation"]) == ("squash", 1.0, "lanczos")
    assert main(["to-timm", str(tmp_path / "noted.pth"), str(tmp_path / "again.pth"), "--crop-pct", "0.9"]) == 0
    again = models.load_model(tmp_path / "again.pth")[1]["input"]
    assert again == {"crop_pct": 0.9, "crop_mode": "squash", "interpolation": "lanczos"}
    for words, message in (
        (["--crop-pct", "0"], "--crop-pct must be above 0 and at most 1, found 0"),
        (["--crop-pct", "1.1"], "--crop-pct must be above 0 and at most 1, found 1.1"),
        (["--crop-pct", "nan"], "--crop-pct must be above 0 and at most 1, found nan"),
    ):
        with pytest.raises(HarnessError, match=message):
            main([*command, *words])
    with pytest.raises(SystemExit):
        main([*command, "--crop-mode", "stretch"])


def test_what_no_image_can_be_prepared_by_is_refused(tmp_path, seed):
    model = exercised_model(COLOUR, seed)
    for wrong, message in (
        ({"crop_mode": "stretch"}, "has crop_mode 'stretch'; needed is one of center, squash, border"),
        ({"crop_pct": 0}, "has crop_pct 0; needed"),
        ({"interpolation": "sinc"}, "has interpolation 'sinc'; needed"),
    ):
        model.image_input = wrong
        with pytest.raises(DataError, match=message):
            data.data_config(model)


def test_a_student_that_takes_other_crops_than_its_teacher_is_refused():
    centre, squash = {"crop_pct": 0.9}, {"crop_pct": 0.9, "crop_mode": "squash"}
    for said, expected in ((centre, {"crop_mode": "center", **centre}), (squash, squash), ({"crop_mode": "squash"}, squash)):
        models.need_same_input("student", said, "teacher", expected)
    for said, expected in ((centre, squash), (squash, centre)):
        with pytest.raises(CheckpointError, match="'crop_mode': 'squash'"):
            models.need_same_input("student", said, "teacher", expected)


def test_training_and_distilling_say_how_the_images_came_in(tmp_path):
    """The micro model on other images than the digits: with timm's averages, and its files say so to the next."""
    images = ["--data", "procedural:classes=10,train=8,val=4"]
    words = [*images, "--epochs", "1", "--warmup-epochs", "0", "--batch", "8", "--out", str(tmp_path)]
    assert train.main(words) == 0
    model = tmp_path / "model.safetensors"
    assert distill.main([*images, "--weights", str(model), "--no-distill", "--out", str(tmp_path / "kd")]) == 0
    timms = data.input_normalization(images[1], MICRO, models.create_model(MICRO))
    assert timms["mean"] != [data.DIGITS_MEAN]
    for path in (model, tmp_path / "kd" / "student.safetensors"):
        assert models.load_model(path)[1]["input"] == timms
        assert main(["to-hf", str(path), str(tmp_path / "hf")]) == 0
        assert processor_of(tmp_path / "hf")["image_mean"] == timms["mean"]
    assert distill.main(["--no-distill", "--out", str(tmp_path / "digits")]) == 0
    student = tmp_path / "digits" / "student.safetensors"
    assert models.load_model(student)[1]["input"] == {"mean": [data.DIGITS_MEAN], "std": [data.DIGITS_STD]}


def test_parts_are_used_as_parts(folder):
    write(folder, image_mean=[0.1, 0.2, 0.3])
    model, meta = models.load_model(folder)
    assert meta["input"] == {"mean": [0.1, 0.2, 0.3]}
    assert data.input_normalization("images", "colour", model) == {**TIMMS, "mean": [0.1, 0.2, 0.3]}
    (folder / PROCESSOR_NAME).unlink()
    model, meta = models.load_model(folder)
    assert "input" not in meta and data.input_normalization("images", "colour", model) == TIMMS


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, {}),
        ({"size": 224, "resample": 3, "do_resize": True}, {"interpolation": "bicubic", **WHOLE}),
        ({"size": {"height": 28, "width": 28}, "resample": 99}, WHOLE),
        (SWINS, {"interpolation": "bicubic", **WHOLE}),
        ({**SWINS, "do_center_crop": None, "crop_size": None}, {"interpolation": "bicubic", **WHOLE}),
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 28}, WHOLE),
        ({"size": [28, 28]}, WHOLE),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": True, "crop_size": 28}, {"crop_pct": 0.875, "crop_mode": "squash"}),
        ({"size": {"height": 28, "width": 28}, "do_resize": False}, {}),
        ({"size": {"shortest_edge": 28}}, {}),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}, "do_center_crop": True, "crop_size": 28}, {}),
        ({"size": {"height": 32, "width": 33}, "do_center_crop": True, "crop_size": 28}, {}),
        ({"image_processor_type": "CLIPImageProcessor", "size": 28}, {}),
        ({"do_normalize": False, "image_mean": [0.5] * 3}, {"mean": [0.0] * 3, "std": [1.0] * 3}),
        ({**dict.fromkeys(("image_mean", "image_std"), 0.5), "rescale_factor": 1 / 127.5}, {"mean": [0.25] * 3, "std": [0.25] * 3}),
        ({"image_mean": [102.0] * 3, "image_std": [51.0] * 3, "do_rescale": False}, {"mean": [0.4] * 3, "std": [0.2] * 3}),
        ({"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}}, {"crop_pct": 0.875}),
        ({"size": {"shortest_edge": 28}, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}}, {"crop_pct": 1.0}),
        ({"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}}, {}),
        ({"size": 32, "do_center_crop": True, "crop_size": 28}, {"crop_pct": 0.875, "crop_mode": "squash"}),
    ],
)
def test_what_a_preprocessor_config_says(fields, found):
    read = read_processor(fields, COLOUR, "x")
    assert read == {key: pytest.approx(value) if key in ("mean", "std") else value for key, value in found.items()}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (SWINS, None),
        ({"do_rescale": False, "image_mean": 127.5, "image_std": 127.5, **SWINS}, None),
        ({**SWINS, "do_resize": False}, ["do_resize false"]),
        ({**SWINS, "resample": 99, "do_pad": True}, ["resample 99", "do_pad"]),
        ({**SWINS, "size": {"height": 56, "width": 56}}, ['size {"height": 56, "width": 56}, since the model takes 28x28']),
        ({"size": {"shortest_edge": 28}}, ['size {"shortest_edge": 28} without a crop']),
        ({"size": 32, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}}, ['crop_size {"height": 24, "width": 24}']),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 28}}, ["rules of ConvNextImageProcessor", "size"]),
    ],
)
def test_what_is_not_followed_is_named_in_one_line(fields, named, folder, capsys):
    capsys.readouterr()
    write(folder, **fields)
    for _ in range(2):
        models.load_model(folder)
    said = capsys.readouterr().err
    assert said.count("\n") == (named is not None) and all(word in said for word in named or ())
    assert not named or said.startswith(f"note: {folder / PROCESSOR_NAME}: not followed: {named[0]}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_mean": [0.5, 0.5]}, "image_mean is .*finite numbers are needed, one for each of 3 channels"),
        ({"image_mean": ["a"] * 3}, "image_mean is"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std is .*above zero"),
        ({"image_std": [float("nan")] * 3}, "image_std is"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"rescale_factor": "x"}, "rescale_factor is x"),
        ({"image_mean": [0.5] * 3, "do_rescale": False}, "lacks image_mean or image_std"),
    ],
)
def test_a_preprocessor_config_that_cannot_be_used_is_refused(fields, message, folder):
    write(folder, **fields)
    with pytest.raises(CheckpointError, match=f"{PROCESSOR_NAME}: .*{message}|{PROCESSOR_NAME}: {message}"):
        models.load_model(folder)


@pytest.mark.parametrize("size", [28, 224, 384])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 0.96, 1.0])
def test_every_crop_comes_back(size, crop_pct):
    config = dataclasses.replace(COLOUR, img_size=(size, size))
    said = {**TIMMS, "crop_pct": crop_pct}
    read = read_processor(write_processor(config, said), config, "x")
    assert int(size / read["crop_pct"]) == int(size / crop_pct)
    assert {**read, "crop_pct": crop_pct} == said


def test_a_size_that_is_not_square_has_no_crop():
    config = dataclasses.replace(COLOUR, img_size=(28, 56))
    fields = write_processor(config, TIMMS)
    assert fields["size"] == {"height": 28, "width": 56} and fields["do_center_crop"] is False
    assert read_processor(fields, config, "x") == {**TIMMS, **WHOLE}, "which is what transformers does with it"


@pytest.mark.parametrize("size", [(28, 28), (28, 56), (224, 224), (192, 640)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
def test_every_squash_comes_back(size, crop_pct):
    config = dataclasses.replace(COLOUR, img_size=size)
    said = {**TIMMS, "crop_pct": crop_pct, "crop_mode": "squash"}
    read = read_processor(write_processor(config, said), config, "x")
    assert scaled_size(size, read["crop_pct"]) == scaled_size(size, crop_pct)
    assert {**read, "crop_pct": crop_pct} == said
    assert crop_pct_of((28, 28), (32, 33)) is None and crop_pct_of((28, 28), (27, 27)) is None


def test_a_folder_of_ours_says_more_than_its_processor(tmp_path, seed, capsys):
    """timm's centre crop of an image that is not square, which transformers has not, comes back; it is said going out."""
    config = dataclasses.replace(COLOUR, img_size=(56, 84), name="wide")
    model = exercised_model(config, seed).eval()
    models.save_checkpoint(tmp_path / "m.pth", model, models.checkpoint_meta(model, "wide"))
    assert main(["to-hf", str(tmp_path / "m.pth"), str(tmp_path / "hf")]) == 0
    assert "has not timm's centre crop for images that are not square" in capsys.readouterr().out
    assert models.load_model(tmp_path / "hf")[1]["input"] == TIMMS == image_input(open_source(tmp_path / "hf"))


def test_another_models_preprocessor_config_does_not_stay(folder, seed):
    config = dataclasses.replace(COLOUR, in_chans=2)
    export(Source(exercised_model(config, seed).eval(), config, {"model": "colour"}), "to-hf", folder)
    assert not (folder / PROCESSOR_NAME).exists()


def test_transformers_prepares_images_as_we_do(tmp_path, seed):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[test]')")
    model = exercised_model(COLOUR, seed).eval()
    export(Source(model, COLOUR, {"model": "colour", "input": {"mean": [0.1, 0.2, 0.3]}}), "to-hf", tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert "ViTImageProcessor" in type(processor).__name__
    images = grey_image(tmp_path / "images", 102)
    ours = data.get_dataset(images, "colour", train=False, model=models.load_model(tmp_path / "hf")[0])
    theirs = processor(Image.open(images / "val" / "0" / "0.png"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(theirs[0], ours[0][0], atol=1e-5, rtol=0)
    wanted = [(0.4 - mean) / std for mean, std in zip((0.1, 0.2, 0.3), TIMMS["std"])]
    torch.testing.assert_close(ours[0][0][:, 0, 0], torch.tensor(wanted), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "said",
    [
        WHOLE,
        {"crop_pct": 0.875, "crop_mode": "squash"},
        {"crop_pct": 0.875},
        {**WHOLE, "interpolation": "bilinear"},
    ],
)
@pytest.mark.parametrize("shape", [(40, 95), (120, 50)])
def test_transformers_brings_images_to_their_size_as_we_do(said, shape, tmp_path, seed):
    """Of images that are not square, smooth and random. Pillow, which timm resizes with, and torchvision's tensors, which
    transformers resizes with, round otherwise: found were 1 level of 255 at most, 0.14 on average. (Where the margin of
    a crop is odd, transformers begins a pixel earlier than timm; of these images the margins are even.)"""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[test]')")
    model = exercised_model(COLOUR, seed).eval()
    noted = {**HALF, "interpolation": "bicubic", **said}
    export(Source(model, COLOUR, {"model": "colour", "input": noted}), "to-hf", tmp_path / "hf")
    pixels = torch.randint(256, (1, 3, 6, 9), generator=torch.Generator().manual_seed(seed)).float()
    pixels = torch.nn.functional.interpolate(pixels, size=shape, mode="bilinear")[0].byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = processor(Image.open(tmp_path / "image.png"), return_tensors="pt")["pixel_values"][0]
    loaded, meta = models.load_model(tmp_path / "hf")
    assert meta["input"] == noted
    ours = predict.open_files([str(tmp_path / "image.png")], loaded)[0][0]
    levels = (ours - theirs).abs() * 0.5 * 255
    assert levels.max() < 1.01 and levels.mean() < 0.25
    loaded.image_input = {**noted, "crop_pct": 1.0 if said["crop_pct"] < 1 else 0.875}
    other = predict.open_files([str(tmp_path / "image.png")], loaded)[0][0]
    assert ((other - theirs).abs() * 0.5 * 255).mean() > 3, "another crop is told apart"

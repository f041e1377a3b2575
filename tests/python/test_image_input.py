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

from pyharness import data, distill, evaluate, models, quantize, train
from pyharness.calibrated import load_calibrated
from pyharness.config import MICRO_DIGITS
from pyharness.convert import main
from pyharness.engine_file import load_engine_file
from pyharness.errors import CheckpointError
from pyharness.export import Source, export, open_source, resized
from pyharness.hf_format import PROCESSOR_NAME, read_processor, write_processor

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MICRO, TINY = MICRO_DIGITS.name, "swin_tiny_patch4_window7_224"
COLOUR = dataclasses.replace(MICRO_DIGITS, name="colour", in_chans=3)
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
TIMMS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic", "crop_pct": 0.875}


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
        ({"size": 224, "resample": 3, "do_resize": True}, {"interpolation": "bicubic"}),
        ({"size": {"height": 28, "width": 28}, "resample": 99}, {}),
        ({"do_normalize": False, "image_mean": [0.5] * 3}, {"mean": [0.0] * 3, "std": [1.0] * 3}),
        ({**dict.fromkeys(("image_mean", "image_std"), 0.5), "rescale_factor": 1 / 127.5}, {"mean": [0.25] * 3, "std": [0.25] * 3}),
        ({"image_mean": [102.0] * 3, "image_std": [51.0] * 3, "do_rescale": False}, {"mean": [0.4] * 3, "std": [0.2] * 3}),
        ({"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}}, {"crop_pct": 0.875}),
        ({"size": {"shortest_edge": 28}, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}}, {"crop_pct": 1.0}),
        ({"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}}, {}),
        ({"size": 32, "do_center_crop": True, "crop_size": 28}, {}),
    ],
)
def test_what_a_preprocessor_config_says(fields, found):
    read = read_processor(fields, COLOUR, "x")
    assert read == {key: value if key in ("interpolation", "crop_pct") else pytest.approx(value) for key, value in found.items()}


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
    assert fields["size"] == {"height": 28, "width": 56} and "do_center_crop" not in fields
    assert "crop_pct" not in read_processor(fields, config, "x")


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

"""What timm's programs write beside weights is followed: geometry, the way images come in, names of classes."""

from __future__ import annotations

import argparse
import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from quant_helpers import one_thread
from timm.models import save_for_hf
from timm.utils import CheckpointSaver

from pyharness import calibrated, data, evaluate, export, models, pipeline, predict, quantize
from pyharness.checkpoint import load_checkpoint
from pyharness.errors import CheckpointError

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "swin_tiny_patch4_window7_224"
SMALL = {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 32}
"""A Swin-T's name with few weights; its geometry is told by timm's model arguments."""
OPTIONS = {
    "model": TINY, "img_size": 64, "input_size": None, "in_chans": None, "num_classes": 3, "mean": [0.5, 0.5, 0.5],
    "std": [0.25] * 3, "interpolation": "", "crop_pct": None, "model_kwargs": dict(SMALL), "lr": 5e-4, "opt_betas": None,
}  # fmt: skip
HALF = {"mean": [0.5] * 3, "std": [0.25] * 3}
LINE = f"of its training options (args) taken are {TINY}, image 64x64, mean 0.5 0.5 0.5, std 0.25 0.25 0.25"


@pytest.fixture
def model(seed):
    model = timm.create_model(TINY, img_size=64, num_classes=3, **SMALL).eval()
    models.exercise(model, seed)
    return model


def trained(swin, folder, as_dict=False, **changes):
    """A checkpoint of the model `swin` as timm's training program writes it."""
    options = {**OPTIONS, **changes}
    options = options if as_dict else argparse.Namespace(**options)
    if not as_dict:
        optimizer = torch.optim.AdamW(swin.parameters())
        CheckpointSaver(swin, optimizer, options, checkpoint_dir=str(folder)).save_checkpoint(0, metric=50.0)
        return folder / "checkpoint-0.pth.tar"
    torch.save({"state_dict": swin.state_dict(), "arch": TINY, "args": options}, folder / "dict.pth")
    return folder / "dict.pth"


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_run_is_what_its_options_say(as_dict, model, tmp_path, seed, capsys):
    path = trained(model, tmp_path, as_dict)
    capsys.readouterr()
    loaded, meta = models.load_model(path)
    models.load_model(path)
    assert capsys.readouterr().err == f"{path}: {LINE}\n", "said once"
    config = models.config_of(loaded, TINY)
    assert (config.img_size, config.depths, config.num_classes, config.name) == ((64, 64), (1, 2), 3, TINY)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    assert meta["input"] == HALF and models.own_name(path) == TINY and meta["activation"] == "gelu"
    assert data.input_normalization("images", TINY, loaded) == {**HALF, "interpolation": "bicubic", "crop_pct": 0.9}
    for opened in (models.create_model(TINY, weights=path), models.load_model(path, f"{TINY}.ms_in1k")[0]):
        assert models.noted_input(opened) == HALF and opened.patch_embed.img_size == (64, 64)
    with pytest.raises(CheckpointError, match=f"is a checkpoint of {TINY}, not of swin_small"):
        models.load_model(path, "swin_small_patch4_window7_224")


def test_every_program_takes_it_without_being_told_the_model(model, tmp_path):
    path = trained(model, tmp_path, interpolation="bilinear", crop_pct=0.95)
    note = {**HALF, "interpolation": "bilinear", "crop_pct": 0.95}
    for name in ("a", "b", "c"):
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        Image.new("RGB", (80, 70), (51, 51, 51)).save(tmp_path / "images" / "val" / name / "0.png")
    shutil.copytree(tmp_path / "images" / "val", tmp_path / "images" / "train")
    words = ["--weights", str(path), "--data", str(tmp_path / "images"), "--batches", "1", "--method", "max"]
    assert quantize.main([*words, "--out", str(tmp_path / "c.safetensors")]) == 0
    found = calibrated.load_calibrated(tmp_path / "c.safetensors")
    assert found.config.img_size == (64, 64) and found.meta["input"] == note
    opened = evaluate.open_predictor(path)
    image = predict.open_files([str(tmp_path / "images" / "val" / "a" / "0.png")], opened.timm_model)[0][0]
    torch.testing.assert_close(image, torch.full((3, 64, 64), -1.2), atol=1e-5, rtol=0)
    assert evaluate.main([str(path), "--data", str(tmp_path / "images")]) == 0
    export.run(_convert(["to-timm", str(path), str(tmp_path / "t.safetensors")]), None)
    assert models.load_model(tmp_path / "t.safetensors")[1]["input"] == note


def _convert(words):
    from pyharness.convert import build_parser

    return build_parser().parse_args(words)


@pytest.mark.parametrize(
    ("changes", "size", "note", "said"),
    [
        ({"input_size": [3, 56, 64], "img_size": 224}, (56, 64), HALF, "image 56x64"),
        ({"model_kwargs": {**SMALL, "img_size": 64}, "img_size": None}, (64, 64), HALF, "image 64x64"),
        ({"mean": None, "std": None}, (64, 64), None, "image 64x64\n"),
        ({"mean": [0.4], "std": 0.2}, (64, 64), {"mean": [0.4] * 3, "std": [0.2] * 3}, "mean 0.4 0.4 0.4"),
        ({"mean": [0.4, 0.5], "std": [0.0] * 3}, (64, 64), None, "not taken are mean [0.4, 0.5], std [0.0, 0.0, 0.0]"),
        ({"interpolation": "random", "crop_pct": 7}, (64, 64), HALF, "not taken are interpolation 'random', crop_pct 7"),
        ({"crop_mode": "squash", "crop_pct": 1.0}, (64, 64), {**HALF, "crop_mode": "squash", "crop_pct": 1.0}, "squash"),
        ({"model": f"hf-hub:timm/{TINY}.ms_in1k"}, (64, 64), HALF, f"taken are {TINY}.ms_in1k"),
        ({"model": f"{TINY}.mine"}, (64, 64), HALF, f"taken are {TINY}, "),
    ],
)
def test_what_options_may_say(changes, size, note, said, seed, tmp_path, capsys):
    model = timm.create_model(TINY, img_size=size, num_classes=3, **SMALL)
    models.exercise(model, seed)
    path = trained(model, tmp_path, **changes)
    loaded, meta = models.load_model(path)
    assert loaded.patch_embed.img_size == size and meta.get("input") == note
    assert said in capsys.readouterr().err


def test_a_model_that_timm_has_not_is_left_to_the_user(model, tmp_path, capsys, seed):
    """But not the size of its images, nor how they come in."""
    state = timm.create_model(TINY, img_size=256, num_classes=3).state_dict()
    state = {name: tensor + (0.01 if name.endswith("fc1.bias") else 0) for name, tensor in state.items()}
    torch.save({"state_dict": state, "args": {**OPTIONS, "model": "our_swin", "img_size": 256}}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="does not say which model it is of"):
        models.load_model(tmp_path / "m.pth")
    said = capsys.readouterr().err
    assert "taken are image 256x256, mean" in said and "model 'our_swin' (timm does not have it; give one with --model)" in said
    loaded, meta = models.load_model(tmp_path / "m.pth", TINY)
    assert loaded.patch_embed.img_size == (256, 256) and meta["input"] == HALF == models.noted_input(loaded)
    for name, arguments, why in (
        ("resnet18", None, "only Swin-V1 and -V2"),
        (TINY, {"num_heads": [5, 6, 12, 24]}, "96 channels do not divide into 5 heads"),
        (TINY, {"depths": [1, 2], "num_heads": [1]}, "timm cannot build it"),
    ):
        options = {**OPTIONS, "model": name, "model_kwargs": arguments, "img_size": None}
        torch.save({"state_dict": state, "args": options}, tmp_path / f"{name}.pth")
        load_checkpoint(tmp_path / f"{name}.pth")
        assert why in capsys.readouterr().err


def test_a_run_from_scratch_that_learned_nothing_has_to_be_told(model, tmp_path):
    """All FC1 biases zero, as of a GELU-less student: its options do not say which of the two it is."""
    for name, parameter in model.named_parameters():
        if name.endswith("fc1.bias"):
            torch.nn.init.zeros_(parameter)
    path = trained(model, tmp_path)
    with pytest.raises(CheckpointError, match="FC1 biases are exactly zero"):
        models.load_model(path)
    assert models.is_geluless(models.load_model(path, activation="relu")[0])
    assert models.load_model(path, activation="gelu")[1]["activation"] == "gelu"


# --- The folder of save_for_hf ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(model, tmp_path):
    config = {"label_names": ["cat", "dog", "newt"], "pretrained_cfg": {"mean": (0.5,) * 3, "crop_mode": "squash", "crop_pct": 1.0}}
    save_for_hf(model, tmp_path / "hub", model_config=config, safe_serialization="both")
    return tmp_path / "hub"


NOTE = {"mean": [0.5] * 3, "std": [0.229, 0.224, 0.225], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}


@pytest.mark.parametrize("given", ["", "model.safetensors", "pytorch_model.bin"])
def test_a_folder_for_the_hub_is_what_its_config_says(given, folder, model, seed, capsys):
    capsys.readouterr()
    loaded, meta = models.load_model(folder / given)
    said = f"{folder}: of timm's config.json taken are {TINY}, image 64x64, mean 0.5 0.5 0.5, std 0.229 0.224 0.225, bicubic"
    assert capsys.readouterr().err == f"{said}, crop_pct 1, squash, the names of 3 classes\n"
    config = models.config_of(loaded, TINY)
    assert (config.img_size, config.depths, config.num_classes) == ((64, 64), (1, 2), 3)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
        assert torch.equal(loaded(images), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images))
    assert meta["input"] == NOTE and models.noted_classes(loaded) == ["cat", "dog", "newt"]
    assert data.input_normalization("images", TINY, loaded) == NOTE
    assert predict.preprocessing_of(evaluate.open_predictor(folder / given).timm_model)["crop_mode"] == "squash"


def test_a_changed_config_is_another_checkpoint(folder):
    for path in (folder, folder / "model.safetensors"):
        before = pipeline.checkpoint_digest(path)
        fields = json.loads((folder / "config.json").read_text())
        fields["pretrained_cfg"]["mean"] = [0.4 if path == folder else 0.3] * 3
        (folder / "config.json").write_text(json.dumps(fields))
        pipeline.file_digest.cache_clear()
        assert pipeline.checkpoint_digest(path) != before


@pytest.mark.parametrize("names", [{"0": "cat", "1": "dog", "2": "newt"}, {"2": "newt", "1": "dog", "0": "cat"}])
def test_configs_of_other_ages(names, folder, model, capsys):
    """All fields at the top, and labels for label_names; names by numbers."""
    fields = json.loads((folder / "config.json").read_text())
    old = {**fields.pop("pretrained_cfg"), "architecture": TINY, "model_args": fields["model_args"], "labels": names}
    (folder / "config.json").write_text(json.dumps(old))
    loaded, meta = models.load_model(folder)
    assert meta["input"] == NOTE and models.noted_classes(loaded) == ["cat", "dog", "newt"]
    (folder / "config.json").write_text(json.dumps({**old, "labels": ["cat"]}))
    capsys.readouterr()
    assert models.noted_classes(models.load_model(folder)[0]) == []
    assert "not taken are 1 names of classes (the head has 3)" in capsys.readouterr().err


def test_other_files_beside_the_config_say_it_themselves(folder, model, tmp_path):
    torch.save(model.state_dict(), folder / "other.pth")
    with pytest.raises(CheckpointError, match="does not say which model it is of"):
        models.load_model(folder / "other.pth")
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"has timm's config.json and none of model.safetensors, .*fetch the weights"):
        models.load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        models.load_model(folder)

"""Calibration: each method's amax, its errors, and the calibrated checkpoint."""

from __future__ import annotations

import dataclasses
import json

import pytest
import timm
import torch
from quant_helpers import calibrated, exercised_model, images_for, one_thread

from pyharness import models
from pyharness.calibrated import load_calibrated, save_calibrated
from pyharness.config import MICRO_DIGITS
from pyharness.engine_file import load_engine_file, save_engine_file
from pyharness.errors import CalibrationError, CheckpointError, DataError, HarnessError
from pyharness.fakequant import FakeQuantSwin, make_quantizer
from pyharness.fused_convert import to_fused_engine_file
from pyharness.models import MICRO_TEACHER, config_of, exercise, note_data, save_checkpoint
from pyharness.quantize import _collect, calibrate, main, mse_amax, quantize

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def amax_of(fake: FakeQuantSwin) -> dict[str, float]:
    return {name: float(q.amax) for name, q in fake.quantizers()}


def observed_inputs(fake: FakeQuantSwin, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """|x| of every quantizer's input on the floating-point model."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name):
        return lambda module, inputs: seen.update({name: inputs[0].detach().abs().flatten()})

    hooks = [q.register_forward_pre_hook(watch(name)) for name, q in fake.quantizers()]
    with torch.no_grad(), fake.quantizers_disabled():
        fake(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_max_is_the_true_maximum(seed):
    fake = FakeQuantSwin.from_timm(exercised_model(MICRO_DIGITS, seed), MICRO_DIGITS)
    images = images_for(MICRO_DIGITS, 16, seed)
    assert calibrate(fake, images.split(8), "max") == 16
    for name, values in observed_inputs(fake, images).items():
        assert amax_of(fake)[name] == pytest.approx(float(values.max()), rel=1e-5), name


@pytest.mark.parametrize("percentile", [99.99, 99.0])
def test_percentile_is_the_quantile_to_a_bins_width(percentile, seed):
    fake = FakeQuantSwin.from_timm(exercised_model(MICRO_DIGITS, seed), MICRO_DIGITS)
    images = images_for(MICRO_DIGITS, 16, seed)
    calibrate(fake, [images], "percentile", percentile)
    for name, values in observed_inputs(fake, images).items():
        if name.endswith("_weight_quantizer"):
            continue
        values = values.sort().values
        rank = min(len(values) - 1, int(percentile / 100 * len(values)))
        width = float(values[-1]) / 2048
        low, high = float(values[max(0, rank - 2)]), float(values[min(len(values) - 1, rank + 2)])
        assert low - 2 * width <= amax_of(fake)[name] <= high + 2 * width, name


def test_weights_are_calibrated_by_their_maximum(seed):
    model = exercised_model(MICRO_DIGITS, seed)
    checkpoint = quantize(model, MICRO_DIGITS, [images_for(MICRO_DIGITS, 8, seed)], method="percentile", percentile=90)
    weight = model.layers[0].blocks[1].mlp.fc1.weight.detach()
    amax = checkpoint.state["layers.0.blocks.1.mlp.fc1._weight_quantizer._amax"]
    assert float(amax) == float(weight.abs().max())


def test_mse_finds_the_optimum_for_normal_data(seed):
    """Optimal clipping of 8-bit uniform quantization of normal data is at 3.92 standard deviations.

    (Banner, Nahshan, Soudry 2019, Post training 4-bit quantization, table of optimal clipping values.)
    """
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(seed)).abs()
    counts = torch.histc(x, bins=2048, min=0, max=float(x.max()))
    amax = mse_amax(counts, torch.linspace(0, float(x.max()), 2049))
    assert 3.7 < float(amax) < 4.2


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_the_searching_methods_stay_below_the_maximum(method, seed, monkeypatch):
    monkeypatch.setattr("pyharness.quantize.CANDIDATES", 16)
    model = exercised_model(MICRO_DIGITS, seed)
    images = images_for(MICRO_DIGITS, 8, seed)
    searched = quantize(model, MICRO_DIGITS, [images], method=method)
    largest = quantize(model, MICRO_DIGITS, [images], method="max")
    ratios = [found / most for (_, found), (_, most) in zip(searched.required(), largest.required())]
    assert max(ratios) < 1.01
    assert min(ratios) > 0.1


def test_calibration_runs_on_the_floating_point_model(seed):
    """Statistics must not come from a model that is already quantized by its first batches."""
    model = exercised_model(MICRO_DIGITS, seed)
    batches = images_for(MICRO_DIGITS, 16, seed).split(4)
    once = quantize(model, MICRO_DIGITS, batches, method="max")
    fake = once.to_model()
    calibrate(fake, batches, "max")
    assert amax_of(fake) == {name: value for name, value in amax_of(once.to_model()).items()}


def test_the_same_images_give_the_same_amax(seed):
    model = exercised_model(MICRO_DIGITS, seed)
    batches = images_for(MICRO_DIGITS, 16, seed).split(8)
    first, second = (quantize(model, MICRO_DIGITS, batches) for _ in range(2))
    assert dict(first.required()) == dict(second.required())


def test_nan_in_the_images_names_the_quantizer(seed):
    fake = FakeQuantSwin.from_timm(exercised_model(MICRO_DIGITS, seed), MICRO_DIGITS)
    images = images_for(MICRO_DIGITS, 8, seed)
    images[3, 0, 5, 5] = torch.nan
    with pytest.raises(CalibrationError, match=r"layers\.0\.blocks\.0\.attn\.qkv\._input_quantizer saw NaN"):
        calibrate(fake, [images])
    assert not any(q._if_calib for _, q in fake.quantizers()), "calibration must be off after an error"


class OneQuantizer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.quantizer = make_quantizer()

    def quantizers(self):
        return [("layer._input_quantizer", self.quantizer)]

    def forward(self, x):
        return self.quantizer(x)


@pytest.mark.parametrize("first", [0.0, 1e-40, 1e-5, 1 / 300])
def test_a_range_that_no_histogram_holds_names_the_quantizer(first):
    """ModelOpt's would overflow, or take gigabytes."""
    model, whole = OneQuantizer(), torch.linspace(-1, 0.5, 64)
    batches = [whole * first, whole]
    message = r"layer\._input_quantizer saw values up to .* at first and up to 1 in a later batch.*--method max"
    with pytest.raises(CalibrationError, match=message):
        _collect(model, dict(model.quantizers()), batches, "histogram")
    assert not model.quantizer._if_calib
    assert _collect(model, dict(model.quantizers()), batches, "max") == 128
    for small in (first, 1 / 200):  # the larger batch first, and what still fits
        batches = [whole, whole * small] if small == first else [whole * small, whole]
        assert _collect(model, dict(model.quantizers()), batches, "histogram") == 128
        assert int(model.quantizer._calibrator._calib_hist.sum()) == 128


@pytest.mark.parametrize("method", ["percentile", "max", "mse", "entropy"])
def test_a_dead_activation_is_named(method, seed, monkeypatch):
    monkeypatch.setattr("pyharness.quantize.CANDIDATES", 8)
    model = exercised_model(MICRO_DIGITS, seed, geluless=True)
    with torch.no_grad():
        model.layers[1].blocks[1].mlp.fc1.weight.zero_()
    with pytest.raises(CalibrationError, match=r"layers\.1\.blocks\.1\.mlp\.fc2\._input_quantizer has amax 0"):
        quantize(model, MICRO_DIGITS, [images_for(MICRO_DIGITS, 8, seed)], method=method)


def test_wrong_requests_are_refused(seed):
    model = exercised_model(MICRO_DIGITS, seed)
    images = [images_for(MICRO_DIGITS, 4, seed)]
    with pytest.raises(HarnessError, match="unknown; choose one of percentile, max, mse, entropy"):
        quantize(model, MICRO_DIGITS, images, method="median")
    with pytest.raises(HarnessError, match="percentile 0 is not"):
        quantize(model, MICRO_DIGITS, images, percentile=0)
    with pytest.raises(DataError, match="no images"):
        quantize(model, MICRO_DIGITS, [])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
def test_a_checkpoint_comes_back_as_it_was(suffix, geluless, tmp_path):
    _, checkpoint = calibrated(MICRO_DIGITS, geluless, 1)
    path = tmp_path / f"calibrated{suffix}"
    save_calibrated(path, checkpoint)
    loaded = load_calibrated(path)
    assert (loaded.config, loaded.graph, loaded.int8_mode) == (MICRO_DIGITS, checkpoint.graph, 1)
    assert loaded.meta == checkpoint.meta
    assert loaded.state.keys() == checkpoint.state.keys()
    assert all(torch.equal(loaded.state[name], tensor) for name, tensor in checkpoint.state.items())
    images = images_for(MICRO_DIGITS, 2, 0)
    with torch.no_grad():
        assert torch.equal(loaded.to_model()(images), checkpoint.to_model()(images))


def test_the_pth_file_needs_no_code_to_load(tmp_path):
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    save_calibrated(tmp_path / "calibrated.pth", checkpoint)
    content = torch.load(tmp_path / "calibrated.pth", weights_only=True)
    assert "layers.0.blocks.0.attn.qkv._input_quantizer._amax" in content["model"]
    assert content["meta"]["activation"] == "gelu"


def test_an_uncalibrated_checkpoint_is_refused(tmp_path, seed):
    path = tmp_path / "teacher.safetensors"
    save_checkpoint(path, exercised_model(MICRO_DIGITS, seed), {"model": MICRO_DIGITS.name})
    with pytest.raises(CalibrationError, match="is not calibrated"):
        load_calibrated(path)


def test_a_checkpoint_of_other_sizes_is_refused():
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    state = dict(checkpoint.state)
    state["norm.weight"] = state["norm.weight"][:-1]
    broken = type(checkpoint)(checkpoint.config, checkpoint.graph, 1, state)
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        broken.to_model()


def test_the_program_calibrates_the_micro_model(tmp_path, capsys):
    out = tmp_path / "calibrated.safetensors"
    arguments = ["--model", MICRO_DIGITS.name, "--weights", "random", "--batches", "2", "--out", str(out)]
    assert main([*arguments, "--int8-mode", "2", "--percentile", "99.9"]) == 0
    assert "16 images" in capsys.readouterr().out
    loaded = load_calibrated(out)
    assert loaded.int8_mode == 2
    assert loaded.meta["calibration"]["percentile"] == 99.9
    assert loaded.meta["input"] == {"mean": [0.305], "std": [0.325]}, "the digits'"
    first = out.read_bytes()
    main([*arguments, "--int8-mode", "2", "--percentile", "99.9"])
    assert out.read_bytes() == first, "the same command must give the same file"


def test_the_program_says_without_a_terminal_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pyharness.quantize.LINE_SECONDS", 0.0)
    arguments = ["--model", MICRO_DIGITS.name, "--batches", "3", "--batch-size", "4", "--out", str(tmp_path / "c.pth")]
    assert main(arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "calibrating swin_micro_digits: 12 images ..."
    assert lines[1:3] == ["calibrating: 1 of 3 batches", "calibrating: 2 of 3 batches"]
    assert lines[3].startswith("choosing ranges: 1 of ") and lines[3].endswith(" quantizers")
    assert "asked for" not in "".join(lines)
    monkeypatch.setattr("pyharness.quantize.LINE_SECONDS", 600.0)
    assert main([*arguments, "--weights", "random", "--data", "procedural:classes=10,train=7,val=8"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "calibrating swin_micro_digits: 7 images ...",
        "note: calibrated on 7 images; 12 were asked for (--batches x --batch)",
    ]


def test_the_program_makes_random_weights_geluless_where_it_is_told_to(tmp_path, monkeypatch):
    arguments = ["--batches", "1", "--batch-size", "4", "--out", str(tmp_path / "c.pth")]
    for activation, graph in (("relu", "geluless_int8"), ("gelu", "ft_int8")):
        named = ["--model", MICRO_DIGITS.name, "--weights", "random", "--activation", activation]
        assert main([*named, *arguments]) == 0
        assert load_calibrated(tmp_path / "c.pth").graph == graph
    asked = {}
    monkeypatch.setattr("pyharness.models.create_model", lambda name, **options: asked.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--model", "swin_tiny_patch4_window7_224", "--activation", "relu", *arguments])
    assert (asked["weights"], asked["activation"]) == ("pretrained", "relu")


def test_the_program_takes_the_digits_teacher_where_nothing_is_said(tmp_path):
    arguments = ["--batches", "1", "--batch-size", "4"]
    for name, words in (("a", []), ("b", ["--model", MICRO_DIGITS.name])):
        assert main([*arguments, *words, "--out", str(tmp_path / f"{name}.safetensors")]) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert load_calibrated(tmp_path / "a.safetensors").meta["weights"] == MICRO_TEACHER.name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_program_notes_how_its_images_were_normalized(suffix, tmp_path):
    out = tmp_path / f"calibrated{suffix}"
    arguments = ["--model", MICRO_DIGITS.name, "--weights", "random", "--batches", "1", "--batch-size", "4"]
    assert main([*arguments, "--data", "procedural:classes=10,train=8,val=8", "--out", str(out)]) == 0
    found = load_calibrated(out).meta["input"]
    assert found == {"mean": [pytest.approx(0.449)], "std": [pytest.approx(0.226)], "interpolation": "bicubic",
                     "crop_pct": 0.875}  # fmt: skip
    assert json.loads((tmp_path / f"{out.name}.card.json").read_text())["meta"]["input"] == found


def test_what_is_known_of_the_images_is_noted(seed):
    """Where the caller says nothing: what the model's file says, or timm or this package of its name."""
    model, images = exercised_model(MICRO_DIGITS, seed), [images_for(MICRO_DIGITS, 4, seed)]
    assert quantize(model, MICRO_DIGITS, images).meta["input"] == {"mean": [0.305], "std": [0.325]}
    noted = {"mean": [0.5], "std": [0.25]}
    assert quantize(model, MICRO_DIGITS, images, normalization=noted).meta["input"] == noted
    note_data(model, {"input": noted, "classes": list("abcdefghij")})
    meta = quantize(model, MICRO_DIGITS, images).meta
    assert meta["input"] == noted and meta["classes"] == list("abcdefghij")
    unknown = dataclasses.replace(MICRO_DIGITS, name="mine")
    meta = quantize(exercised_model(unknown, seed), unknown, images).meta
    assert "input" not in meta and "classes" not in meta


def test_readmes_example_makes_a_file_that_says_all(tmp_path, seed):
    """timm's own model, small here, which timm says to be of ImageNet-1k."""
    name = "swin_tiny_patch4_window7_224"
    model = timm.create_model(name, img_size=56, depths=(1, 1), num_heads=(1, 2), embed_dim=32).eval()
    exercise(model, seed)
    config = config_of(model, name)
    checkpoint = quantize(model, config, [images_for(config, 4, seed)])
    save_engine_file(tmp_path / "my.engine.safetensors", to_fused_engine_file(checkpoint))
    meta = load_engine_file(tmp_path / "my.engine.safetensors").meta
    assert meta["input"] == {
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic", "crop_pct": 0.9
    }  # fmt: skip
    assert len(meta["classes"]) == 1000 and meta["classes"][0] == "tench, Tinca tinca"
    ours = models.create_model(name, num_classes=1000, img_size=56)
    assert not models.known_classes(ours), "random weights know none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "random", "--out", "x.pth"], "--model"),
        (["--data", "procedural", "--out", "x.pth"], "--model"),
        (["--activation", "relu", "--out", "x.pth"], "says that its activation is gelu, not relu"),
        (["--model", "swin_micro_digits", "--weights", "random", "--out", "x.bin"], "must end in"),
        (["--model", "swin_micro_digits", "--weights", "random", "--out", "x.pth", "--batches", "0"], "at least 1"),
        (["--model", "swin_micro_digits", "--weights", "missing.pth", "--out", "x.pth"], "no such file"),
    ],
)
def test_the_program_refuses_wrong_arguments(arguments, message):
    with pytest.raises(HarnessError, match=message):
        main(arguments)

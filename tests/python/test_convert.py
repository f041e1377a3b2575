"""Conversion between calibrated checkpoints and engine files, both ways, and its errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from quant_helpers import NON_SQUARE, THREE_STAGES, calibrated, one_thread

from pyharness.attention_geometry import attention_mask, collapse_bias, expand_bias_table
from pyharness.calibrated import CalibratedCheckpoint, load_calibrated, save_calibrated
from pyharness.config import GRAPHS, MICRO_DIGITS, SwinConfig
from pyharness.convert import dequantize_weight, describe, main, quantize_weight, to_checkpoint, to_engine_file
from pyharness.engine_file import load_engine_file, save_engine_file
from pyharness.errors import CalibrationError, CheckpointError, FormatError, HarnessError
from pyharness.models import blocks_of, model_from_config
from pyharness.random_engine import random_engine_file

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = pytest.mark.parametrize("config", [MICRO_DIGITS, NON_SQUARE, THREE_STAGES], ids=lambda c: c.name)
AMAX = st.floats(2**-20, 2**20, width=32)


def changed(checkpoint: CalibratedCheckpoint, name: str, tensor: torch.Tensor | None) -> CalibratedCheckpoint:
    """A copy with one tensor replaced or added; None removes it."""
    state = {**checkpoint.state, name: tensor}
    return dataclasses.replace(checkpoint, state={key: value for key, value in state.items() if value is not None})


@settings(max_examples=200, deadline=None)
@given(AMAX, hnp.arrays(np.int8, st.integers(1, 64)))
def test_a_dequantized_weight_quantizes_to_itself(amax, q):
    q = torch.from_numpy(q)
    assert torch.equal(quantize_weight(dequantize_weight(q, amax), amax), q)


@settings(max_examples=200, deadline=None)
@given(AMAX, hnp.arrays(np.float32, 32, elements=st.floats(-2, 2, width=32)))
def test_quantizing_a_weight_errs_by_half_a_step_or_clamps(amax, values):
    weight = torch.from_numpy(values) * amax
    q = quantize_weight(weight, amax)
    error = (dequantize_weight(q, amax) - weight).abs() / (amax / 127)
    inside = (weight > -128.4 / 127 * amax) & (weight < 127.4 / 127 * amax)
    assert (error[inside] <= 0.5001).all()
    assert ((q == 127) | (q == -128))[~inside].all()


@CONFIGS
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("int8_mode", [1, 2])
def test_engine_file_to_checkpoint_and_back_is_exact(config, graph, int8_mode, tmp_path, seed):
    before = random_engine_file(config, graph, int8_mode, seed)
    after = to_engine_file(to_checkpoint(before))
    for name, a, b in zip(before.names, before.tensors, after.tensors):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    for name, ef in (("before", before), ("after", after)):
        save_engine_file(tmp_path / name, ef)
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
@pytest.mark.parametrize("int8_mode", [1, 2])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_calibrated_model_survives_the_round_trip_through_files(geluless, int8_mode, suffix, tmp_path):
    _, checkpoint = calibrated(MICRO_DIGITS, geluless, int8_mode)
    save_engine_file(tmp_path / "engine", to_engine_file(checkpoint))
    save_calibrated(tmp_path / f"back{suffix}", to_checkpoint(load_engine_file(tmp_path / "engine")))
    back = load_calibrated(tmp_path / f"back{suffix}")
    assert dict(back.required()) == dict(checkpoint.required())
    assert back.state.keys() == checkpoint.state.keys()
    save_engine_file(tmp_path / "again", to_engine_file(back))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "engine").read_bytes()


def test_the_weights_are_those_of_the_model():
    model, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    tensors = to_engine_file(checkpoint).by_name()
    block = model.layers[1].blocks[1]
    weight = block.mlp.fc2.weight.detach()
    step = float(weight.abs().max()) / 127
    assert (tensors["layers.1.blocks.1.mlp.fc2.weight"] * step - weight).abs().max() < 0.501 * step
    assert tensors["layers.1.blocks.1.mlp.fc2.weight"].abs().max() == 127
    reduction = model.layers[1].downsample.reduction.weight.detach()  # timm's place of what ends stage 0
    step = float(reduction.abs().max()) / 127
    assert (tensors["layers.0.downsample.reduction.weight"] * step - reduction).abs().max() < 0.501 * step
    assert torch.equal(tensors["layers.1.blocks.1.mlp.fc1.bias"], block.mlp.fc1.bias.half())
    assert torch.equal(tensors["patch_embed.proj.weight"], model.patch_embed.proj.weight.half().flatten(1))
    assert torch.equal(tensors["head.weight"], model.head.fc.weight.half())


WINDOWS = SwinConfig("windows", (64, 96), 2, 1, 0, 8, (2, 2, 2, 2), (1, 1, 2, 2), (4, 8, 4, 2))
PADDED = dataclasses.replace(WINDOWS, name="padded", img_size=(58, 90))


@pytest.mark.parametrize("config", [MICRO_DIGITS, NON_SQUARE, THREE_STAGES, WINDOWS, PADDED], ids=lambda c: c.name)
def test_masks_and_position_bias_are_timms(config):
    model = model_from_config(config)
    for stage, layer in zip(config.stages(), model.layers):
        for index, block in enumerate(layer.blocks):
            bias = expand_bias_table(block.attn.relative_position_bias_table.detach(), stage.window)
            assert torch.equal(bias, block.attn._get_rel_pos_bias()[0].detach())
            assert torch.equal(collapse_bias(bias, stage.window), block.attn.relative_position_bias_table)
            if any(stage.block_shift(index)):
                assert torch.equal(attention_mask(stage), block.attn_mask)
            else:
                assert block.attn_mask is None
    assert len(blocks_of(model)) == sum(config.depths)


def test_all_missing_scales_are_named():
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    gone = (
        "layers.0.blocks.1.attn.matmul_a_input_quantizer",
        "layers.1.blocks.0.mlp.fc1._weight_quantizer",
        "layers.0.downsample.reduction._aftergemm_quantizer",
    )
    state = {name: t for name, t in checkpoint.state.items() if not name.startswith(gone)}
    with pytest.raises(CalibrationError) as error:
        to_engine_file(dataclasses.replace(checkpoint, state=state))
    assert all(f"{name} has no amax" in str(error.value) for name in gone)
    assert str(error.value).count("has no amax") == 3


@pytest.mark.parametrize("value", [0.0, -2.0, float("nan"), float("inf"), 1e-9])
def test_unusable_scales_are_named(value):
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    name = "layers.1.blocks.1.attn.softmax_input_quantizer"
    broken = changed(checkpoint, f"{name}._amax", torch.tensor(value))
    with pytest.raises(CalibrationError, match=f"{name} has amax"):
        to_engine_file(broken)


def test_a_scale_that_no_graph_applies_is_kept():
    _, checkpoint = calibrated(MICRO_DIGITS, True, 2)
    broken = changed(checkpoint, "layers.0.blocks.0.add1_residual_input_quantizer._amax", torch.tensor(3.0))
    ef = to_engine_file(broken)
    assert float(ef.by_name()["layers.0.blocks.0.amaxList"][52]) == 3.0
    assert to_engine_file(to_checkpoint(ef)).by_name()["layers.0.blocks.0.amaxList"][52] == 3.0


def test_per_channel_scales_are_refused():
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    broken = changed(checkpoint, "layers.0.blocks.0.attn.qkv._weight_quantizer._amax", torch.ones(96))
    with pytest.raises(CalibrationError, match="has 96 values; per-tensor"):
        to_engine_file(broken)


def test_an_uncalibrated_checkpoint_is_said_to_be_one():
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    state = {name: t for name, t in checkpoint.state.items() if not name.endswith("._amax")}
    with pytest.raises(CalibrationError, match="is not calibrated, none of its 71 quantizers"):
        to_engine_file(dataclasses.replace(checkpoint, state=state))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("norm.bias", None, r"lacks norm\.bias \[64\]"),
        ("norm.bias", torch.zeros(63), r"norm\.bias must be \[64\], found \[63\]"),
        ("norm.bias", torch.full((64,), torch.nan), r"norm\.bias holds NaN"),
        ("norm.bias", torch.full((64,), -7e4), r"norm\.bias reaches 70000, beyond the 65504 of fp16"),
        ("surplus.weight", torch.zeros(2), r"no place for surplus\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, tensor, message):
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    with pytest.raises(CheckpointError, match=message):
        to_engine_file(changed(checkpoint, name, tensor))


def test_a_gelu_checkpoint_cannot_pass_for_a_geluless_one():
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    with pytest.raises(CheckpointError, match=r"mlp\.fc1\.bias"):
        to_engine_file(dataclasses.replace(checkpoint, graph="geluless_int8"))


def test_the_description_shows_every_scale(seed):
    text = describe(random_engine_file(MICRO_DIGITS, "geluless_int8", seed=seed))
    assert "geluless_int8, int8_mode 1" in text
    row = next(line for line in text.splitlines() if line.startswith("fc1_aftergemm"))
    assert row.split() == ["fc1_aftergemm", "-", "-", "-", "-"]
    row = next(line for line in text.splitlines() if line.startswith("fc2_input"))
    assert all(float(cell) > 0 for cell in row.split()[1:])


def test_the_program_converts_there_and_back(tmp_path, capsys):
    _, checkpoint = calibrated(MICRO_DIGITS, True, 1)
    save_calibrated(tmp_path / "c.pth", checkpoint)
    paths = {name: str(tmp_path / name) for name in ("c.pth", "e.safetensors", "b.safetensors", "f.safetensors")}
    assert main(["to-engine", paths["c.pth"], paths["e.safetensors"]]) == 0
    assert main(["to-checkpoint", paths["e.safetensors"], paths["b.safetensors"]]) == 0
    assert main(["to-engine", paths["b.safetensors"], paths["f.safetensors"]]) == 0
    assert (tmp_path / "e.safetensors").read_bytes() == (tmp_path / "f.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["show", paths["f.safetensors"]]) == 0
    assert "geluless_int8" in capsys.readouterr().out


@pytest.mark.parametrize("graph", [None, "fused_int8"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_conversions_keep_how_images_are_normalized(suffix, graph, tmp_path, capsys):
    """Also numbers that are not the model's own in timm."""
    _, checkpoint = calibrated(NON_SQUARE, False, 1)
    noted = {"mean": [0.1, 0.25, 1 / 3], "std": [0.5, 1.0, 2.0], "interpolation": "bilinear", "crop_pct": 1.0}
    noted["crop_mode"] = "squash"
    checkpoint = dataclasses.replace(checkpoint, meta={**checkpoint.meta, "input": noted})
    save_calibrated(tmp_path / f"c{suffix}", checkpoint)
    engine, back = tmp_path / "e.safetensors", tmp_path / f"b{suffix}"
    to_engine = ["to-engine", str(tmp_path / f"c{suffix}"), str(engine), *(["--graph", graph] if graph else [])]
    assert main(to_engine) == 0
    assert load_engine_file(engine).meta["input"] == noted
    capsys.readouterr()
    assert main(["show", str(engine)]) == 0
    assert "\ninput      mean 0.1 0.25 0.333333, std 0.5 1 2, bilinear, crop_pct 1, squash\n" in capsys.readouterr().out
    first = engine.read_bytes()
    if graph is None:
        assert main(["to-checkpoint", str(engine), str(back)]) == 0
        assert load_calibrated(back).meta["input"] == noted
        to_engine[1] = str(back)
    assert main(to_engine) == 0
    assert engine.read_bytes() == first


@pytest.mark.parametrize("graph", ["ft_int8", "fused_int8"])
def test_a_file_that_does_not_say_how_images_are_normalized(graph, seed):
    ef = random_engine_file(MICRO_DIGITS, graph, seed=seed)
    assert "input" not in ef.meta, "nobody trained a random model on images"
    assert "\ninput      the file does not say" in describe(ef)


def test_the_program_makes_random_files(tmp_path):
    out = tmp_path / "random.safetensors"
    assert main(["random", "--graph", "geluless_int8", "--int8-mode", "2", "--seed", "3", str(out)]) == 0
    expected = random_engine_file(MICRO_DIGITS, "geluless_int8", 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(load_engine_file(out).tensors, expected.tensors))
    for words, size in (("28x42", (28, 42)), ("56", (56, 56))):
        assert main(["random", "--img-size", words, str(out)]) == 0
        assert load_engine_file(out).config.img_size == size


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["show", "missing"], FormatError, "no such file"),
        (["to-engine", "missing.pth", "out.safetensors"], CheckpointError, "no such file"),
        (["to-engine", "missing.pth", "out.bin"], HarnessError, r"must end in \.safetensors"),
        (["random", "--model", "resnet50", "out.safetensors"], HarnessError, "resnet50"),
    ],
)
def test_the_program_refuses_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        main(arguments)

"""The fused graph's weight list: its order, its files and their errors, and the converter that makes it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from quant_helpers import NON_SQUARE, THREE_STAGES, calibrated, one_thread
from v2_configs import FINE_TUNED, MICRO, SMALL

from pyharness.attention_geometry import attention_mask, expand_bias_table
from pyharness.calibrated import CalibratedCheckpoint, save_calibrated
from pyharness.config import BALANCED_RMS, ENGINE_GRAPHS, GRAPHS, MICRO_DIGITS, WEIGHT_SCALES
from pyharness.convert import describe, main, to_checkpoint, to_engine_file
from pyharness.engine_file import EngineFile, check_scales, load_engine_file, save_engine_file, weight_specs
from pyharness.errors import CalibrationError, CheckpointError, FormatError, HarnessError
from pyharness.fused_fakequant import fused_model
from pyharness.fused_format import AMAX_FIELDS, AMAX_FIELDS_V2, amax_fields
from pyharness.random_engine import random_engine_file
from pyharness.tensor_file import load_tensors, save_tensors
from pyharness.weight_steps import channel_steps, quantize_channels

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

SWIN_V1, SWIN_V2 = (MICRO_DIGITS, NON_SQUARE, THREE_STAGES), (MICRO, FINE_TUNED, SMALL)
CONFIGS = pytest.mark.parametrize("config", [*SWIN_V1, *SWIN_V2], ids=lambda c: c.name)
ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "gelu"])


def replaced(ef: EngineFile, name: str, change) -> EngineFile:
    """`ef` with the tensor `name` replaced by change(its copy)."""
    tensors = [change(t.clone()) if each == name else t for each, t in zip(ef.names, ef.tensors)]
    return dataclasses.replace(ef, tensors=tensors)


def with_value(value: float):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


# --- The list ---------------------------------------------------------------------------------------------------------

BLOCK = """attn.qkv.weight attn.qkv.weight_scale attn.qkv.bias attn.proj.weight attn.proj.weight_scale attn.proj.bias
mlp.fc1.weight mlp.fc1.weight_scale mlp.fc1.bias mlp.fc2.weight mlp.fc2.weight_scale mlp.fc2.bias norm1.weight norm1.bias
norm2.weight norm2.bias amax attn.relative_position_bias""".split()
STAGE = """downsample.norm.weight downsample.norm.bias downsample.reduction.weight downsample.reduction.weight_scale
downsample.amax attn_mask""".split()
END = """patch_embed.proj.weight patch_embed.proj.bias patch_embed.norm.weight patch_embed.norm.bias norm.weight
norm.bias""".split()
HEAD = ["head.weight", "head.bias"]
"""Written out from docs/fused.md, not taken from pyharness/fused_format.py."""


@CONFIGS
def test_the_list_has_the_documents_order(config):
    expected = []
    for stage, depth in enumerate(config.depths):
        names = BLOCK + (["attn.logit_scale"] if config.version == 2 else [])
        expected += [f"layers.{stage}.blocks.{block}.{name}" for block in range(depth) for name in names]
        expected += [f"layers.{stage}.{name}" for name in STAGE]
    expected += END + (HEAD if config.num_classes else [])
    assert [spec.name for spec in weight_specs(config, "fused_int8")] == expected
    assert random_engine_file(config, "fused_int8").names == expected
    assert AMAX_FIELDS == (
        "qkv_input", "matmul_q", "matmul_k", "matmul_v", "proj_input", "fc1_input", "fc2_input",
    )  # fmt: skip
    assert AMAX_FIELDS_V2 == ("qkv_input", "matmul_v", "proj_input", "fc1_input", "fc2_input")
    assert (amax_fields(1), amax_fields(2)) == (AMAX_FIELDS, AMAX_FIELDS_V2)


def test_shapes_of_the_micro_models_list():
    specs = {spec.name: spec for spec in weight_specs(MICRO_DIGITS, "fused_int8", gelu=True)}
    expected = {
        "layers.0.blocks.0.attn.qkv.weight": (torch.int8, (96, 32)),
        "layers.0.blocks.0.attn.qkv.weight_scale": (torch.float32, (96,)),
        "layers.0.blocks.1.attn.proj.bias": (torch.float32, (32,)),
        "layers.1.blocks.1.mlp.fc1.weight": (torch.int8, (256, 64)),
        "layers.1.blocks.1.mlp.fc1.bias": (torch.float32, (256,)),
        "layers.1.blocks.1.mlp.fc2.weight_scale": (torch.float32, (64,)),
        "layers.1.blocks.0.amax": (torch.float32, (7,)),
        "layers.1.blocks.0.attn.relative_position_bias": (torch.float32, (2, 49, 49)),
        "layers.0.downsample.norm.weight": (torch.float32, (128,)),
        "layers.0.downsample.reduction.weight": (torch.int8, (64, 128)),
        "layers.0.downsample.reduction.weight_scale": (torch.float32, (64,)),
        "layers.0.downsample.amax": (torch.float32, (1,)),
        "layers.0.attn_mask": (torch.float32, (4, 49, 49)),
        "patch_embed.proj.weight": (torch.float32, (32, 4)),
        "norm.weight": (torch.float32, (64,)),
        "head.weight": (torch.float32, (10, 64)),
    }
    assert {name: (specs[name].dtype, specs[name].shape) for name in expected} == expected


def test_shapes_that_are_swin_v2s():
    """The others are Swin-V1's."""
    specs, v1 = ({s.name: s for s in weight_specs(config, "fused_int8", gelu=True)} for config in (MICRO, MICRO_DIGITS))
    other = {name: (spec.dtype, spec.shape) for name, spec in specs.items() if spec != v1.get(name)}
    blocks = [f"layers.{i}.blocks.{j}." for i in (0, 1) for j in (0, 1)]
    expected = {f"{block}amax": (torch.float32, (5,)) for block in blocks}
    expected |= {f"{block}attn.logit_scale": (torch.float32, (1 if ".0.b" in block else 2,)) for block in blocks}
    expected |= {f"layers.0.downsample.norm.{name}": (torch.float32, (64,)) for name in ("weight", "bias")}
    assert other == expected


def test_empty_slots_follow_activation_and_geometry():
    def empty(config, gelu):
        return {spec.name for spec in weight_specs(config, "fused_int8", gelu) if spec.is_empty}

    last = {f"layers.1.{name}" for name in STAGE if name.startswith("downsample.")}
    fc1 = {f"layers.{i}.blocks.{j}.mlp.fc1.bias" for i in (0, 1) for j in (0, 1)}
    assert empty(MICRO_DIGITS, True) == last | {"layers.1.attn_mask"}
    assert empty(MICRO_DIGITS, False) == last | {"layers.1.attn_mask"} | fc1
    qkv = {f"layers.{i}.blocks.{j}.attn.qkv.bias" for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))}
    assert empty(NON_SQUARE, True) == last | qkv
    assert empty(MICRO, False) == empty(MICRO_DIGITS, False)
    assert empty(FINE_TUNED, True) == last | qkv
    plain = dataclasses.replace(MICRO_DIGITS, patch_norm=False)
    assert {"patch_embed.norm.weight", "patch_embed.norm.bias"} <= empty(plain, True)


# --- Files ------------------------------------------------------------------------------------------------------------


@CONFIGS
@ACTIVATIONS
def test_a_file_comes_back_as_it_was(config, activation, tmp_path, seed):
    ef = random_engine_file(config, "fused_int8", seed=seed, activation=activation)
    for name in ("a", "b"):
        save_engine_file(tmp_path / name, ef)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = load_engine_file(tmp_path / "a")
    assert (loaded.config, loaded.graph, loaded.int8_mode, loaded.meta) == (config, "fused_int8", 1, ef.meta)
    assert loaded.gelu == (activation == "gelu")
    for name, before, after in zip(ef.names, ef.tensors, loaded.tensors):
        assert before.dtype == after.dtype and torch.equal(before, after), name


@pytest.mark.parametrize("graph", ENGINE_GRAPHS)
def test_every_graph_says_whether_it_has_gelu(graph):
    assert random_engine_file(MICRO_DIGITS, graph).gelu == (graph == "ft_int8")


def test_random_files_depend_on_seed_and_activation(seed):
    first, second, other, gelu = (
        random_engine_file(MICRO_DIGITS, "fused_int8", seed=s, activation=a)
        for s, a in ((seed, "relu"), (seed, "relu"), (seed + 1, "relu"), (seed, "gelu"))
    )
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors))
    assert not torch.equal(first.tensors[0], other.tensors[0])
    assert "--activation gelu" in gelu.meta["hint"] and "--activation relu" in first.meta["hint"]
    for name, tensor in first.by_name().items():
        if name.endswith((".weight_scale", ".amax")):
            assert (tensor > 0).all() and len(tensor.unique()) == tensor.numel(), name
    with pytest.raises(HarnessError, match="activation 'tanh' is unknown"):
        random_engine_file(MICRO_DIGITS, "fused_int8", activation="tanh")


@ACTIVATIONS
def test_random_files_of_swin_v2(activation, seed):
    """k has no bias, a scale for every head, and amax that grow with the stream from block to block."""
    deep = dataclasses.replace(MICRO, depths=(4, 2))
    tensors = random_engine_file(deep, "fused_int8", seed=seed, activation=activation).by_name()
    for block in ("layers.0.blocks.1", "layers.1.blocks.0"):
        q, k, v = tensors[f"{block}.attn.qkv.bias"].chunk(3)
        assert q.all() and not k.any() and v.all()
        learnt = tensors[f"{block}.attn.logit_scale"]
        assert learnt.dtype == torch.float32 and len(learnt.unique()) == learnt.numel() and (learnt.exp() > 0.5).all()
        bias = tensors[f"{block}.attn.relative_position_bias"]
        assert bias.min() > 0 and bias.max() < 16 and bias.std() > 1
    amax = torch.stack([tensors[f"layers.0.blocks.{block}.amax"] for block in range(4)])
    assert (amax[3] > 1.5 * amax[0]).all() and (amax > 0).all() and len(amax.unique()) == amax.numel()


def test_gelu_in_some_blocks_only_is_refused():
    ef = random_engine_file(MICRO_DIGITS, "fused_int8", activation="gelu")
    with pytest.raises(FormatError, match=r"layers\.1\.blocks\.0\.mlp\.fc1\.bias is empty and other blocks have"):
        replaced(ef, "layers.1.blocks.0.mlp.fc1.bias", lambda t: t[:0])


def test_another_int8_mode_is_refused():
    with pytest.raises(FormatError, match="int8_mode 2 is unknown to fused_int8; choose 1"):
        dataclasses.replace(random_engine_file(MICRO_DIGITS, "fused_int8"), int8_mode=2)


def test_wrong_tensors_are_named(tmp_path):
    ef = random_engine_file(MICRO_DIGITS, "fused_int8")
    with pytest.raises(FormatError, match=r"attn\.proj\.weight_scale\) must be float32 \[32\], found float16"):
        replaced(ef, "layers.0.blocks.0.attn.proj.weight_scale", torch.Tensor.half)
    with pytest.raises(FormatError, match="has 92 tensors, found 91"):
        dataclasses.replace(ef, tensors=ef.tensors[:-1])
    save_engine_file(tmp_path / "engine", ef)
    tensors, header = load_tensors(tmp_path / "engine", FormatError)
    save_tensors(tmp_path / "engine", tensors, {**header, "graph": "ft_int8"})
    with pytest.raises(FormatError, match="not those of 'swin_micro_digits'"):
        load_engine_file(tmp_path / "engine")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30])
def test_every_unusable_amax_is_named(value, tmp_path):
    ef = random_engine_file(MICRO_DIGITS, "fused_int8")
    for name in ("layers.0.blocks.1.amax", "layers.0.downsample.amax"):
        ef = replaced(ef, name, with_value(value))
    with pytest.raises(CalibrationError) as error:
        save_engine_file(tmp_path / "engine", ef)
    assert "layers.0.blocks.1.mlp.fc2._input_quantizer has amax" in str(error.value)
    assert "layers.0.downsample.reduction._input_quantizer has amax" in str(error.value)
    assert str(error.value).count("has amax") == 2 and not (tmp_path / "engine").exists()


@pytest.mark.parametrize("field", AMAX_FIELDS_V2)
def test_an_unusable_amax_of_swin_v2_is_named_by_its_quantizer(field, tmp_path):
    quantizers = {"qkv_input": "attn.qkv._input", "matmul_v": "attn.matmul_v_input", "proj_input": "attn.proj._input",
                  "fc1_input": "mlp.fc1._input", "fc2_input": "mlp.fc2._input"}  # fmt: skip

    def zeroed(amax):
        amax[AMAX_FIELDS_V2.index(field)] = 0
        return amax

    ef = replaced(random_engine_file(MICRO, "fused_int8"), "layers.1.blocks.0.amax", zeroed)
    with pytest.raises(CalibrationError, match=rf"layers\.1\.blocks\.0\.{quantizers[field]}_quantizer has amax 0"):
        save_engine_file(tmp_path / "engine", ef)


def test_a_logit_scale_that_is_no_number_is_refused(tmp_path):
    ef = replaced(random_engine_file(MICRO, "fused_int8"), "layers.1.blocks.1.attn.logit_scale", with_value(float("nan")))
    with pytest.raises(FormatError, match=r"layers\.1\.blocks\.1\.attn\.logit_scale holds NaN or infinity"):
        save_engine_file(tmp_path / "engine", ef)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.0.blocks.1.mlp.fc1.weight_scale", 0.0, "has the step 0; every step must be greater"),
        ("layers.0.downsample.reduction.weight_scale", -0.5, "has the step -0.5"),
        ("layers.1.blocks.0.attn.qkv.weight_scale", float("nan"), "holds NaN or infinity"),
        ("layers.1.blocks.0.attn.qkv.weight_scale", float("inf"), "holds NaN or infinity"),
        ("layers.0.blocks.0.attn.proj.bias", float("nan"), "holds NaN or infinity"),
        ("layers.0.attn_mask", float("-inf"), "holds NaN or infinity"),
        ("head.bias", float("nan"), "holds NaN or infinity"),
        ("layers.1.blocks.1.mlp.fc2.weight", -128, "holds -128"),
    ],
)
def test_numbers_that_the_graph_cannot_compute_with_are_refused(name, value, message, tmp_path):
    ef = random_engine_file(MICRO_DIGITS, "fused_int8")
    check_scales(ef)
    with pytest.raises(FormatError, match=f"{name} {message}".replace(".", r"\.")):
        save_engine_file(tmp_path / "engine", replaced(ef, name, with_value(value)))


# --- Weights by channel -----------------------------------------------------------------------------------------------


def test_each_channel_has_its_own_step_and_rounds_half_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5], [-254.0, 1.0, 3.0, 254.0], [0.0, 0.0, 0.0, -0.0]])
    steps = channel_steps(weight)
    assert steps.tolist() == [1.0, 2.0, 1.0] and steps.dtype == torch.float32
    assert quantize_channels(weight, steps).tolist() == [[127, 0, 2, -2], [-127, 0, 2, 127], [0, 0, 0, 0]]
    assert quantize_channels(torch.tensor([[-128.0, 130.0]]), torch.ones(1)).tolist() == [[-127, 127]], "never -128"


def test_balanced_steps_are_no_finer_than_needed_and_no_coarser_than_the_tensors(seed):
    weight = torch.randn(64, 384, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, 1, 64)[:, None]
    weight[3] = torch.linspace(-1, 1, 384).sign()  # of one size
    weight[5, 1:] *= 0.01  # one large, the others small: fine steps would serve nothing
    channel, balanced, tensor = (channel_steps(weight, scales) for scales in WEIGHT_SCALES)
    assert len(tensor.unique()) == 1 and (balanced <= tensor).all() and (balanced >= channel).all()
    rms = weight.double().square().mean(1).sqrt() / balanced
    chosen = (balanced > channel) & (balanced < tensor)
    torch.testing.assert_close(rms[chosen], torch.full_like(rms[chosen], BALANCED_RMS), rtol=1e-6, atol=0)
    assert (rms[balanced < tensor] <= BALANCED_RMS * 1.000001).all()
    assert chosen[3] and balanced[5] == channel[5] and chosen.sum() > 40


def test_balanced_steps_where_all_weights_are_of_one_size():
    """The tensor's step is the finest then, and no step is coarser."""
    weight = torch.tensor([[9.0, -9.0], [1.0, 1.0], [0.0, 0.0]])
    steps = channel_steps(weight, "balanced")
    assert steps.tolist() == torch.tensor([9 / 127, 1 / 28, 1.0]).tolist()
    assert quantize_channels(weight, steps).tolist() == [[127, -127], [28, 28], [0, 0]]


def test_a_channel_too_small_for_a_step_is_zero():
    weight = torch.tensor([[1e-42, -1e-42], [1e-30, -1e-30]])
    steps = channel_steps(weight)
    assert steps[0] == 1 and steps[1] == pytest.approx(1e-30 / 127)
    assert quantize_channels(weight, steps).tolist() == [[0, 0], [127, -127]]


@settings(max_examples=100, deadline=None)
@given(hnp.arrays("float32", (3, 16), elements=st.floats(-4, 4, width=32)), st.floats(2**-10, 2**10, width=32))
def test_quantizing_a_channel_errs_by_half_a_step(values, size):
    weight = torch.from_numpy(values) * size
    steps = channel_steps(weight)
    q = quantize_channels(weight, steps)
    assert q.abs().max() <= 127
    error = (q.double() * steps.double()[:, None] - weight.double()).abs() / steps.double()[:, None]
    assert (error[weight.abs().amax(1) > 1e-30] <= 0.50001).all()


# --- The converter ----------------------------------------------------------------------------------------------------


def changed(checkpoint: CalibratedCheckpoint, name: str, tensor: torch.Tensor | None) -> CalibratedCheckpoint:
    """A copy with one tensor replaced or added; None removes it."""
    state = {**checkpoint.state, name: tensor}
    return dataclasses.replace(checkpoint, state={key: value for key, value in state.items() if value is not None})


@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
def test_the_file_holds_the_model(geluless):
    model, checkpoint = calibrated(THREE_STAGES, geluless, 1)
    ef = to_engine_file(checkpoint, "fused_int8")
    check_scales(ef)
    assert ef.graph == "fused_int8" and ef.gelu != geluless and ef.meta["made_from"] == checkpoint.graph
    tensors, state = ef.by_name(), checkpoint.state
    block, at = model.layers[1].blocks[1], "layers.1.blocks.1."
    reduction = model.layers[1].downsample.reduction.weight.detach()  # timm's place of what ends stage 0
    for name, weight in (
        (at + "attn.qkv", block.attn.qkv.weight),
        (at + "mlp.fc2", block.mlp.fc2.weight),
        ("layers.0.downsample.reduction", reduction),
    ):
        steps, q = tensors[name + ".weight_scale"], tensors[name + ".weight"]
        torch.testing.assert_close(steps, weight.detach().abs().amax(1) / 127, rtol=1e-6, atol=0)
        assert ((q * steps[:, None] - weight.detach()).abs() < 0.501 * steps[:, None]).all()
        assert (q.abs().amax(1) == 127).all()
    assert tensors[at + "amax"].tolist() == [
        float(state[f"{at}{name}_quantizer._amax"])
        for name in (
            "attn.qkv._input", "attn.matmul_q_input", "attn.matmul_k_input", "attn.matmul_v_input", "attn.proj._input",
            "mlp.fc1._input", "mlp.fc2._input",
        )
    ]  # fmt: skip
    wanted = float(state["layers.0.downsample.reduction._input_quantizer._amax"])
    assert tensors["layers.0.downsample.amax"].tolist() == [wanted]
    stage = list(THREE_STAGES.stages())[1]
    assert torch.equal(tensors["layers.1.attn_mask"], attention_mask(stage))
    table = block.attn.relative_position_bias_table.detach()
    assert torch.equal(tensors[at + "attn.relative_position_bias"], expand_bias_table(table, stage.window))
    assert torch.equal(tensors[at + "norm2.bias"], block.norm2.bias)
    assert torch.equal(tensors["patch_embed.proj.weight"], model.patch_embed.proj.weight.flatten(1))
    assert torch.equal(tensors["head.weight"], model.head.fc.weight), "in float32, not rounded to fp16"


@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
def test_the_file_holds_a_swin_v2(geluless):
    """What differs from a Swin-V1: no bias of k, five amax, the MLP of the position bias as a table, logit scales, norms
    behind the reductions."""
    model, checkpoint = calibrated(SMALL, geluless, 1)
    ef = to_engine_file(checkpoint, "fused_int8")
    check_scales(ef)
    assert ef.graph == "fused_int8" and ef.gelu != geluless and ef.meta["made_from"] == checkpoint.graph
    tensors, state = ef.by_name(), checkpoint.state
    block, at = model.layers[1].blocks[1], "layers.1.blocks.1."
    zero = torch.zeros(48)
    assert torch.equal(tensors[at + "attn.qkv.bias"], torch.cat((block.attn.q_bias, zero, block.attn.v_bias)))
    assert torch.equal(tensors[at + "attn.logit_scale"], block.attn.logit_scale.flatten())
    assert tensors[at + "amax"].tolist() == [
        float(state[f"{at}{name}_quantizer._amax"])
        for name in ("attn.qkv._input", "attn.matmul_v_input", "attn.proj._input", "mlp.fc1._input", "mlp.fc2._input")
    ]
    stage = list(SMALL.stages())[1]
    table = state[at + "attn.relative_position_bias_table"]
    assert torch.equal(tensors[at + "attn.relative_position_bias"], expand_bias_table(table, stage.window))
    assert not torch.equal(table, table.half().float()), "in float32, not rounded to fp16"
    for name in ("weight", "bias"):
        own = getattr(model.layers[1].downsample.norm, name)  # timm's place of what ends stage 0
        assert torch.equal(tensors[f"layers.0.downsample.norm.{name}"], own)
        assert torch.equal(tensors[f"{at}norm1.{name}"], getattr(block.norm1, name))
    steps, q = tensors[at + "attn.qkv.weight_scale"], tensors[at + "attn.qkv.weight"]
    assert ((q * steps[:, None] - block.attn.qkv.weight.detach()).abs() < 0.501 * steps[:, None]).all()


@pytest.mark.parametrize("config", SWIN_V1, ids=lambda c: c.name)
@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
def test_both_int8_modes_give_the_same_file(config, geluless):
    files = [to_engine_file(calibrated(config, geluless, mode)[1], "fused_int8") for mode in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(files[0].tensors, files[1].tensors))


@pytest.mark.parametrize("config", [MICRO_DIGITS, MICRO], ids=lambda c: c.name)
def test_only_the_quantizers_of_the_graph_are_read(config):
    _, checkpoint = calibrated(config, False, 1)
    expected = to_engine_file(checkpoint, "fused_int8")
    unused = ("_aftergemm_quantizer._amax", "_weight_quantizer._amax", "softmax_input_quantizer._amax", "matmul_a_input_quantizer._amax")
    if config.version == 2:
        unused += ("matmul_q_input_quantizer._amax", "matmul_k_input_quantizer._amax")
    state = {name: t for name, t in checkpoint.state.items() if not name.endswith(unused)}
    found = to_engine_file(dataclasses.replace(checkpoint, state=state), "fused_int8")
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, expected.tensors))


def test_missing_and_unusable_scales_are_named_once():
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    broken = changed(checkpoint, "layers.0.downsample.reduction._input_quantizer._amax", None)
    broken = changed(broken, "layers.1.blocks.0.attn.matmul_v_input_quantizer._amax", torch.tensor(0.0))
    with pytest.raises(CalibrationError) as error:
        to_engine_file(broken, "fused_int8")
    assert str(error.value).count("layers.0.downsample.reduction._input_quantizer has no amax") == 1
    assert "layers.1.blocks.0.attn.matmul_v_input_quantizer has amax 0" in str(error.value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("norm.bias", None, r"lacks norm\.bias \[64\]"),
        ("norm.bias", torch.zeros(63), r"norm\.bias must be \[64\], found \[63\]"),
        ("layers.0.blocks.0.mlp.fc2.weight", torch.full((32, 128), torch.nan), r"fc2\.weight holds NaN"),
        ("norm.bias", torch.full((64,), 1e300, dtype=torch.float64), r"norm\.bias reaches 1e\+300, beyond float32"),
        ("surplus.weight", torch.zeros(2), r"no place for surplus\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, tensor, message):
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    with pytest.raises(CheckpointError, match=message):
        to_engine_file(changed(checkpoint, name, tensor), "fused_int8")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.0.blocks.1.attn.q_bias", None, r"lacks layers\.0\.blocks\.1\.attn\.q_bias \[32\]"),
        ("layers.0.blocks.1.attn.logit_scale", torch.zeros(1), r"attn\.logit_scale must be \[1, 1, 1\], found \[1\]"),
        ("layers.1.blocks.0.attn.v_bias", torch.full((64,), torch.inf), r"attn\.v_bias holds NaN"),
        ("layers.0.blocks.0.attn.qkv.bias", torch.zeros(96), r"no place for layers\.0\.blocks\.0\.attn\.qkv\.bias"),
    ],
)
def test_tensors_of_swin_v2_that_do_not_fit_are_named(name, tensor, message):
    _, checkpoint = calibrated(MICRO, False, 1)
    with pytest.raises(CheckpointError, match=message):
        to_engine_file(changed(checkpoint, name, tensor), "fused_int8")


def test_what_fp16_cannot_hold_is_no_error_here():
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    ef = to_engine_file(changed(checkpoint, "norm.bias", torch.full((64,), -7e4)), "fused_int8")
    assert (ef.by_name()["norm.bias"] == -7e4).all()


@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
def test_the_program_converts_and_shows(geluless, tmp_path, capsys):
    _, checkpoint = calibrated(MICRO_DIGITS, geluless, 2)
    save_calibrated(tmp_path / "c.pth", checkpoint)
    calibrated_file, engine_file = str(tmp_path / "c.pth"), str(tmp_path / "e.safetensors")
    assert main(["to-engine", calibrated_file, engine_file, "--graph", "fused_int8"]) == 0
    expected = to_engine_file(checkpoint, "fused_int8").tensors
    assert all(torch.equal(a, b) for a, b in zip(load_engine_file(engine_file).tensors, expected))
    assert "--graph fused_int8" in load_tensors(engine_file, FormatError)[1]["hint"]
    capsys.readouterr()
    assert main(["show", engine_file]) == 0
    text = capsys.readouterr().out
    assert f"fused_int8, {'GELU-less' if geluless else 'with GELU'}" in text
    row = next(line for line in text.splitlines() if line.startswith("fc2_input")).split()
    amax = [float(checkpoint.state[f"layers.{i}.blocks.{j}.mlp.fc2._input_quantizer._amax"]) for i in (0, 1) for j in (0, 1)]
    assert [float(cell) for cell in row[1:]] == pytest.approx(amax, rel=1e-4)
    assert any(line.startswith("reduction.weight") for line in text.splitlines())
    with pytest.raises(HarnessError, match="cannot go back"):
        main(["to-checkpoint", engine_file, str(tmp_path / "back.pth")])
    other = GRAPHS[not geluless]
    with pytest.raises(HarnessError, match=f"calibrated for {checkpoint.graph}, not {other}"):
        main(["to-engine", calibrated_file, engine_file, "--graph", other])


def test_the_program_converts_and_shows_a_swin_v2(tmp_path, capsys):
    _, checkpoint = calibrated(MICRO, True, 1)
    save_calibrated(tmp_path / "c.safetensors", checkpoint)
    out = str(tmp_path / "e.safetensors")
    words = ["to-engine", str(tmp_path / "c.safetensors"), out, "--graph", "fused_int8", "--weight-scales", "balanced"]
    assert main(words) == 0
    expected = to_engine_file(checkpoint, "fused_int8", "balanced").tensors
    assert all(torch.equal(a, b) for a, b in zip(load_engine_file(out).tensors, expected))
    capsys.readouterr()
    assert main(["show", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[0] for line in lines if line.split() and line.split()[0] in AMAX_FIELDS]
    assert rows == list(AMAX_FIELDS_V2)
    row = next(line for line in lines if line.startswith("fc2_input")).split()
    amax = [float(checkpoint.state[f"layers.{i}.blocks.{j}.mlp.fc2._input_quantizer._amax"]) for i in (0, 1) for j in (0, 1)]
    assert [float(cell) for cell in row[1:]] == pytest.approx(amax, rel=1e-4)


def test_the_description_of_a_deep_model_shows_every_block():
    text = describe(random_engine_file(dataclasses.replace(THREE_STAGES, depths=(2, 6, 1)), "fused_int8"))
    header = [word for line in text.splitlines() if line.startswith("amax; steps") for word in line.split()[4:]]
    assert header == ["0.0", "0.1", *(f"1.{j}" for j in range(6)), "2.0"]


def test_the_program_makes_random_files(tmp_path):
    out = tmp_path / "random.safetensors"
    assert main(["random", "--graph", "fused_int8", "--activation", "gelu", "--seed", "3", str(out)]) == 0
    expected = random_engine_file(MICRO_DIGITS, "fused_int8", seed=3, activation="gelu")
    assert all(torch.equal(a, b) for a, b in zip(load_engine_file(out).tensors, expected.tensors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--graph", "fused_int8", "--int8-mode", "2"], "fused_int8 has no int8_mode 2"),
        (["--graph", "ft_int8", "--activation", "relu"], "--activation is for fused_int8; ft_int8 says itself"),
        (["--graph", "ft_int8", "--weight-scales", "tensor"], "--weight-scales is for fused_int8"),
    ],
)
def test_options_that_a_graph_would_ignore_are_refused(options, message, tmp_path):
    with pytest.raises(HarnessError, match=message):
        main(["random", *options, str(tmp_path / "random.safetensors")])


def test_scales_may_be_one_per_tensor(tmp_path):
    """Every channel has the step of the weight's largest value; the rest of the file is the same."""
    _, checkpoint = calibrated(MICRO_DIGITS, True, 1)
    save_calibrated(tmp_path / "c.safetensors", checkpoint)
    files = {}
    for scales in ("channel", "tensor"):
        out = tmp_path / f"{scales}.safetensors"
        words = ["to-engine", str(tmp_path / "c.safetensors"), str(out), "--graph", "fused_int8"]
        assert main([*words, "--weight-scales", scales]) == 0
        files[scales] = load_engine_file(out)
        assert files[scales].meta["weight_scales"] == scales
    channel, tensor = (file.by_name() for file in files.values())
    for name, values in tensor.items():
        if name.endswith(".weight_scale") and values.numel():
            weight, steps = checkpoint.state[name.removesuffix("_scale")], values.unique()
            assert len(steps) == 1 and len(channel[name].unique()) > 1
            torch.testing.assert_close(steps[0], weight.abs().max().float() / 127, rtol=1e-6, atol=0)
            q = tensor[name.removesuffix("_scale")]
            assert ((q * steps - weight).abs() < 0.501 * steps).all() and q.abs().max() == 127
        elif values.dtype != torch.int8:
            assert torch.equal(values, channel[name]), name
    with pytest.raises(HarnessError, match="--weight-scales is for --graph fused_int8"):
        main(["to-engine", str(tmp_path / "c.safetensors"), str(tmp_path / "x.safetensors"), "--weight-scales", "tensor"])
    with pytest.raises(HarnessError, match="weight scales 'row' are unknown"):
        to_engine_file(checkpoint, "fused_int8", "row")


def test_scales_may_be_balanced(tmp_path):
    """Steps and rounded weights as weight_steps gives them, in the file and in the fake-quantized model alike."""
    _, checkpoint = calibrated(MICRO_DIGITS, True, 1)
    file = to_engine_file(checkpoint, "fused_int8", "balanced")
    found, channel = file.by_name(), to_engine_file(checkpoint, "fused_int8").by_name()
    model = dict(fused_model(checkpoint, "balanced").named_parameters())
    changed_steps = 0
    for name, steps in found.items():
        if name.endswith(".weight_scale") and steps.numel():
            key = name.removesuffix("_scale")
            assert torch.equal(steps, channel_steps(checkpoint.state[key], "balanced"))
            torch.testing.assert_close(model[key], found[key] * steps[:, None], rtol=1e-6, atol=0)
            changed_steps += int((steps > channel[name]).sum())
    assert changed_steps > 0 and file.meta["weight_scales"] == "balanced"


def test_random_files_may_have_scales_per_tensor(tmp_path):
    out = tmp_path / "random.safetensors"
    assert main(["random", "--graph", "fused_int8", "--weight-scales", "tensor", str(out)]) == 0
    found = load_engine_file(out).by_name()
    weight = found["layers.0.blocks.0.mlp.fc1.weight"]
    assert weight.abs().max() == 127 and (weight.abs().amax(1) < 127).any()


def test_a_checkpoint_cannot_be_of_the_fused_graph():
    ef = random_engine_file(MICRO_DIGITS, "fused_int8")
    with pytest.raises(HarnessError, match="lacks most of the amax"):
        to_checkpoint(ef)

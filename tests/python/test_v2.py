"""Swin-V2 through the whole system: timm's model, quantizers, calibration, lists, engine, both graphs, distillation.

The criteria are those of Swin-V1's tests: test_fakequant.py, test_reference.py, test_convert.py and test_engine.py.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from op_targets import CPU_VARIANTS, CUDA_PARAMS, Target, target
from op_walk import walk
from quant_helpers import calibrated, exercised_model, images_for, one_thread, sqnr_db
from test_engine import SQNR_BOUND_DB, agreement_db, golden_logits, model_on, replace_scale, replace_tensor
from timm.models.swin_transformer_v2 import SwinTransformerV2
from v2_configs import CONFIGS, FINE_TUNED, MICRO, SMALL

from pyharness import models, reference
from pyharness.attention_geometry import expand_bias_table
from pyharness.calibrated import checkpoint_of, load_calibrated, save_calibrated
from pyharness.checkpoint import to_timm_layout
from pyharness.config import GRAPHS, MICRO_DIGITS, SwinConfig
from pyharness.convert import describe, to_checkpoint, to_engine_file
from pyharness.distill import DistillOptions, distill
from pyharness.engine import SwinInt8
from pyharness.engine_file import load_engine_file, save_engine_file
from pyharness.errors import CheckpointError, FormatError
from pyharness.evaluate import open_predictor
from pyharness.fakequant import FakeQuantSwin
from pyharness.position_bias import continuous_bias_table, log_spaced_offsets
from pyharness.quantize import calibrate
from pyharness.random_engine import random_engine_file
from pyharness.reference import Node, Quantized, ReferenceSwin, ResidualQuantized
from pyharness.reference_v2 import ReferenceSwinV2

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

TIMM = pytest.mark.parametrize("config", [MICRO, FINE_TUNED], ids=lambda c: c.name)
GELULESS = pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])


# --- Geometry and timm's models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,window,area",
    [("swinv2_tiny_window8_256", 8, 64), ("swinv2_tiny_window16_256", 16, 256)],
)
def test_geometry_of_timm_models(name, window, area):
    config = models.config_of(models.create_model(name, num_classes=3), name)
    assert (config.version, config.img_size, config.depths, config.embed_dim) == (2, (256, 256), (2, 2, 6, 2), 96)
    assert config.window_size == (window,) * 4 and config.pretrained_window_size == ()
    assert [stage.window_area for stage in config.stages()] == [area, area, area, 64]
    assert models.config_of(models.model_from_config(config), name) == config


@TIMM
def test_a_model_has_the_geometry_it_was_made_of(config):
    model = models.model_from_config(config)
    assert isinstance(model, SwinTransformerV2) and models.config_of(model, config.name) == config
    assert SwinConfig.from_json(config.to_json()) == config


def test_a_description_without_version_is_of_swin_v1():
    text = MICRO_DIGITS.to_json().replace(', "version": 1, "pretrained_window_size": []', "")
    assert "version" not in text and SwinConfig.from_json(text) == MICRO_DIGITS


@pytest.mark.parametrize(
    "change,message",
    [
        ({"version": 3}, "version 3 is unknown"),
        ({"qk_scale": 0.2}, "has a qk_scale; Swin-V2 has a logit_scale"),
        ({"pretrained_window_size": (7,)}, "pretrained_window_size has 1 entries, depths has 2"),
        ({"version": 1, "pretrained_window_size": (7, 7)}, "Swin-V1's position bias does not know"),
    ],
)
def test_bad_geometry_is_named(change, message):
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(MICRO, **change)


def test_microsofts_layout_loads(seed, tmp_path):
    """Names and derived buffers as in Microsoft's published files."""
    model = exercised_model(MICRO, seed)
    state = models.to_microsoft_layout(model.state_dict())
    assert "layers.0.downsample.norm.weight" in state and "head.weight" in state
    for block in ("layers.0.blocks.1.", "layers.1.blocks.0."):
        state[block + "attn.relative_coords_table"] = torch.zeros(1, 13, 13, 2)
        state[block + "attn.relative_position_index"] = torch.zeros(49, 49)
    torch.save({"model": state}, tmp_path / "published.pth")
    other = models.model_from_config(MICRO)
    models.load_weights(other, tmp_path / "published.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert to_timm_layout(state).keys() == model.state_dict().keys()


# --- The position bias ------------------------------------------------------------------------------------------------


def test_log_spaced_offsets_are_the_papers():
    """sign(x) log2(1 + |x|) / log2(8) of offsets scaled to -8..8 (Liu et al. 2022, equation 4, and its code)."""
    offsets = log_spaced_offsets((3, 5))
    assert offsets.shape == (5 * 9, 2)
    assert offsets[0].tolist() == pytest.approx([-math.log2(9) / 3] * 2)
    assert offsets[2 * 9 + 4].tolist() == [0, 0]
    assert offsets[3 * 9 + 3].tolist() == pytest.approx([math.log2(5) / 3, -math.log2(3) / 3])
    assert log_spaced_offsets((3, 3), 9)[-1].tolist() == pytest.approx([math.log2(3) / 3] * 2)
    assert log_spaced_offsets((1, 1)).tolist() == [[0, 0]]


@TIMM
def test_position_bias_is_what_timm_adds(config, seed):
    model = exercised_model(config, seed)
    trained = config.pretrained_window_size or (0, 0)
    for stage, layer in zip(config.stages(), model.layers):
        attn = layer.blocks[0].attn
        table = continuous_bias_table((attn.cpb_mlp[0].weight, attn.cpb_mlp[0].bias, attn.cpb_mlp[2].weight), stage.window, trained[stage.index])
        timms = 16 * attn.cpb_mlp(attn.relative_coords_table).view(-1, stage.heads).sigmoid()
        timms = timms[attn.relative_position_index.flatten()].view(stage.window_area, stage.window_area, -1)
        torch.testing.assert_close(expand_bias_table(table, stage.window), timms.permute(2, 0, 1))
        assert table.std() > 0.5, "the comparison needs a signal"


# --- The fake-quantized model -----------------------------------------------------------------------------------------


@TIMM
@GELULESS
def test_without_quantizers_it_is_timms_model(config, geluless, seed):
    model = exercised_model(config, seed, geluless)
    images = images_for(config, 3, seed)
    fake = FakeQuantSwin.from_timm(model, config)
    with torch.no_grad(), fake.quantizers_disabled():
        found, expected = fake(images), model(images)
    assert expected.std() > 0.1, "the comparison needs a signal"
    torch.testing.assert_close(found, expected, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("fault", ["shift", "mask", "position bias", "logit scale", "k bias", "norm order"])
def test_the_parity_test_sees_faults(fault, seed):
    model = exercised_model(MICRO, seed)
    images = images_for(MICRO, 2, seed)
    fake = FakeQuantSwin.from_timm(model, MICRO)
    block = fake.layers[0].blocks[1]
    with torch.no_grad():
        if fault == "shift":
            block.shift = (3, 2)
        elif fault == "mask":
            block.attn_mask = block.attn_mask.roll(1, 0)
        elif fault == "position bias":
            table = block.attn.relative_position_bias_table
            table.copy_(table.flip(0))
        elif fault == "logit scale":
            block.attn.logit_scale += 0.01
        elif fault == "k bias":
            block.attn.q_bias[:] = block.attn.q_bias.flip(0)
        else:
            block.norm1, block.norm2 = block.norm2, block.norm1
        with fake.quantizers_disabled():
            assert (fake(images) - model(images)).abs().max() > 1e-4


def test_a_logit_scale_counts_up_to_100(seed):
    model = exercised_model(MICRO, seed)
    with torch.no_grad():
        model.layers[0].blocks[0].attn.logit_scale.fill_(7.0)
        fake = FakeQuantSwin.from_timm(model, MICRO)
        with fake.quantizers_disabled():
            torch.testing.assert_close(fake(images_for(MICRO, 2, seed)), model(images_for(MICRO, 2, seed)), rtol=2e-5, atol=2e-5)
    file = random_engine_file(MICRO, "ft_int8", seed=seed)
    at_the_end = replace_tensor(file, "layers.0.blocks.0.attn.logit_scale", lambda t: torch.full_like(t, math.log(100)))
    beyond = replace_tensor(file, "layers.0.blocks.0.attn.logit_scale", lambda t: torch.full_like(t, 9.0))
    images = images_for(MICRO, 2, seed)
    assert torch.equal(SwinInt8.from_engine_file(beyond)(images), SwinInt8.from_engine_file(at_the_end)(images))
    assert torch.equal(ReferenceSwin(beyond)(images), ReferenceSwin(at_the_end)(images))
    assert not torch.equal(SwinInt8.from_engine_file(file)(images), SwinInt8.from_engine_file(at_the_end)(images))


QUANTIZERS_OF_OP = {
    "shift_partition": ("attn.qkv._input_quantizer",),
    "qkv_gemm": ("attn.qkv._aftergemm_quantizer",),
    "qkv_bias_normalize": tuple(f"attn.matmul_{x}_input_quantizer" for x in "qkv"),
    "qk_gemm": ("attn.softmax_input_quantizer",),
    "softmax": ("attn.matmul_a_input_quantizer",),
    "pv_gemm": ("attn.proj._input_quantizer",),
    "proj_gemm": ("attn.proj._aftergemm_quantizer",),
    "proj_bias_norm1_residual": ("mlp.fc1._input_quantizer",),
    "fc1_gemm": ("mlp.fc1._aftergemm_quantizer",),
    "fc1_bias_gelu": ("mlp.fc2._input_quantizer",),
    "fc2_gemm": ("mlp.fc2._aftergemm_quantizer",),
    "patch_merge": ("downsample.reduction._input_quantizer",),
    "reduction_gemm": ("downsample.reduction._aftergemm_quantizer",),
}
"""Which quantizers of the fake-quantized model make the int8 result of each operation."""


@TIMM
@GELULESS
def test_every_int8_tensor_is_its_quantizers_up_to_ties(config, geluless, seed, record_ties):
    """As in test_reference.py: each quantizer is compared, then its output replaced by the reference's."""
    _, checkpoint = calibrated(config, geluless, 1)
    fake = checkpoint.to_model()
    fake.round_parameters_to_fp16()
    file = to_engine_file(checkpoint_of(fake, {}))
    images = images_for(config, 3, seed)
    trace: dict[Node, object] = {}
    expected_logits = ReferenceSwin(file)(images, trace)
    expected = {}
    for node, value in trace.items():
        value = value.quantized if isinstance(value, ResidualQuantized) else value
        if isinstance(value, Quantized):
            names = ("mlp.fc2._input_quantizer",) if geluless and node.op == "fc1_gemm" else QUANTIZERS_OF_OP[node.op]
            prefix = f"layers.{node.stage}." + ("" if node.block is None else f"blocks.{node.block}.")
            parts = [value] if len(names) == 1 else [Quantized(*pair) for pair in zip(*value)]
            expected |= {prefix + name: part for name, part in zip(names, parts)}
    activations = {name: q for name, q in fake.quantizers() if not name.endswith("_weight_quantizer")}
    assert expected.keys() == activations.keys()

    def compare_and_replace(name):
        def hook(module, inputs, output):
            q, exact = (t.flatten() for t in expected[name])
            difference = ((output * 127 / module.amax).round().flatten() - q).abs()
            assert difference.max() <= 1, name
            assert not (difference.bool() & ~reference.near_tie(exact)).any(), name
            record_ties(int(difference.sum()), difference.numel())
            return (q * module.amax / 127).reshape(output.shape)

        return hook

    for name, quantizer in activations.items():
        quantizer.register_forward_hook(compare_and_replace(name))
    with torch.no_grad():
        torch.testing.assert_close(fake(images), expected_logits, rtol=1e-4, atol=1e-4)


def test_int8_mode_2_is_refused():
    with pytest.raises(FormatError, match="Swin-V2 has int8_mode 1 only, found 2"):
        FakeQuantSwin(MICRO, "ft_int8", 2)
    with pytest.raises(FormatError, match="Swin-V2 has int8_mode 1 only, found 2"):
        random_engine_file(MICRO, "ft_int8", 2)


# --- Lists and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MICRO, SMALL, FINE_TUNED], ids=lambda c: c.name)
@pytest.mark.parametrize("graph", GRAPHS)
def test_engine_file_to_checkpoint_and_back_is_exact(config, graph, tmp_path, seed):
    before = random_engine_file(config, graph, seed=seed)
    save_calibrated(tmp_path / "calibrated.safetensors", to_checkpoint(before))
    after = to_engine_file(load_calibrated(tmp_path / "calibrated.safetensors"))
    save_engine_file(tmp_path / "engine.safetensors", after)
    after = load_engine_file(tmp_path / "engine.safetensors")
    assert (before.config, before.graph, before.names) == (after.config, after.graph, after.names)
    assert all(torch.equal(a, b) for a, b in zip(before.tensors, after.tensors))


def test_the_list_is_swin_v1s_with_a_logit_scale_per_block(seed):
    file = random_engine_file(MICRO, "ft_int8", seed=seed)
    v1 = random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed)
    added = [name for name in file.names if name not in v1.names]
    assert added == [f"layers.{i}.blocks.{j}.attn.logit_scale" for i in (0, 1) for j in (0, 1)]
    assert file.names.index(added[0]) == 16
    tensors = file.by_name()
    assert tensors["layers.0.downsample.norm.weight"].shape == (64,)
    assert tensors[added[2]].dtype == torch.float32 and tensors[added[2]].shape == (2,)
    q, k, v = tensors["layers.0.blocks.0.attn.qkv.bias"].chunk(3)
    assert q.any() and not k.any() and v.any()
    assert "mha_q" in describe(file) and "add1_residual" not in describe(file) and "mha_q" not in describe(v1)


def test_a_bias_for_k_has_no_place_in_a_checkpoint(seed):
    file = random_engine_file(MICRO, "ft_int8", seed=seed)
    biased = replace_tensor(file, "layers.0.blocks.0.attn.qkv.bias", torch.ones_like)
    with pytest.raises(CheckpointError, match="layers.0.blocks.0.attn.qkv.bias has a bias for k"):
        to_checkpoint(biased)


@GELULESS
def test_from_timm_to_the_engine(geluless, tmp_path, seed):
    """Calibrated, written, read, converted and run: the engine differs from its fake-quantized model by less than what
    quantization costs that model against fp32."""
    model, checkpoint = calibrated(MICRO, geluless, 1)
    save_calibrated(tmp_path / "calibrated.safetensors", checkpoint)
    file = to_engine_file(load_calibrated(tmp_path / "calibrated.safetensors"))
    save_engine_file(tmp_path / "engine.safetensors", file)
    assert file.graph == ("geluless_int8" if geluless else "ft_int8")
    images = images_for(MICRO, 16, seed)
    with torch.no_grad():
        fp32 = model(images)
        fake = open_predictor(tmp_path / "calibrated.safetensors").predict(images)
        engine = open_predictor(tmp_path / "engine.safetensors").predict(images)
    assert sqnr_db(fp32, fake) > 25
    assert sqnr_db(fake, engine) > sqnr_db(fp32, fake)
    assert agreement_db(file, images, SwinInt8.from_engine_file(file)) > SQNR_BOUND_DB


# --- The engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", *CUDA_PARAMS])
def place(request) -> Target:
    """The CPU on its best instruction set, or the GPU with one type of residual stream."""
    return Target(request.param)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_engine_equals_reference(name, graph, seed):
    file = random_engine_file(CONFIGS[name], graph, seed=seed)
    images = images_for(file.config, 3, seed)
    model = SwinInt8.from_engine_file(file)
    wanted = golden_logits(file, images, model)
    for batch in (3, 1):  # the batch changes from call to call
        found = model(images[:batch])
        assert found.shape == wanted[:batch].shape and found.dtype == torch.float32
        assert sqnr_db(wanted[:batch], found) > SQNR_BOUND_DB
    assert torch.equal(model.forward_checked(images), model(images))


@pytest.mark.parametrize("variant", CPU_VARIANTS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_variant_equals_reference(variant, graph, seed):
    file = random_engine_file(MICRO, graph, seed=seed)
    with target(variant):
        assert agreement_db(file, images_for(MICRO, 3, seed), SwinInt8.from_engine_file(file)) > SQNR_BOUND_DB


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", ["micro", "not square", "window 16"])
def test_every_op_of_a_forward_pass(place, record_ties, name, graph, seed):
    file = random_engine_file(CONFIGS[name], graph, seed=seed)
    images = images_for(file.config, 2, seed)
    model = model_on(place, file)
    wanted = walk(file, images, model, place, record_ties)
    assert sqnr_db(wanted, model(images.to(place.device)).cpu()) > SQNR_BOUND_DB


@pytest.mark.parametrize("graph", GRAPHS)
def test_op_sequence(graph, seed):
    model = SwinInt8.from_engine_file(random_engine_file(MICRO, graph, seed=seed))
    block = [
        "shift_partition", "qkv_gemm", "qkv_bias_normalize", "qk_gemm", "softmax", "pv_gemm", "proj_gemm",
        "proj_bias_norm1_residual", "fc1_gemm", "fc1_bias_gelu", "fc2_gemm", "fc2_bias_norm2_residual",
    ]  # fmt: skip
    if graph == "geluless_int8":
        block.remove("fc1_bias_gelu")
    merge = ["patch_merge", "reduction_gemm", "reduction_norm"]
    wanted = ["patch_embed", "patch_embed_norm", *block, *block, *merge, *block, *block, "final_norm_pool", "head"]
    assert [info.name for info in model.ops(batch=2)] == wanted


MUTATIONS = {
    **{
        f"{field} 10 % off": lambda f, field=field: replace_scale(f, "layers.0.blocks.1", field, lambda a: 1.1 * a)
        for field in ("qkv_aftergemm", "matmul_q", "matmul_v", "softmax_input", "proj_aftergemm", "fc2_input", "fc2_weight", "fc2_aftergemm")
    },
    "reduction scale 10 % off": lambda f: replace_scale(f, "layers.0.blocks.1", "reduction_input", lambda a: 1.1 * a),
    "logit scale of one head 10 % off": lambda f: replace_tensor(f, "layers.1.blocks.0.attn.logit_scale", lambda t: t + torch.tensor([0.0, math.log(1.1)])),
    **{
        f"no {name}": lambda f, name=name: replace_tensor(f, name, torch.zeros_like)
        for name in (
            "layers.0.blocks.1.attn.qkv.bias", "layers.0.blocks.0.attn.proj.bias", "layers.0.blocks.1.mlp.fc2.bias",
            "layers.1.blocks.0.norm1.bias", "layers.1.blocks.0.norm2.bias", "layers.0.blocks.1.attn.relative_position_bias",
            "layers.0.downsample.norm.bias", "layers.0.attn_mask",
        )
    },
    "no FC1 bias": lambda f: replace_tensor(f, "layers.1.blocks.1.mlp.fc1.bias", torch.zeros_like),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_bound_is_broken_by(mutation, seed):
    file = random_engine_file(MICRO, "ft_int8", seed=seed)
    images = images_for(MICRO, 3, seed)
    assert agreement_db(file, images, SwinInt8.from_engine_file(file)) > SQNR_BOUND_DB
    assert agreement_db(file, images, SwinInt8.from_engine_file(MUTATIONS[mutation](file))) < SQNR_BOUND_DB


def test_the_bound_is_broken_by_a_window_that_shifts_wrongly(seed):
    """One token less to shift by, in one of the two directions."""
    file = random_engine_file(MICRO, "ft_int8", seed=seed)
    images = images_for(MICRO, 3, seed)

    class MisShifted(ReferenceSwinV2):
        def _block(self, x, stage, block, record):
            shift = (stage.shift[0] - 1, stage.shift[1]) if any(stage.shift) else stage.shift
            return super()._block(x, dataclasses.replace(stage, shift=shift), block, record)

    assert sqnr_db(MisShifted(file)(images), SwinInt8.from_engine_file(file)(images)) < SQNR_BOUND_DB


def test_the_model_op_can_be_traced(seed):
    model = SwinInt8.from_engine_file(random_engine_file(MICRO, "ft_int8", seed=seed))
    args = (images_for(MICRO, 2, seed), model._weights(), *model._config_args(), [], False, False)
    torch.library.opcheck(torch.ops.swin_int8.forward.default, args)


def engine_of(tensors, graph="ft_int8", int8_mode=1, **change):
    return lambda: SwinInt8(tensors, dataclasses.replace(MICRO, **change), graph, int8_mode)(torch.zeros(1, 1, 28, 28))


def test_wrong_lists_are_named(seed):
    file = random_engine_file(MICRO, "ft_int8", seed=seed)
    damaged = replace_tensor(file, "layers.0.blocks.1.attn.logit_scale", lambda t: torch.full_like(t, math.nan))
    geluless = random_engine_file(MICRO, "geluless_int8", seed=seed)
    cases = {
        r"found 82 tensors; 86 are needed: 17 a block": engine_of(random_engine_file(MICRO_DIGITS, "ft_int8").tensors),
        r"found 86 tensors; 82 are needed: 16 a block": engine_of(file.tensors, version=1),
        r"layers.0.blocks.1.attn.logit_scale .*head 0 has nan": engine_of(damaged.tensors),
        r"Swin-V2 has int8_mode 1 only, found 2": engine_of(file.tensors, int8_mode=2),
        r"mlp.fc1.bias .*no FC1 bias; a GELU checkpoint": engine_of(file.tensors, graph="geluless_int8"),
        r"mlp.fc1.bias .*found float16 \[0\]": engine_of(geluless.tensors),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


# --- Distillation -----------------------------------------------------------------------------------------------------


def test_a_gelu_less_student_is_distilled_and_calibrated(tmp_path, seed):
    config = dataclasses.replace(MICRO, name="two_blocks_v2", depths=(1, 1))
    images = images_for(config, 8, seed)
    dataset = torch.utils.data.TensorDataset(images, torch.arange(8) % 10)
    options = DistillOptions(batch_size=4, subset=1.0)
    summary = distill(exercised_model(config, seed), config.name, dataset, options, tmp_path)
    assert models.is_geluless(summary.student) and len(summary.rows) == 2
    student, meta = models.load_model(summary.student_path)
    assert meta["activation"] == "relu" and isinstance(student, SwinTransformerV2)
    fake = FakeQuantSwin.from_timm(student, config)
    calibrate(fake, [images], "max")
    file = to_engine_file(checkpoint_of(fake, {}))
    assert file.graph == "geluless_int8"
    assert agreement_db(file, images, SwinInt8.from_engine_file(file)) > SQNR_BOUND_DB

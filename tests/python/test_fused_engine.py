"""The fused graph on the engine, held to its golden model operation by operation; what test_engine.py is for FT's."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from fused_walk import golden_logits, outputs_by_node, walk
from op_targets import CPU_VARIANTS, CUDA_PARAMS, Target, target
from quant_helpers import calibrated
from test_engine import CONFIGS, images_for, model_on, sqnr_db
from v2_configs import CONFIGS as CONFIGS_V2
from v2_configs import FINE_TUNED, MICRO

from pyharness import engine
from pyharness.config import FUSED_GRAPH, MICRO_DIGITS, SwinConfig
from pyharness.convert import to_engine_file
from pyharness.engine import SwinInt8
from pyharness.engine_file import EngineFile, save_engine_file
from pyharness.evaluate import open_predictor
from pyharness.fused_fakequant import fused_model
from pyharness.fused_format import AMAX_FIELDS, AMAX_FIELDS_V2
from pyharness.models import config_of, create_model
from pyharness.random_engine import random_engine_file

engine.load()
pytestmark = pytest.mark.skipif(not engine.runs_graph(FUSED_GRAPH), reason="this engine has no graph fused_int8")

SQNR_BOUND_DB = 90.0
"""Logits against the golden ones that follow the engine: what is left is float32 against float64."""

ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "gelu"])

V2 = pytest.mark.skipif(not engine.runs_graph(FUSED_GRAPH, version=2), reason="this engine has no fused_int8 of Swin-V2")
ALL_CONFIGS = [
    *(pytest.param(config, id=name) for name, config in CONFIGS.items()),
    *(pytest.param(config, id=f"v2, {name}", marks=V2) for name, config in CONFIGS_V2.items()),
    pytest.param(FINE_TUNED, id="v2, fine tuned", marks=V2),
    pytest.param(dataclasses.replace(FINE_TUNED, depths=(1, 1)), id="v2, single blocks", marks=V2),
]
MICROS = pytest.mark.parametrize("config", [MICRO_DIGITS, pytest.param(MICRO, marks=V2)], ids=lambda c: c.name)


@pytest.fixture(params=CPU_VARIANTS)
def variant(request):
    with target(request.param):
        yield request.param


def fused_file(config, activation: str, seed: int) -> EngineFile:
    return random_engine_file(config, FUSED_GRAPH, seed=seed, activation=activation)


@ACTIVATIONS
@pytest.mark.parametrize("config", ALL_CONFIGS)
def test_every_op_of_a_forward_pass(config, activation, record_ties, seed):
    file = fused_file(config, activation, seed)
    images, model = images_for(file.config, 3, seed), SwinInt8.from_engine_file(file)
    wanted = walk(file, images, outputs_by_node(model, images), record_ties)
    for batch in (3, 1, 2):  # the batch changes from call to call
        found = model(images[:batch])
        assert found.shape == wanted[:batch].shape and found.dtype == torch.float32
        assert sqnr_db(found, wanted[:batch]) > SQNR_BOUND_DB


@ACTIVATIONS
@MICROS
def test_every_variant_equals_the_golden_model(variant, config, activation, record_ties, seed):
    file = fused_file(config, activation, seed)
    images, model = images_for(config, 4, seed), SwinInt8.from_engine_file(file)
    assert sqnr_db(model(images), walk(file, images, outputs_by_node(model, images), record_ties)) > SQNR_BOUND_DB


def with_parameters_of(file: EngineFile, real: torch.dtype) -> EngineFile:
    """The file with every tensor that a residual stream of that type is computed with rounded to it; scales of channels,
    their biases and amax stay float32 on every device."""
    kept = (".weight_scale", ".amax", "qkv.bias", "proj.bias", "fc1.bias", "fc2.bias", ".logit_scale")

    def rounded(name: str, t: torch.Tensor) -> torch.Tensor:
        own = name.startswith("patch_embed.") or not name.endswith(kept)
        return t.to(real).float() if own and t.dtype == torch.float32 else t

    return dataclasses.replace(file, tensors=[rounded(name, t) for name, t in zip(file.names, file.tensors)])


@pytest.fixture(params=["avx2", *CUDA_PARAMS])
def place(request):
    """A GPU with one type of residual stream, and a CPU, so that these tests run where there is no GPU."""
    with target(request.param) as found:
        yield found


@ACTIVATIONS
@pytest.mark.parametrize("config", ALL_CONFIGS)
def test_every_op_on_a_gpu(place: Target, config, activation, record_ties, seed):
    if not engine.runs_graph(FUSED_GRAPH, place.device.type, config.version):
        pytest.skip(f"this engine has no fused_int8 of Swin-V{config.version} on {place.device.type}")
    file = with_parameters_of(fused_file(config, activation, seed), place.real)
    images, model = images_for(file.config, 3, seed), model_on(place, file)
    logits = model(images.to(place.device))
    wanted = walk(file, images, outputs_by_node(model, images.to(place.device)), record_ties)
    assert sqnr_db(logits.cpu(), wanted) > SQNR_BOUND_DB
    for _ in range(2):  # on a GPU the second call records and the third replays
        assert torch.equal(model(images.to(place.device)), logits)


@pytest.mark.gpu
def test_every_op_of_swin_tiny_on_a_gpu(record_ties, seed):
    """At a batch whose first stage is enough rows to be taken in blocks (csrc/cuda/row_blocks.h), the others not."""
    name, place = "swin_tiny_patch4_window7_224", Target("cuda_fp16")
    file = with_parameters_of(fused_file(config_of(create_model(name), name), "relu", seed), place.real)
    images = images_for(file.config, 4, seed)
    model = model_on(place, file)
    wanted = walk(file, images, outputs_by_node(model, images.to(place.device)), record_ties)
    assert sqnr_db(model(images.to(place.device)).cpu(), wanted) > SQNR_BOUND_DB


def changed(file: EngineFile, name: str, change) -> EngineFile:
    tensors = [change(t.clone()) if each == name else t for each, t in zip(file.names, file.tensors)]
    return dataclasses.replace(file, tensors=tensors)


def scaled(index: int, factor: float):
    def change(tensor):
        tensor[index] *= factor
        return tensor

    return change


LARGE_WINDOWS = SwinConfig("large_windows", (72, 72), 2, 3, 7, 16, (2, 1), (2, 2), (9, 9))
"""Windows of 81 tokens."""


@pytest.mark.parametrize("version", [1, pytest.param(2, marks=V2)])
def test_a_bias_that_is_no_relative_one_stays_whole(variant, version, record_ties, seed):
    """Of large windows the CPU keeps the bias without its repetitions (swin/position_bias.h), where it has any."""
    config = dataclasses.replace(LARGE_WINDOWS, version=version)
    file, images = fused_file(config, "relu", seed), images_for(config, 2, seed)

    def moved(bias):
        bias[1, 40, 3] += 0.5
        return bias

    sizes = []
    for each in (file, changed(file, "layers.0.blocks.1.attn.relative_position_bias", moved)):
        model = SwinInt8.from_engine_file(each)
        assert sqnr_db(model(images), walk(each, images, outputs_by_node(model, images), record_ties)) > SQNR_BOUND_DB
        sizes.append([op.bytes_read for op in model.ops(2) if op.name == "attention"])
    assert sizes[1][1] - sizes[0][1] == 4 * 2 * (81 * 81 - 9 * 17 * 9)
    assert sizes[1][::2] == sizes[0][::2]


@MICROS
def test_a_wrong_step_stops_the_walk_and_breaks_the_bound(config, record_ties, seed):
    file, images = fused_file(config, "gelu", seed), images_for(config, 4, seed)
    wrong = changed(file, "layers.0.blocks.1.attn.proj.weight_scale", scaled(5, 1.1))
    model = SwinInt8.from_engine_file(wrong)
    outputs = outputs_by_node(model, images)
    with pytest.raises(AssertionError, match="stage=0, block=1, op='proj_norm'"):
        walk(file, images, outputs, record_ties)
    assert sqnr_db(model(images), golden_logits(file, images, outputs)) < SQNR_BOUND_DB


def test_op_sequence(seed):
    model = SwinInt8.from_engine_file(fused_file(MICRO_DIGITS, "relu", seed))
    block = ["qkv", "attention", "proj_norm", "mlp_norm"]
    stage = ["norm1_shift_partition", *block, *block]
    wanted = ["patch_embed", "patch_embed_norm", *stage, "patch_merge_norm", "reduction", *stage, "final_norm_pool", "head"]
    infos = model.ops(batch=3)
    assert [info.name for info in infos] == wanted
    mlp = next(info for info in infos if info.name == "mlp_norm")
    rows, c = 3 * 14 * 14, 32
    assert mlp.operations >= 2 * 2 * rows * 4 * c * c, "both GEMMs count"


@V2
def test_op_sequence_of_swin_v2(seed):
    model = SwinInt8.from_engine_file(fused_file(MICRO, "relu", seed))
    block = ["qkv", "attention", "proj_norm", "mlp_norm"]
    stage = ["shift_partition", *block, *block]
    merge = ["patch_merge", "reduction", "reduction_norm"]
    infos = model.ops(batch=3)
    wanted = ["patch_embed", "patch_embed_norm", *stage, *merge, *stage, "final_norm_pool", "head"]
    assert [info.name for info in infos] == wanted
    kinds = {info.name: info.kind for info in infos}
    assert {name for name, kind in kinds.items() if kind == "gemm"} == {"qkv", "proj_norm", "mlp_norm", "reduction"}
    assert all(kinds[name] == "fused" for name in ("shift_partition", "attention", "patch_merge", "reduction_norm"))
    places = [(info.stage, info.block) for info in infos if info.name in ("shift_partition", *merge)]
    assert places == [(0, 0), (0, -1), (0, -1), (0, -1), (1, 0)]


@V2
def test_a_logit_scale_counts_up_to_100(seed):
    file, images = fused_file(MICRO, "relu", seed), images_for(MICRO, 2, seed)
    name = "layers.0.blocks.0.attn.logit_scale"
    own, at_the_end, beyond = (
        SwinInt8.from_engine_file(changed(file, name, lambda t, value=value: t if value is None else t.fill_(value)))(images)
        for value in (None, math.log(100), 9.0)
    )
    assert torch.equal(beyond, at_the_end) and not torch.equal(own, at_the_end)


@V2
@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
def test_a_swin_v2_from_timm_to_the_fused_graph(geluless, tmp_path, seed):
    """Calibrated, written, converted, read and run: nearer to fp32 than FasterTransformer's graph, and than that to its
    own fake-quantized model."""
    model, checkpoint = calibrated(MICRO, geluless, 1)
    images, logits = images_for(MICRO, 16, seed), {}
    for graph in (FUSED_GRAPH, checkpoint.graph):
        save_engine_file(tmp_path / f"{graph}.safetensors", to_engine_file(checkpoint, graph))
        logits[graph] = open_predictor(tmp_path / f"{graph}.safetensors").predict(images)
    with torch.no_grad():
        fp32, faked = model(images), fused_model(checkpoint)(images)
    assert sqnr_db(logits[FUSED_GRAPH], fp32) > sqnr_db(logits[checkpoint.graph], fp32) > 25
    assert sqnr_db(logits[FUSED_GRAPH], faked) > sqnr_db(logits[FUSED_GRAPH], fp32) + 6


@ACTIVATIONS
@pytest.mark.parametrize(
    "config", [CONFIGS["three stages, head size 12 to 24"], pytest.param(CONFIGS_V2["three stages"], marks=V2)], ids=["v1", "v2"]
)
def test_poisoned_outputs_change_nothing(config, activation, seed):
    file = fused_file(config, activation, seed)
    images, model = images_for(file.config, 2, seed), SwinInt8.from_engine_file(file)
    assert torch.equal(model.forward_checked(images), model(images))


@ACTIVATIONS
@MICROS
def test_threads_do_not_change_the_result(config, activation, seed):
    model = SwinInt8.from_engine_file(fused_file(config, activation, seed))
    images = images_for(config, 3, seed)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(model(images))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


BAD_LISTS = {
    "amax of zero": ("layers.0.blocks.1.amax", scaled(AMAX_FIELDS.index("proj_input"), 0.0), "attn.proj._input_quantizer"),
    "NaN amax": ("layers.0.downsample.amax", scaled(0, float("nan")), "downsample"),
    "step of zero": ("layers.0.blocks.0.mlp.fc1.weight_scale", scaled(3, 0.0), "mlp.fc1.weight_scale"),
    "weight of -128": ("layers.1.blocks.0.attn.qkv.weight", lambda w: w.fill_(-128), "attn.qkv.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_weight_lists(case, seed):
    name, change, message = BAD_LISTS[case]
    model = SwinInt8.from_engine_file(changed(fused_file(MICRO_DIGITS, "relu", seed), name, change))
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        model(torch.zeros(1, 1, 28, 28))


BAD_LISTS_V2 = {
    **{
        f"amax of zero, {name}": ("layers.0.blocks.1.amax", scaled(index, 0.0), f"layers.0.blocks.1.{quantizer}")
        for index, (name, quantizer) in enumerate(
            zip(AMAX_FIELDS_V2, ("attn.qkv._input", "attn.matmul_v_input", "attn.proj._input", "mlp.fc1._input", "mlp.fc2._input"))
        )
    },
    "NaN logit scale": ("layers.1.blocks.0.attn.logit_scale", scaled(1, float("nan")), "layers.1.blocks.0.attn.logit_scale"),
    "logit scale of one head": ("layers.1.blocks.0.attn.logit_scale", lambda t: t[:1].clone(), "attn.logit_scale"),
    "norm of the input's size": ("layers.0.downsample.norm.weight", lambda t: t.repeat(2), "downsample.norm.weight"),
}  # fmt: skip


@V2
@pytest.mark.parametrize("case", BAD_LISTS_V2)
def test_bad_weight_lists_of_swin_v2(case, seed):
    name, change, message = BAD_LISTS_V2[case]
    file = fused_file(MICRO, "relu", seed)
    tensors = [change(t.clone()) if each == name else t for each, t in zip(file.names, file.tensors)]
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        SwinInt8(tensors, MICRO, FUSED_GRAPH)(torch.zeros(1, 1, 28, 28))


@V2
def test_lists_of_the_other_version_are_refused(seed):
    for config, other, message in (
        (MICRO, MICRO_DIGITS, "found 92 tensors; 96 are needed: 19 a block"),
        (MICRO_DIGITS, MICRO, "found 96 tensors; 92 are needed: 18 a block"),
    ):
        with pytest.raises(ValueError, match=message):
            SwinInt8(fused_file(other, "relu", seed).tensors, config, FUSED_GRAPH)(torch.zeros(1, 1, 28, 28))


@MICROS
def test_gelu_in_some_blocks_only_is_refused(config, seed):
    tensors = list((file := fused_file(config, "gelu", seed)).tensors)
    at = file.names.index("layers.1.blocks.0.mlp.fc1.bias")
    tensors[at] = tensors[at][:0]
    with pytest.raises(ValueError, match=r"layers\.1\.blocks\.0\.mlp\.fc1\.bias"):
        SwinInt8(tensors, config, FUSED_GRAPH)(torch.zeros(1, 1, 28, 28))

"""Models as backbones: what each stage gives, from the torch extension and the C library, held to the golden models' own
arithmetic (through the traced operations, which test_engine.py and test_fused_engine.py prove) and to timm's layout."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from op_targets import CPU_VARIANTS, CUDA_PARAMS, Target, target
from quant_helpers import NON_SQUARE, PADDED, PADDED_FIRST, THREE_STAGES, calibrated, one_thread
from test_engine import images_for, model_on, sqnr_db
from v2_configs import FINE_TUNED, SMALL

from pyharness.c_library import ERROR_ARGUMENT, CModel, StatusError, check, library
from pyharness.config import ENGINE_GRAPHS, MICRO_DIGITS
from pyharness.convert import to_engine_file
from pyharness.engine import SwinInt8
from pyharness.engine_file import save_engine_file
from pyharness.random_engine import random_engine_file

__all__ = ["one_thread"]
CONFIGS = [MICRO_DIGITS, NON_SQUARE, THREE_STAGES, PADDED, PADDED_FIRST, FINE_TUNED, SMALL]
CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
GRAPH = pytest.mark.parametrize("graph", ENGINE_GRAPHS)


def traced_stages(model: SwinInt8, images: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream that the last operation of each stage's last block left, [B, H, W, C]."""
    stages = list(model.config.stages())
    last: dict[int, torch.Tensor] = {}
    for op, outputs in model.trace(images):
        if op.stage >= 0 and op.block == stages[op.stage].depth - 1:
            last[op.stage] = outputs[0]
    return [last[s.index].reshape(len(images), *s.resolution, s.dim) for s in stages]


@GRAPH
@CONFIG
def test_every_stage_gives_its_residual_stream(config, graph, seed):
    model = SwinInt8.from_engine_file(random_engine_file(config, graph, seed=seed))
    images = images_for(config, 3, seed)
    wanted = traced_stages(model, images)
    found = model.forward_stages(images)
    assert len(found) == len(config.depths)
    for one, other in zip(found, wanted):
        assert one.dtype == torch.float32 and torch.equal(one, other)
    logits = model(images)
    for stage in range(len(config.depths)):  # one alone, and between calls of other kinds
        assert torch.equal(model.forward_stages(images, [stage])[0], wanted[stage])
    turned = model.forward_stages(images, [1, 0])
    assert torch.equal(turned[0], wanted[1]) and torch.equal(turned[1], wanted[0])
    assert torch.equal(model(images), logits)


@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_stages_on_every_instruction_set(variant, seed):
    with target(variant):
        model = SwinInt8.from_engine_file(random_engine_file(THREE_STAGES, "fused_int8", seed=seed))
        images = images_for(THREE_STAGES, 2, seed)
        for one, other in zip(model.forward_stages(images), traced_stages(model, images)):
            assert torch.equal(one, other)


RESEMBLANCE_DB = 20.0
"""Stages of an INT8 model against timm's in fp32. Measured: 26 to 39 dB; rows in reversed order give -1 to 9, channels -4 to
-2."""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("graph", ["ft_int8", "fused_int8"])
@pytest.mark.parametrize("config", [THREE_STAGES, NON_SQUARE, PADDED, PADDED_FIRST, SMALL], ids=lambda c: c.name)
def test_stages_are_those_of_timm(config, graph):
    """Against timm's own features of the same weights, [B, H, W, C]: order of tokens and channels, and where a stage ends."""
    timm_model, checkpoint = calibrated(config, False, 1)
    images = images_for(config, 4, 5)
    with torch.inference_mode():
        features = timm_model.eval().forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
    wanted = [t.permute(0, 2, 3, 1) for t in features]
    found = SwinInt8.from_engine_file(to_engine_file(checkpoint, graph)).forward_stages(images)
    assert [tuple(t.shape) for t in found] == [tuple(t.shape) for t in wanted]
    for one, other in zip(found, wanted):
        assert sqnr_db(one, other) > RESEMBLANCE_DB


def test_opcheck_and_export(seed):
    model = SwinInt8.from_engine_file(random_engine_file(PADDED, "fused_int8", seed=seed))
    images = images_for(PADDED, 2, seed)
    args = (images, model._weights(), *model._config_args(), [2, 0])
    torch.library.opcheck(torch.ops.swin_int8.forward_stages.default, args)
    compiled = torch.compile(lambda x: [t + 1 for t in model.forward_stages(x)], fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for one, other in zip(compiled(images), model.forward_stages(images)):
            assert torch.equal(one, other + 1)


@pytest.mark.parametrize("stages", [[3], [-1], [0, 0], [0, 1, 2, 0]])
def test_stages_that_are_not_there(stages, seed):
    model = SwinInt8.from_engine_file(random_engine_file(THREE_STAGES, "ft_int8", seed=seed))
    with pytest.raises(ValueError, match="numbers from 0 to 2, each once"):
        model.forward_stages(images_for(THREE_STAGES, 1, seed), stages)
    assert model.forward_stages(images_for(THREE_STAGES, 1, seed), []) == []


def test_images_with_nan_are_named(seed):
    model = SwinInt8.from_engine_file(random_engine_file(THREE_STAGES, "fused_int8", seed=seed))
    images = images_for(THREE_STAGES, 2, seed)
    images[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="image 1"):
        model.forward_stages(images, [0])


@GRAPH
@CONFIG
def test_the_c_library_gives_the_same(tmp_path, config, graph, seed):
    file = random_engine_file(config, graph, seed=seed)
    save_engine_file(tmp_path / "m.engine.safetensors", file)
    images = images_for(config, 2, seed)
    wanted = [t.numpy() for t in SwinInt8.from_engine_file(file).forward_stages(images)]
    with CModel(tmp_path / "m.engine.safetensors") as model:
        for one, other in zip(model.stages(images.numpy()), wanted, strict=True):
            assert np.array_equal(one, other)
        for stage, other in enumerate(wanted):  # one alone, with a guard behind it
            places = (ctypes.c_void_p * len(wanted))()
            out = np.full(other.size + 1, np.nan, np.float32)
            places[stage] = out.ctypes.data
            check(library().swin_stages(model.handle, images.numpy().ctypes.data, 2, places, None))
            assert np.array_equal(out[:-1], other.ravel()) and np.isnan(out[-1])


def test_mistakes_in_c(tmp_path, seed):
    path = tmp_path / "m.engine.safetensors"
    save_engine_file(path, random_engine_file(THREE_STAGES, "fused_int8", seed=seed))
    image, shape, lib = np.zeros((1, 1, 56, 56), np.float32), (ctypes.c_int64 * 3)(), library()
    places = (ctypes.c_void_p * 3)()
    with CModel(path) as model:
        assert model.info().stages == 3
        for call, message in (
            (lambda: lib.swin_stages(model.handle, image.ctypes.data, 1, None, None), "out is NULL"),
            (lambda: lib.swin_stages(model.handle, None, 1, places, None), "images is NULL"),
            (lambda: lib.swin_stages(None, image.ctypes.data, 1, places, None), "model is NULL"),
            (lambda: lib.swin_stages(model.handle, image.ctypes.data, 0, places, None), "batch is 0"),
            (lambda: lib.swin_stages(model.handle, image.ctypes.data, 1, places, 8), "there is a stream"),
            (lambda: lib.swin_stage_shape(model.handle, 3, shape), "stage is 3; the model has 0 to 2"),
            (lambda: lib.swin_stage_shape(model.handle, -1, shape), "stage is -1"),
            (lambda: lib.swin_stage_shape(model.handle, 0, None), "shape is NULL"),
        ):
            with pytest.raises(StatusError, match=message) as error:
                check(call())
            assert error.value.status == ERROR_ARGUMENT


@pytest.mark.gpu
@GRAPH
@pytest.mark.parametrize("place", [pytest.param(p.values[0], marks=pytest.mark.gpu) for p in CUDA_PARAMS])
def test_stages_on_a_gpu(place, graph, seed):
    file = random_engine_file(THREE_STAGES, graph, seed=seed)
    images, there = images_for(THREE_STAGES, 2, seed), Target(place)
    model = model_on(there, file)
    found, wanted = model.forward_stages(images.cuda()), traced_stages(model, images.cuda())
    for one, other, exact in zip(found, wanted, SwinInt8.from_engine_file(file).forward_stages(images)):
        assert one.dtype == there.real and torch.equal(one.cpu(), other)
        assert sqnr_db(one.cpu().float(), exact) > 30

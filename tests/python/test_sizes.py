"""One model, images of many sizes: what an engine computes of a size that its file was not made for is to the bit what the
same weights give in a file of that size (which test_engine.py, test_fused_engine.py and test_padding.py prove)."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import resource
import threading

import numpy as np
import pytest
import torch
from op_targets import CPU_VARIANTS, CUDA_PARAMS, Target, target
from quant_helpers import NON_SQUARE, PADDED, PADDED_FIRST, THREE_STAGES
from test_c_library import swin_run
from test_engine import images_for, model_on
from v2_configs import FINE_TUNED, SMALL

from pyharness.attention_geometry import attention_mask
from pyharness.c_library import ERROR_ARGUMENT, CModel, StatusError, check, library
from pyharness.config import ENGINE_GRAPHS, MICRO_DIGITS, SwinConfig
from pyharness.engine import SwinInt8
from pyharness.engine_file import save_engine_file, weight_specs
from pyharness.errors import EngineError
from pyharness.random_engine import random_engine_file

GRAPH = pytest.mark.parametrize("graph", ENGINE_GRAPHS)


def at(config: SwinConfig, size: tuple[int, int]) -> SwinConfig:
    return dataclasses.replace(config, img_size=size)


def bytes_of_masks(config: SwinConfig, graph: str) -> int:
    """Of the masks that a plan has of its own for images of this size: all of them in FT's graphs, in the fused one those
    that differ and a number for each window."""
    total = 0
    for stage in config.stages():
        if stage.shifts and graph == "fused_int8":
            kinds = {mask.numpy().tobytes() for mask in attention_mask(stage) if mask.any()}
            total += 4 * (len(kinds) * stage.window_area**2 + stage.windows)
        elif stage.shifts:
            total += 4 * stage.windows * stage.window_area**2
    return total


def model_of(config: SwinConfig, graph: str, seed: int) -> SwinInt8:
    return SwinInt8.from_engine_file(random_engine_file(config, graph, seed=seed))


# A model, and sizes of other images: without padding and with it, odd sides, one that shifts where the model's own
# does not.
CASES = [
    pytest.param(config, size, id=f"{config.name}-{size[0]}x{size[1]}")
    for config, sizes in {
        MICRO_DIGITS: [(56, 28), (42, 70), (62, 58)],
        NON_SQUARE: [(48, 32), (54, 90)],
        THREE_STAGES: [(112, 56), (84, 98), (66, 92)],
        PADDED: [(46, 58), (44, 106), (48, 112)],
        PADDED_FIRST: [(46, 58), (44, 106), (48, 112)],
        FINE_TUNED: [(64, 96), (70, 58)],
        SMALL: [(64, 96), (70, 58)],
    }.items()
    for size in sizes
]


def test_the_cases_are_what_they_say():
    cases = [(case.values[0], at(*case.values)) for case in CASES]
    assert all([s.window for s in own.stages()] == [s.window for s in other.stages()] for own, other in cases)
    assert {other.is_padded for _, other in cases} == {False, True}
    shifts = [(a.shifts, b.shifts) for own, other in cases for a, b in zip(own.stages(), other.stages())]
    assert {(False, True), (True, True)} <= set(shifts)


@GRAPH
@pytest.mark.parametrize(("config", "size"), CASES)
def test_another_size_is_what_a_file_of_that_size_gives(config, size, graph, seed):
    model, wanted = model_of(config, graph, seed), model_of(at(config, size), graph, seed)
    images = images_for(wanted.config, 3, seed)
    assert torch.equal(model(images), wanted(images))
    assert torch.equal(model.forward_features(images[:2]), wanted.forward_features(images[:2]))
    assert torch.equal(model.forward_checked(images), wanted(images))
    for one, other in zip(model.forward_stages(images), wanted.forward_stages(images), strict=True):
        assert one.shape == other.shape and torch.equal(one, other)
    for (op, outputs), (same, others) in zip(model.trace(images[:1]), wanted.trace(images[:1]), strict=True):
        assert (op.name, op.stage, op.block, op.shape) == (same.name, same.stage, same.block, same.shape)
        assert all(map(torch.equal, outputs, others))
    assert model.workspace_bytes(2, size) == wanted.workspace_bytes(2) + bytes_of_masks(wanted.config, graph)
    own = images_for(config, 2, seed)
    assert torch.equal(model(own), model_of(config, graph, seed)(own))


@pytest.mark.parametrize("config", [THREE_STAGES, SMALL], ids=lambda c: c.name)
@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_on_every_instruction_set(variant, config, seed):
    size = (70, 90)
    with target(variant):
        for graph in ("ft_int8", "fused_int8"):
            wanted = model_of(at(config, size), graph, seed)
            images = images_for(wanted.config, 2, seed)
            assert torch.equal(model_of(config, graph, seed)(images), wanted(images))


@GRAPH
def test_ever_other_sizes_share_memory(graph, seed):
    """More shapes than plans are kept, large and small ones in turns: what a shape's buffers held before does not show."""
    model = model_of(THREE_STAGES, graph, seed)
    sizes = [(56, 56), (112, 84), (60, 56), (84, 112), (56, 98), (98, 98), (64, 72)]
    shapes = [(batch, size) for size in sizes for batch in (1, 2)]
    inputs = {shape: images_for(at(THREE_STAGES, shape[1]), shape[0], seed) for shape in shapes}
    wanted = {shape: model_of(at(THREE_STAGES, shape[1]), graph, seed)(inputs[shape]) for shape in shapes}
    for shape in [*shapes, *reversed(shapes), *shapes[::3]]:
        assert torch.equal(model(inputs[shape]), wanted[shape])
    for shape in shapes:
        assert torch.equal(model.forward_checked(inputs[shape]), wanted[shape])


def test_sizes_from_several_threads(seed):
    model = model_of(THREE_STAGES, "fused_int8", seed)
    sizes = [(56, 56), (84, 112), (60, 92), (98, 70), (70, 56), (112, 56)]
    inputs = [images_for(at(THREE_STAGES, size), 2, seed) for size in sizes]
    wanted = [model(images) for images in inputs]
    wrong = []

    def call(first: int) -> None:
        for i in range(60):
            which = (first + i) % len(sizes)
            if not torch.equal(model(inputs[which]), wanted[which]):
                wrong.append(sizes[which])

    threads = [threading.Thread(target=call, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
@GRAPH
@pytest.mark.parametrize("place", [pytest.param(p.values[0], marks=pytest.mark.gpu) for p in CUDA_PARAMS])
def test_sizes_on_a_gpu(place, graph, seed):
    """Recorded passes too: from the second call of a shape on."""
    there = Target(place)
    model = model_on(there, random_engine_file(THREE_STAGES, graph, seed=seed))
    for size in [(56, 56), (84, 98), (66, 92), (112, 56), (60, 70), (84, 98)]:
        other = model_on(there, random_engine_file(at(THREE_STAGES, size), graph, seed=seed))
        images = images_for(other.config, 2, seed).cuda()
        for _ in range(3):
            assert torch.equal(model(images), other(images))


def test_masks_of_the_file_count_at_its_own_size(seed):
    """Whatever they are: a file's masks are weights. Images of another size get what Swin's geometry says."""
    file = random_engine_file(THREE_STAGES, "fused_int8", seed=seed)
    masks = [i for i, spec in enumerate(weight_specs(file.config, file.graph, file.gelu)) if "attn_mask" in spec.name]
    own, other = images_for(THREE_STAGES, 2, seed), images_for(at(THREE_STAGES, (84, 56)), 2, seed)
    before = SwinInt8.from_engine_file(file)
    for change in (torch.zeros_like, lambda mask: mask.flip(0), lambda mask: mask.flip(1) - torch.rand(mask.shape[-1])):
        tensors = [change(t).contiguous() if i in masks and t.numel() else t for i, t in enumerate(file.tensors)]
        changed = SwinInt8.from_engine_file(dataclasses.replace(file, tensors=tensors))
        assert not torch.equal(changed(own), before(own))
        assert torch.equal(changed(other), before(other))


def test_a_program_exported_for_many_sizes(seed):
    """torch.export with height and width left open: pooled features or logits, and the stages of a backbone."""
    model = model_of(THREE_STAGES, "fused_int8", seed)

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [self.model(images), *self.model.forward_stages(images, [0, 2])]

    sides = {i + 2: 2 * torch.export.Dim(name, min=28, max=2048) for i, name in enumerate(("rows", "columns"))}
    open_sizes = {"images": {0: torch.export.Dim("batch", min=1, max=64), **sides}}
    program = torch.export.export(Both(), (images_for(at(THREE_STAGES, (66, 92)), 2, seed),), dynamic_shapes=open_sizes)
    for batch, size in ((2, (66, 92)), (1, (56, 56)), (3, (84, 70))):
        images = images_for(at(THREE_STAGES, size), batch, seed)
        for one, other in zip(program.module()(images), Both()(images), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("size", [(66, 92), (56, 70)], ids=str)
def test_shapes_without_computing(size, seed):
    """What tracing says of the results' shapes is what they have."""
    model = model_of(THREE_STAGES, "fused_int8", seed)
    images = torch.zeros(2, 1, *size, device="meta")
    shapes = [tuple(t.shape) for t in (model.to("meta")(images), *model.forward_stages(images))]
    real = model_of(THREE_STAGES, "fused_int8", seed)
    images = images_for(at(THREE_STAGES, size), 2, seed)
    assert shapes == [tuple(t.shape) for t in (real(images), *real.forward_stages(images))]


# --- sizes that a model cannot have ---------------------------------------------------------------------------------

CUT_SHORT = SwinConfig("cut_short", (28, 56), 2, 1, 3, 16, (2, 2, 1), (1, 2, 2), (7, 7, 7))
"""14x28 tokens, 7x14 and 4x7: the last stage's windows are as high as the image."""

REFUSED = {
    "no whole patches": (MICRO_DIGITS, (29, 28), r"image of 29x28 does not divide into patches of 2"),
    "nothing": (MICRO_DIGITS, (0, 28), r"an image of 0x28"),
    "smaller windows": (MICRO_DIGITS, (28, 24), r"at 28x24 stage 0 would have windows of 7x7|stage 1 would have windows of 7x6, "
                        r"the model, made for images of 28x28, has 7x7; larger images are needed"),
    "larger windows": (CUT_SHORT, (56, 56), r"stage 2 would have windows of 7x7, the model, made for images of 28x56, has 4x7; "
                       r"convert the checkpoint for a size whose windows are not cut short"),
    "too large": (MICRO_DIGITS, (28, 1 << 17), r"an image of 28x131072 is larger than 65536x65536"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_sizes_that_do_not_fit(name, tmp_path, seed):
    config, size, message = REFUSED[name]
    file = random_engine_file(config, "fused_int8", seed=seed)
    model = SwinInt8.from_engine_file(file)
    images = torch.zeros(1, config.in_chans, *size)
    for call in (model, model.forward_stages, model.forward_features, model.trace, lambda x: model.ops(1, size)):
        with pytest.raises(ValueError, match=message):
            call(images)
    own = images_for(config, 1, seed)
    assert torch.equal(model(own), SwinInt8.from_engine_file(file)(own)), "a refused size left something behind"
    path = tmp_path / "m.engine.safetensors"
    save_engine_file(path, file)
    with CModel(path) as c, pytest.raises(StatusError, match=message) as error:
        c.at_size(*size)
    assert error.value.status == ERROR_ARGUMENT
    if 0 < min(size) and max(size) <= 65536:
        assert re.search(message, swin_run(path, "--img-size", f"{size[0]}x{size[1]}", status=1).stderr)


# --- the C library ----------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path, seed):
    file = random_engine_file(THREE_STAGES, "fused_int8", seed=seed)
    save_engine_file(tmp_path / "m.engine.safetensors", dataclasses.replace(file, meta=NORMALIZED))
    return tmp_path / "m.engine.safetensors"


NORMALIZED = {"input": {"mean": [0.25], "std": [0.5]}}
SIZE = (66, 92)


def test_a_model_at_another_size(path, seed):
    wanted = SwinInt8.from_engine_file(random_engine_file(at(THREE_STAGES, SIZE), "fused_int8", seed=seed))
    images, own = images_for(wanted.config, 2, seed), images_for(THREE_STAGES, 2, seed)
    model = CModel(path)
    before = model.forward(own.numpy())
    other = model.at_size(*SIZE)
    assert (model.image_shape, other.image_shape) == ((1, 56, 56), (1, *SIZE))
    assert np.array_equal(other.forward(images.numpy()), wanted(images).numpy())
    assert np.array_equal(model.forward(own.numpy()), before)
    model.close()  # the weights stay as long as one of the two does
    again = other.at_size(56, 56)
    assert np.array_equal(again.forward(own.numpy()), before)
    assert np.array_equal(other.features(images.numpy()), wanted.forward_features(images).numpy())
    for one, stage in zip(other.stages(images.numpy()), wanted.forward_stages(images), strict=True):
        assert np.array_equal(one, stage.numpy())
    assert other.workspace_bytes(3) == wanted.workspace_bytes(3) + bytes_of_masks(wanted.config, "fused_int8")
    info, first = other.info(), again.info()
    assert (info.height, info.width) == SIZE and (first.height, first.width) == (56, 56)
    assert (info.name, info.graph, info.threads, info.classes) == (first.name, first.graph, first.threads, first.classes)
    again.close()
    pixels = np.arange(2 * SIZE[0] * SIZE[1], dtype=np.uint8).reshape(2, *SIZE, 1)
    normalized = (pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) - np.float32(0.25)) / np.float32(0.5)
    assert np.array_equal(other.normalize(pixels), normalized)
    with pytest.raises(EngineError, match=r"\(2, 1, 56, 56\); float32 \(B, 1, 66, 92\) is needed, or `at_size`"):
        other.forward(own.numpy())
    other.close()


def test_batches_are_bounded_by_the_size(path):
    with CModel(path) as model, model.at_size(65536, 65536) as other:
        with pytest.raises(StatusError, match="batch is 5; 1 to 4 images are needed"):
            other.workspace_bytes(5)


@GRAPH
def test_masks_of_large_images_are_counted_and_not_made(graph, tmp_path, seed):
    """A picture of 65536x65536 has masks of 260 GB in FT's graphs."""
    save_engine_file(tmp_path / "engine", random_engine_file(THREE_STAGES, graph, seed=seed))
    size, peak = (65536, 65536), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with CModel(tmp_path / "engine") as model, model.at_size(*size) as other:
        one, two = other.workspace_bytes(1), other.workspace_bytes(2)
    stages = [stage for stage in at(THREE_STAGES, size).stages() if stage.shifts]
    kinds = 3 * sum(stage.window_area**2 for stage in stages)
    windows = sum(stage.windows for stage in stages)
    masks = 4 * (kinds + windows) if graph == "fused_int8" else 4 * windows * stages[0].window_area ** 2
    guards = 64 * 40  # behind each of some buffers, whatever the batch
    assert masks <= 2 * one - two <= masks + guards
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # KiB


def test_null_pointers(path):
    out = ctypes.c_void_p(8)
    with CModel(path) as model:
        for call, message in (
            (lambda: library().swin_at_size(None, 56, 56, ctypes.byref(out)), "model is NULL"),
            (lambda: library().swin_at_size(model.handle, 56, 56, None), "other is NULL"),
            (lambda: library().swin_at_size(model.handle, 57, 56, ctypes.byref(out)), "does not divide"),
        ):
            with pytest.raises(StatusError, match=message):
                check(call())
    assert out.value is None


# --- swin_run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_swin_run_takes_the_size_of_its_images(path, kind, tmp_path, seed):
    images, out = images_for(at(THREE_STAGES, SIZE), 3, seed).numpy(), tmp_path / "out.npy"
    with CModel(path) as model, model.at_size(*SIZE) as other:
        if kind == "uint8":
            pixels = np.random.default_rng(seed).integers(0, 256, (3, *SIZE, 1), np.uint8)
            images = other.normalize(pixels)
        wanted = other.forward(images)
    np.save(tmp_path / "images.npy", images if kind == "float32" else pixels)
    lines = swin_run(path, "--images", tmp_path / "images.npy", "--out", out, "--batch", 2).stdout.splitlines()
    assert np.array_equal(np.load(out), wanted)
    assert [int(line.split()[1]) for line in lines] == wanted.argmax(1).tolist()


def test_swin_run_measures_at_a_size(path):
    words = ("--img-size", "66x92", "--seconds", "0.05")
    assert "1 x 66 x 92 -> 10 classes" in swin_run(path, *words).stdout
    assert json.loads(swin_run(path, *words, "--json").stdout)["image"] == [1, 66, 92]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--img-size", "66"), "--img-size is '66'; height and width are needed, such as 800x1344"),
        (("--img-size", "66x"), "--img-size is ''"),
        (("--img-size", "66x9.5"), "whole number"),
        (("--img-size", "0x56"), "a number from 1 to 65536"),
        (("--img-size", "66x92", "--images", "IMAGES"), "--img-size is of random images and photographs"),
    ],
)
def test_swin_run_names_a_mistake(path, tmp_path, words, message):
    np.save(tmp_path / "images.npy", np.zeros((1, 1, 56, 56), np.float32))
    words = [tmp_path / "images.npy" if word == "IMAGES" else word for word in words]
    assert message in swin_run(path, *words, status=2).stderr


def test_swin_run_names_the_file_of_a_size_that_does_not_fit(path, tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((1, 1, 56, 26), np.float32))
    error = swin_run(path, "--images", tmp_path / "images.npy", status=1).stderr
    assert error.startswith(f"error: {tmp_path / 'images.npy'}: ") and "larger images are needed" in error

"""Shared by the tests of quantization: models whose every part matters, and the measure of an error."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor

from pyharness.config import MICRO_DIGITS, SwinConfig
from pyharness.models import exercise, make_geluless, model_from_config

NON_SQUARE = SwinConfig(
    name="non_square",
    img_size=(28, 56),
    patch_size=2,
    in_chans=3,
    num_classes=0,
    embed_dim=32,
    depths=(2, 3),
    num_heads=(1, 4),
    window_size=(7, 7),
    qkv_bias=False,
    qk_scale=0.3,
)
"""14x28 tokens, then 7x14: the second stage shifts along one axis only. No head, no QKV bias, an own qk_scale."""

THREE_STAGES = dataclasses.replace(
    MICRO_DIGITS,
    name="three_stages",
    img_size=(56, 56),
    depths=(2, 2, 1),
    num_heads=(1, 2, 4),
    window_size=(7, 7, 7),
)
"""28x28, 14x14 and 7x7 tokens: a merge behind a stage that shifts, and one with a single block."""

PADDED = dataclasses.replace(THREE_STAGES, name="padded", img_size=(44, 62))
"""22x31 tokens, 11x16 and 6x8, which windows of 7 do not divide, nor 2 the first two; the last window is 6 high."""

PADDED_FIRST = dataclasses.replace(PADDED, name="padded_first", pad_first=True)
"""The same with padding ahead of the shift."""


@pytest.fixture
def one_thread():
    """The models here are so small that PyTorch's threads wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def exercised_model(config: SwinConfig, seed: int, geluless: bool = False):
    """A timm model whose parameters all matter (`exercise`)."""
    model = model_from_config(config)
    exercise(model, seed)
    if geluless:
        make_geluless(model)
    return model


def images_for(config: SwinConfig, count: int, seed: int) -> Tensor:
    """Smooth, distinct random images f32 [count, in_chans, H, W]: coarse noise, enlarged, and some fine noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, config.in_chans, 7, 7, generator=generator)
    fine = torch.randn(count, config.in_chans, *config.img_size, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=config.img_size, mode="bilinear") + 0.3 * fine


@functools.cache
def calibrated(config: SwinConfig, geluless: bool, int8_mode: int, seed: int = 0):
    """(timm model, calibrated checkpoint) of `exercised_model`; not to be changed."""
    from pyharness.quantize import quantize

    model = exercised_model(config, seed, geluless)
    batches = images_for(config, 32, seed + 1).split(8)
    return model, quantize(model, config, batches, int8_mode=int8_mode)


def sqnr_db(exact: Tensor, found: Tensor) -> float:
    """10 log10 of signal power over error power; infinity where the two are equal."""
    noise = (exact.double() - found.double()).square().sum()
    return math.inf if noise == 0 else 10 * math.log10(exact.double().square().sum() / noise)

"""The weight list of the fused graph: names, places, shapes and dtypes of its tensors, once. Source: docs/fused.md."""

from __future__ import annotations

import dataclasses

from pyharness.ft_format import FINAL_WEIGHTS as FT_FINAL_WEIGHTS
from pyharness.ft_format import HEAD_WEIGHTS as FT_HEAD_WEIGHTS
from pyharness.ft_format import WeightField

AMAX_FIELDS = ("qkv_input", "matmul_q", "matmul_k", "matmul_v", "proj_input", "fc1_input", "fc2_input")
"""What a block's `amax` holds, in order: the scales' names in pyharness/ft_format.py."""

AMAX_FIELDS_V2 = tuple(name for name in AMAX_FIELDS if name not in ("matmul_q", "matmul_k"))
"""Swin-V2's: q and k of each head are rounded by their own largest."""

STAGE_AMAX_FIELDS = ("reduction_input",)
"""What `downsample.amax` holds."""

BLOCK_WEIGHTS: tuple[WeightField, ...] = (
    WeightField("attn.qkv.weight", "s8", ("3C", "C")),
    WeightField("attn.qkv.weight_scale", "f32", ("3C",)),
    WeightField("attn.qkv.bias", "f32", ("3C",), "empty where qkv_bias is off"),
    WeightField("attn.proj.weight", "s8", ("C", "C")),
    WeightField("attn.proj.weight_scale", "f32", ("C",)),
    WeightField("attn.proj.bias", "f32", ("C",)),
    WeightField("mlp.fc1.weight", "s8", ("F", "C")),
    WeightField("mlp.fc1.weight_scale", "f32", ("F",)),
    WeightField("mlp.fc1.bias", "f32", ("F",), "empty in a GELU-less model"),
    WeightField("mlp.fc2.weight", "s8", ("C", "F")),
    WeightField("mlp.fc2.weight_scale", "f32", ("C",)),
    WeightField("mlp.fc2.bias", "f32", ("C",)),
    WeightField("norm1.weight", "f32", ("C",)),
    WeightField("norm1.bias", "f32", ("C",)),
    WeightField("norm2.weight", "f32", ("C",)),
    WeightField("norm2.bias", "f32", ("C",)),
    WeightField("amax", "f32", (str(len(AMAX_FIELDS)),)),
    WeightField("attn.relative_position_bias", "f32", ("H", "N", "N")),
)

BLOCK_WEIGHTS_V2: tuple[WeightField, ...] = (
    *(dataclasses.replace(f, shape=(str(len(AMAX_FIELDS_V2)),)) if f.name == "amax" else f for f in BLOCK_WEIGHTS),
    WeightField("attn.logit_scale", "f32", ("H",)),
)
"""Swin-V2's block; `attn.qkv.bias` is (q, 0, v), `attn.logit_scale` what the checkpoint learnt, a logarithm."""

STAGE_WEIGHTS: tuple[WeightField, ...] = (
    WeightField("downsample.norm.weight", "f32", ("4C",), "empty in the last stage"),
    WeightField("downsample.norm.bias", "f32", ("4C",), "empty in the last stage"),
    WeightField("downsample.reduction.weight", "s8", ("2C", "4C"), "empty in the last stage"),
    WeightField("downsample.reduction.weight_scale", "f32", ("2C",), "empty in the last stage"),
    WeightField("downsample.amax", "f32", (str(len(STAGE_AMAX_FIELDS)),), "empty in the last stage"),
    WeightField("attn_mask", "f32", ("W", "N", "N"), "empty where the stage does not shift"),
)

STAGE_WEIGHTS_V2: tuple[WeightField, ...] = tuple(
    dataclasses.replace(f, shape=("2C",)) if f.name.startswith("downsample.norm.") else f for f in STAGE_WEIGHTS
)
"""Swin-V2 normalizes behind the reduction."""


def _float32(fields: tuple[WeightField, ...]) -> tuple[WeightField, ...]:
    return tuple(dataclasses.replace(field, dtype="f32") for field in fields)


FINAL_WEIGHTS = _float32(FT_FINAL_WEIGHTS)
HEAD_WEIGHTS = _float32(FT_HEAD_WEIGHTS)
"""As in FT's list, in float32."""


def amax_fields(version: int) -> tuple[str, ...]:
    """What `amax` holds in a block of Swin-V`version`, in order."""
    return AMAX_FIELDS_V2 if version == 2 else AMAX_FIELDS


def block_weights(version: int) -> tuple[WeightField, ...]:
    """The tensors of one block of Swin-V`version`."""
    return BLOCK_WEIGHTS_V2 if version == 2 else BLOCK_WEIGHTS


def stage_weights(version: int) -> tuple[WeightField, ...]:
    """The tensors behind a stage's blocks of Swin-V`version`."""
    return STAGE_WEIGHTS_V2 if version == 2 else STAGE_WEIGHTS

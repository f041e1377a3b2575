"""The weight list of the fused graph: names, places, shapes and dtypes of its tensors, once. Source: docs/fused.md."""

from __future__ import annotations

from pyharness.ft_format import FINAL_WEIGHTS as FT_FINAL_WEIGHTS
from pyharness.ft_format import HEAD_WEIGHTS as FT_HEAD_WEIGHTS
from pyharness.ft_format import WeightField

AMAX_FIELDS = ("qkv_input", "matmul_q", "matmul_k", "matmul_v", "proj_input", "fc1_input", "fc2_input")
"""What a block's `amax` holds, in order: the scales' names in pyharness/ft_format.py."""

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

STAGE_WEIGHTS: tuple[WeightField, ...] = (
    WeightField("downsample.norm.weight", "f32", ("4C",), "empty in the last stage"),
    WeightField("downsample.norm.bias", "f32", ("4C",), "empty in the last stage"),
    WeightField("downsample.reduction.weight", "s8", ("2C", "4C"), "empty in the last stage"),
    WeightField("downsample.reduction.weight_scale", "f32", ("2C",), "empty in the last stage"),
    WeightField("downsample.amax", "f32", (str(len(STAGE_AMAX_FIELDS)),), "empty in the last stage"),
    WeightField("attn_mask", "f32", ("W", "N", "N"), "empty where the stage does not shift"),
)


def _float32(fields: tuple[WeightField, ...]) -> tuple[WeightField, ...]:
    return tuple(WeightField(field.name, "f32", field.shape, field.optional) for field in fields)


FINAL_WEIGHTS = _float32(FT_FINAL_WEIGHTS)
HEAD_WEIGHTS = _float32(FT_HEAD_WEIGHTS)
"""As in FT's list, in float32."""

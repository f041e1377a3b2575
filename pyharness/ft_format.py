"""FasterTransformer's weight list and scale list: the one description that Python and C++ share.

Python encodes and decodes through the functions here. C++ gets the header that `python pyharness/ft_format.py
--header PATH` writes at build time: the same fields by name, so that no code reads a scale by its offset.
Source: docs/weight_format.md.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SCALE_LIST_LENGTH = 96

QUAD_PARTS = ("amax", "dequant", "dequant_div_127", "quant")
"""The four numbers of an activation entry: amax, amax/127, amax/127/127, 127/amax."""


@dataclass(frozen=True)
class ScaleField:
    """One named entry of the scale list.

    `kind` is "quad" (an activation, four numbers), "weight" (a weight's amax) or "factor" (amax_in * amax_weight /
    (127 * amax_out) of a GEMM). `quantizer` is the checkpoint's name below the block, or below the stage for names
    that begin with "downsample". `versions` are those of Swin whose list has the entry.
    """

    name: str
    index: int
    kind: Literal["quad", "weight", "factor"]
    quantizer: str = ""
    factor_of: tuple[str, str, str] = ("", "", "")
    versions: tuple[int, ...] = (1, 2)


SCALE_FIELDS: tuple[ScaleField, ...] = (
    ScaleField("qkv_input", 0, "quad", "attn.qkv._input_quantizer"),
    ScaleField("qkv_aftergemm", 4, "quad", "attn.qkv._aftergemm_quantizer"),
    ScaleField("proj_input", 8, "quad", "attn.proj._input_quantizer"),
    ScaleField("proj_aftergemm", 12, "quad", "attn.proj._aftergemm_quantizer"),
    ScaleField("matmul_q", 16, "quad", "attn.matmul_q_input_quantizer"),
    ScaleField("matmul_k", 20, "quad", "attn.matmul_k_input_quantizer"),
    ScaleField("matmul_v", 24, "quad", "attn.matmul_v_input_quantizer"),
    ScaleField("matmul_a", 28, "quad", "attn.matmul_a_input_quantizer"),
    ScaleField("softmax_input", 32, "quad", "attn.softmax_input_quantizer"),
    ScaleField("fc1_input", 36, "quad", "mlp.fc1._input_quantizer"),
    ScaleField("fc1_aftergemm", 40, "quad", "mlp.fc1._aftergemm_quantizer"),
    ScaleField("fc2_input", 44, "quad", "mlp.fc2._input_quantizer"),
    ScaleField("fc2_aftergemm", 48, "quad", "mlp.fc2._aftergemm_quantizer"),
    ScaleField("add1_residual", 52, "quad", "add1_residual_input_quantizer", versions=(1,)),
    ScaleField("add2_residual", 56, "quad", "add2_residual_input_quantizer", versions=(1,)),
    ScaleField("mha_q", 52, "quad", "attn.mha_q_input_quantizer", versions=(2,)),
    ScaleField("mha_k", 56, "quad", "attn.mha_k_input_quantizer", versions=(2,)),
    ScaleField("reduction_input", 60, "quad", "downsample.reduction._input_quantizer"),
    ScaleField("reduction_aftergemm", 64, "quad", "downsample.reduction._aftergemm_quantizer"),
    ScaleField("qkv_weight", 72, "weight", "attn.qkv._weight_quantizer"),
    ScaleField("proj_weight", 73, "weight", "attn.proj._weight_quantizer"),
    ScaleField("fc1_weight", 74, "weight", "mlp.fc1._weight_quantizer"),
    ScaleField("fc2_weight", 75, "weight", "mlp.fc2._weight_quantizer"),
    ScaleField("reduction_weight", 76, "weight", "downsample.reduction._weight_quantizer"),
    ScaleField("qkv_factor", 77, "factor", factor_of=("qkv_input", "qkv_weight", "qkv_aftergemm")),
    ScaleField("proj_factor", 78, "factor", factor_of=("proj_input", "proj_weight", "proj_aftergemm")),
    ScaleField("fc1_factor", 79, "factor", factor_of=("fc1_input", "fc1_weight", "fc1_aftergemm")),
    ScaleField("fc2_factor", 80, "factor", factor_of=("fc2_input", "fc2_weight", "fc2_aftergemm")),
    ScaleField("qk_factor", 81, "factor", factor_of=("matmul_q", "matmul_k", "softmax_input")),
    ScaleField("pv_factor", 82, "factor", factor_of=("matmul_a", "matmul_v", "proj_input")),
    ScaleField(
        "reduction_factor", 83, "factor", factor_of=("reduction_input", "reduction_weight", "reduction_aftergemm")
    ),
)
"""Entries 85..87 (fused attention) are written by `encode_scales` and read by no graph of ours; the rest is zero."""

FIELD_BY_NAME = {field.name: field for field in SCALE_FIELDS}

DISABLED_BY_FT = ("add1_residual", "add2_residual", "mha_q", "mha_k")
"""Listed quantizers that no graph here applies; their entries are zero where the checkpoint has no amax for them."""


def required_scales(graph: str, int8_mode: int, has_downsample: bool) -> tuple[str, ...]:
    """Names of the quads and weight amaxes that a block of `graph` needs, in list order.

    GELU-less blocks have no FC1 after-GEMM quantizer; int8_mode 2 has none after FC2 and the reduction (their GEMMs
    give s32); blocks of a stage without downsample have no reduction.
    """
    absent = set(DISABLED_BY_FT)
    if graph == "geluless_int8":
        absent.add("fc1_aftergemm")
    if int8_mode == 2:
        absent.update(("fc2_aftergemm", "reduction_aftergemm"))
    if not has_downsample:
        absent.update(("reduction_input", "reduction_aftergemm", "reduction_weight"))
    return tuple(f.name for f in SCALE_FIELDS if f.kind != "factor" and f.name not in absent)


def quantizer_name(scale: str, stage: int, block: int) -> str:
    """Checkpoint name of a quad or weight: `layers.0.blocks.1.attn.qkv._input_quantizer`; a reduction's its stage's."""
    name = FIELD_BY_NAME[scale].quantizer
    return f"layers.{stage}.{name}" if name.startswith("downsample.") else f"layers.{stage}.blocks.{block}.{name}"


def encode_scales(amax: Mapping[str, float], graph: str) -> list[float]:
    """The 96 numbers of one block from `amax` by field name; what `amax` lacks is zero, and so are its factors.

    In the GELU-less list fc1_factor's output is the FC2 input quantizer, since FC1's GEMM quantizes straight to it.
    Computed in float64; the caller rounds once, to float32.
    """
    values = [0.0] * SCALE_LIST_LENGTH
    for field in SCALE_FIELDS:
        if field.kind == "factor":
            a, w, out = field.factor_of
            if field.name == "fc1_factor" and graph == "geluless_int8":
                out = "fc2_input"
            if amax.get(a) and amax.get(w) and amax.get(out):
                values[field.index] = amax[a] * amax[w] / (127.0 * amax[out])
        elif amax.get(field.name):
            value = float(amax[field.name])
            values[field.index] = value
            if field.kind == "quad":
                values[field.index + 1 : field.index + 4] = [value / 127.0, value / 127.0 / 127.0, 127.0 / value]
    if all(amax.get(n) for n in ("matmul_q", "matmul_k", "matmul_a", "matmul_v", "proj_input")):
        values[85] = amax["matmul_q"] * amax["matmul_k"] / 127.0 / 127.0
        values[86] = 127.0 / amax["matmul_a"]
        values[87] = amax["matmul_v"] * amax["matmul_a"] / (127.0 * amax["proj_input"])
    return values


def decode_scales(values: list[float], version: int = 1) -> dict[str, float]:
    """amax by field name (quads and weights) from the scale list of a Swin of `version`; ValueError unless 96 long."""
    if len(values) != SCALE_LIST_LENGTH:
        raise ValueError(f"a scale list has {SCALE_LIST_LENGTH} numbers, found {len(values)}")
    return {f.name: float(values[f.index]) for f in SCALE_FIELDS if f.kind != "factor" and version in f.versions}


@dataclass(frozen=True)
class WeightField:
    """One tensor of the weight list. `shape` uses the symbols C (channels), F (MLP hidden), H (heads), N (window
    area), W (windows of the stage), E (embed_dim), P (in_chans * patch_size**2), L (final channels), K (classes);
    "empty" in `optional` says when the slot holds a tensor of no elements."""

    name: str
    dtype: Literal["s8", "f16", "f32"]
    shape: tuple[str, ...]
    optional: str = ""


BLOCK_WEIGHTS: tuple[WeightField, ...] = (
    WeightField("attn.qkv.weight", "s8", ("3C", "C")),
    WeightField("attn.qkv.bias", "f16", ("3C",), "empty where qkv_bias is off"),
    WeightField("attn.proj.weight", "s8", ("C", "C")),
    WeightField("attn.proj.bias", "f16", ("C",)),
    WeightField("mlp.fc1.weight", "s8", ("F", "C")),
    WeightField("mlp.fc1.bias", "f16", ("F",), "empty in the GELU-less list"),
    WeightField("mlp.fc2.weight", "s8", ("C", "F")),
    WeightField("mlp.fc2.bias", "f16", ("C",)),
    WeightField("norm1.weight", "f16", ("C",)),
    WeightField("norm1.bias", "f16", ("C",)),
    WeightField("norm2.weight", "f16", ("C",)),
    WeightField("norm2.bias", "f16", ("C",)),
    WeightField("amaxList", "f32", ("96",)),
    WeightField("h_amaxList", "f32", ("96",)),
    WeightField("attn.relative_position_bias", "f16", ("H", "N", "N")),
    WeightField("attn.relative_position_bias_padded", "f16", ("0",), "empty: the fused attention is not used"),
)

BLOCK_WEIGHTS_V2: tuple[WeightField, ...] = (*BLOCK_WEIGHTS, WeightField("attn.logit_scale", "f32", ("H",)))
"""Swin-V2's block: FT adds logit_scale. Here it is what the checkpoint learnt, a logarithm, in full precision. The
QKV bias is (q, 0, v), since V2's k has none."""

STAGE_WEIGHTS: tuple[WeightField, ...] = (
    WeightField("downsample.norm.weight", "f16", ("4C",), "empty in the last stage"),
    WeightField("downsample.norm.bias", "f16", ("4C",), "empty in the last stage"),
    WeightField("downsample.reduction.weight", "s8", ("2C", "4C"), "empty in the last stage"),
    WeightField("attn_mask", "f16", ("W", "N", "N"), "empty where the stage does not shift"),
    WeightField("attn_mask_padded", "f16", ("0",), "empty: the fused attention is not used"),
)

STAGE_WEIGHTS_V2: tuple[WeightField, ...] = (
    WeightField("downsample.norm.weight", "f16", ("2C",), "empty in the last stage"),
    WeightField("downsample.norm.bias", "f16", ("2C",), "empty in the last stage"),
    *STAGE_WEIGHTS[2:],
)
"""Swin-V2 normalizes behind the reduction."""

FINAL_WEIGHTS: tuple[WeightField, ...] = (
    WeightField("patch_embed.proj.weight", "f16", ("E", "P")),
    WeightField("patch_embed.proj.bias", "f16", ("E",)),
    WeightField("patch_embed.norm.weight", "f16", ("E",), "empty where patch_norm is off"),
    WeightField("patch_embed.norm.bias", "f16", ("E",), "empty where patch_norm is off"),
    WeightField("norm.weight", "f16", ("L",)),
    WeightField("norm.bias", "f16", ("L",)),
)

HEAD_WEIGHTS: tuple[WeightField, ...] = (
    WeightField("head.weight", "f16", ("K", "L"), "absent where num_classes is 0"),
    WeightField("head.bias", "f16", ("K",), "absent where num_classes is 0"),
)
"""Our addition behind FT's list: FT's engine stops at the features."""


def block_weights(version: int) -> tuple[WeightField, ...]:
    """The tensors of one block of Swin-V`version`."""
    return BLOCK_WEIGHTS_V2 if version == 2 else BLOCK_WEIGHTS


def stage_weights(version: int) -> tuple[WeightField, ...]:
    """The tensors behind a stage's blocks of Swin-V`version`."""
    return STAGE_WEIGHTS_V2 if version == 2 else STAGE_WEIGHTS


def weight_names(depths: tuple[int, ...], with_head: bool, version: int = 1) -> list[str]:
    """Full checkpoint names of the weight list, in order, for a model of `depths` blocks per stage."""
    names = []
    for stage, depth in enumerate(depths):
        for block in range(depth):
            names += [f"layers.{stage}.blocks.{block}.{field.name}" for field in block_weights(version)]
        names += [f"layers.{stage}.{field.name}" for field in STAGE_WEIGHTS]
    names += [field.name for field in FINAL_WEIGHTS]
    if with_head:
        names += [field.name for field in HEAD_WEIGHTS]
    return names


def _camel(name: str) -> str:
    return "k" + "".join(part[:1].upper() + part[1:] for part in name.replace(".", "_").split("_"))


def cpp_header() -> str:
    """The C++ header `ft_format.h`: struct BlockScales, its decoder, and an enum of each weight group."""
    quads = [f for f in SCALE_FIELDS if f.kind == "quad"]
    singles = [f for f in SCALE_FIELDS if f.kind != "quad"]
    lines = [
        "// Written by pyharness/ft_format.py at build time; edit the description there.",
        "#pragma once",
        "",
        "namespace swin {",
        "",
        f"inline constexpr int kScaleListLength = {SCALE_LIST_LENGTH};",
        "",
        "// One activation: amax, amax/127, amax/127/127, 127/amax. All zero where there is no such quantizer.",
        "struct ScaleQuad {",
        *[f"  float {part};" for part in QUAD_PARTS],
        "};",
        "",
        "struct BlockScales {",
        *[f"  ScaleQuad {f.name};  // {f.quantizer}" for f in quads],
        *[f"  float {f.name}_amax;  // {f.quantizer}" for f in singles if f.kind == "weight"],
        *[f"  float {f.name};  // {' * '.join(f.factor_of[:2])} / (127 * {f.factor_of[2]})"
          for f in singles if f.kind == "factor"],
        "};",
        "",
        "// `list` holds kScaleListLength numbers.",
        "inline BlockScales decode_scales(const float* list) {",
        "  BlockScales s{};",
    ]
    for f in quads:
        parts = ", ".join(f"list[{f.index + i}]" for i in range(4))
        lines.append(f"  s.{f.name} = ScaleQuad{{{parts}}};")
    for f in singles:
        suffix = "_amax" if f.kind == "weight" else ""
        lines.append(f"  s.{f.name}{suffix} = list[{f.index}];")
    lines += ["  return s;", "}", ""]
    for enum, group in (
        ("BlockWeight", BLOCK_WEIGHTS),
        ("StageWeight", STAGE_WEIGHTS),
        ("FinalWeight", FINAL_WEIGHTS),
        ("HeadWeight", HEAD_WEIGHTS),
    ):
        lines.append(f"enum {enum} : int {{")
        lines += [f"  {_camel(field.name)}," for field in group]
        lines += [f"  k{enum}Count,", "};"]
        names = ", ".join(f'"{field.name}"' for field in group)
        lines += [f"inline constexpr const char* k{enum}Names[] = {{{names}}};", ""]
    lines += [
        f"inline constexpr int kBlockWeightV2Count = {len(BLOCK_WEIGHTS_V2)};"
        f"  // Swin-V2 adds {', '.join(field.name for field in BLOCK_WEIGHTS_V2[len(BLOCK_WEIGHTS):])}",
        "",
        "}  // namespace swin",
        "",
    ]
    return "\n".join(lines)


def check_finite_positive(name: str, value: float) -> str | None:
    """What is wrong with an amax of `value`, in words, or None."""
    if math.isnan(value) or math.isinf(value):
        return f"{name} has amax {value}"
    if value <= 0:
        return f"{name} has amax {value:g}; it must be greater than zero"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the C++ header of FT's weight and scale lists.")
    parser.add_argument("--header", required=True, help="file to write; left untouched where nothing changed")
    path = parser.parse_args().header
    text = cpp_header()
    try:
        with open(path, encoding="utf-8") as file:
            if file.read() == text:
                return
    except OSError:
        pass
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    sys.exit(main())

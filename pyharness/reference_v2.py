"""The golden model of Swin-V2: what differs from pyharness/reference.py, whose conventions hold here too.

Cosine attention, norms behind the branches, a logit scale of each head's own. Formulas: docs/architecture.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyharness.config import StageGeometry
from pyharness.reference import (
    Quantized,
    ReferenceSwin,
    ResidualQuantized,
    _Recorder,
    dequantize,
    gemm_s8,
    in_image_order,
    in_window_order,
    layer_norm,
    neighbours,
    pv_gemm,
    qk_gemm,
    quantize,
    window_order,
)

NORMALIZE_EPS = 1e-12
"""Smallest length that a query or key is divided by."""


def shift_partition(residual: Tensor, order: Tensor, inverse_scale: float) -> Quantized:
    """Cyclic shift, window partition, quantize: [B, H, W, C] -> s8 [P, C] in window order."""
    return quantize(in_window_order(residual.flatten(1, 2), order), inverse_scale)


def qkv_bias_normalize(
    qkv: Tensor, scale: float, bias: Tensor, inverse_scales: tuple[float, float, float], heads: int, tokens: int
) -> Quantized:
    """Dequantize, add the bias, scale Q and K of each head to length 1, quantize: s8 [M, 3C] -> s8 [3, BW, h, N, d]."""
    x = dequantize(qkv, scale)
    if bias.numel():
        x = x + bias.double()
    rows, columns = x.shape
    q, k, v = x.reshape(rows // tokens, tokens, 3, heads, columns // (3 * heads)).permute(2, 0, 3, 1, 4)
    q, k = (t / t.square().sum(-1, keepdim=True).sqrt().clamp(min=NORMALIZE_EPS) for t in (q, k))
    parts = [quantize(part, inverse) for part, inverse in zip((q, k, v), inverse_scales)]
    return Quantized(torch.stack([p.q for p in parts]), torch.stack([p.exact for p in parts]))


def applied_logit_scale(learnt: Tensor) -> Tensor:
    """exp(min(logit_scale, log 100)) of each head: the engine's float32 numbers, as float64 [h]."""
    return torch.tensor([math.exp(min(x, math.log(100.0))) for x in learnt.tolist()]).double()


def softmax(
    scores: Tensor, scale: float, head_scale: Tensor, bias: Tensor, mask: Tensor | None, inverse_scale: float
) -> Quantized:
    """quantize(softmax(q * scale * head_scale[h] + bias + mask)), s8 [BW, h, N, N]; head_scale [h]."""
    x = dequantize(scores, scale) * head_scale.double()[:, None, None] + bias.double()
    if mask is not None:
        windows = mask.shape[0]
        x = (x.unflatten(0, (-1, windows)) + mask.double()[None, :, None]).flatten(0, 1)
    return quantize(torch.softmax(x, dim=-1), inverse_scale)


def proj_bias_norm1_residual(
    proj: Tensor,
    scale: float,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor,
    order: Tensor,
    inverse_scale: float,
) -> ResidualQuantized:
    """Dequantize, add the bias, LayerNorm, undo windows and shift, add the residual; quantize the residual.

    proj s8 [P, C] in window order, residual [B, H, W, C] -> residual [B, H, W, C] and s8 [M, C] in image order.
    """
    normed = layer_norm(dequantize(proj, scale) + bias.double(), norm_weight, norm_bias)
    residual = residual.double() + in_image_order(normed, residual, order)
    return ResidualQuantized(residual, quantize(residual.flatten(0, 2), inverse_scale))


def fc2_bias_norm2_residual(
    x: Tensor, scale: float, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, residual: Tensor
) -> Tensor:
    """Dequantize FC2's output, add the bias, LayerNorm, add the residual: float64 [B, H, W, C]."""
    normed = layer_norm(dequantize(x, scale) + bias.double(), norm_weight, norm_bias)
    return residual.double() + normed.reshape(residual.shape)


def patch_merge(residual: Tensor, inverse_scale: float) -> Quantized:
    """Gather 2x2 tokens (`neighbours`), quantize: [B, H, W, C] -> s8 [B*ceil(H/2)*ceil(W/2), 4C]."""
    return quantize(neighbours(residual).flatten(0, 2), inverse_scale)


def reduction_norm(
    x: Tensor, scale: float, weight: Tensor, bias: Tensor, shape: tuple[int, int, int, int]
) -> Tensor:
    """The next stage's residual stream, float64 [B, ceil(H/2), ceil(W/2), 2C]: dequantize the reduction's output,
    LayerNorm."""
    return layer_norm(dequantize(x, scale), weight, bias).reshape(shape)


class ReferenceSwinV2(ReferenceSwin):
    """The golden model of a Swin-V2 engine file; `ReferenceSwin(file)` is one where the file holds a Swin-V2."""

    def _block(self, x: Tensor, stage: StageGeometry, block: int, record: _Recorder) -> Tensor:
        prefix = f"layers.{stage.index}.blocks.{block}."
        order = window_order(stage, stage.block_shift(block))
        attended = self._attention(x, stage, block, order, record)
        s, w = self._scales(stage.index, block), self._weights
        x, fc1_in = record(
            "proj_bias_norm1_residual",
            proj_bias_norm1_residual(
                attended.q,
                s.dequant("proj_aftergemm"),
                w[prefix + "attn.proj.bias"],
                w[prefix + "norm1.weight"],
                w[prefix + "norm1.bias"],
                x,
                order,
                s.quant("fc1_input"),
            ),
        )
        hidden = self._fc1(fc1_in, prefix, s, record)
        fc2, scale = self._linear("fc2", hidden, w[prefix + "mlp.fc2.weight"], s, record)
        parameters = (w[prefix + name] for name in ("mlp.fc2.bias", "norm2.weight", "norm2.bias"))
        return record("fc2_bias_norm2_residual", fc2_bias_norm2_residual(fc2, scale, *parameters, x))

    def _attention(self, x: Tensor, stage: StageGeometry, block: int, order: Tensor, record: _Recorder) -> Quantized:
        prefix = f"layers.{stage.index}.blocks.{block}."
        s, w = self._scales(stage.index, block), self._weights
        y = record("shift_partition", shift_partition(x, order, s.quant("qkv_input")))
        y = record("qkv_gemm", gemm_s8(y.q, w[prefix + "attn.qkv.weight"], s.factor("qkv_factor")))
        inverse_scales = (s.quant("matmul_q"), s.quant("matmul_k"), s.quant("matmul_v"))
        y = record(
            "qkv_bias_normalize",
            qkv_bias_normalize(
                y.q,
                s.dequant("qkv_aftergemm"),
                w[prefix + "attn.qkv.bias"],
                inverse_scales,
                stage.heads,
                stage.window_area,
            ),
        )
        q, k, v = y.q
        y = record("qk_gemm", qk_gemm(q, k, s.factor("qk_factor")))
        shifted = any(stage.block_shift(block))
        y = record(
            "softmax",
            softmax(
                y.q,
                s.dequant("softmax_input"),
                applied_logit_scale(w[prefix + "attn.logit_scale"]),
                w[prefix + "attn.relative_position_bias"],
                w[f"layers.{stage.index}.attn_mask"] if shifted else None,
                s.quant("matmul_a"),
            ),
        )
        y = record("pv_gemm", pv_gemm(y.q, v, s.factor("pv_factor")))
        return record("proj_gemm", gemm_s8(y.q, w[prefix + "attn.proj.weight"], s.factor("proj_factor")))

    def _merge(self, x: Tensor, stage: StageGeometry, record: _Recorder) -> Tensor:
        prefix = f"layers.{stage.index}.downsample."
        s, w = self._scales(stage.index, stage.depth - 1), self._weights
        batch, height, width, channels = x.shape
        y = record("patch_merge", patch_merge(x, s.quant("reduction_input")))
        out, scale = self._linear("reduction", y, w[prefix + "reduction.weight"], s, record)
        shape = (batch, (height + 1) // 2, (width + 1) // 2, 2 * channels)
        normed = reduction_norm(out, scale, w[prefix + "norm.weight"], w[prefix + "norm.bias"], shape)
        return record("reduction_norm", normed)

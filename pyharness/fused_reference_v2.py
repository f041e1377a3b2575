"""The golden model of Swin-V2's fused graph: what differs from pyharness/fused_reference.py, whose conventions hold
here too.

Attention by cosine, norms behind the branches: the residual stream itself is quantized. Formulas: docs/fused.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyharness.config import StageGeometry
from pyharness.fused_reference import (
    FusedReferenceSwin,
    Linear,
    Quantized,
    Stream,
    _float32,
    _Recorder,
    accumulate,
    attend,
    linear_float,
    mlp,
    round_clamp,
    split_heads,
    with_mask,
)
from pyharness.reference import EPS, gemm_s32, in_image_order, in_window_order, layer_norm, window_order
from pyharness.reference_v2 import NORMALIZE_EPS, applied_logit_scale, patch_merge

COSINE_ROUNDINGS = 6
"""Of float32 in a cosine times its head's scale: two roots, two products and two quotients."""

SECOND_ORDER = 1.1
"""What `norm_slack` allows for more than its first order: hidden channels at ties move a row of the branch by far less
than its standard deviation."""


# --- Operations -------------------------------------------------------------------------------------------------------


def quantize_stream(residual: Tensor, inverse_scale: float, order: Tensor | None = None) -> Quantized:
    """Quantize: [B, H, W, C] -> s8 [M, C]; s8 [P, C] in window order where `order` (int64 [P / B]) is given."""
    x = residual.double().flatten(1, 2)
    exact = (x.flatten(0, 1) if order is None else in_window_order(x, order)) * inverse_scale
    return Quantized(round_clamp(exact), exact)


def linear_cosine_qkv(x: Tensor, linear: Linear, heads: int) -> Quantized:
    """y = acc * scale[n] + bias[n], columns (q, k or v; head; channel): s8 [M, K] -> s8 [M, 3C].

    v: clamp(rne(y)). A row's head of q or k: clamp(rne(y * 127 / its largest abs(y))).
    """
    y = accumulate(x, linear)
    q, k, v = y.unflatten(1, (3, heads, -1)).unbind(1)
    q, k = (t * (127 / t.abs().amax(-1, keepdim=True).clamp(min=NORMALIZE_EPS)) for t in (q, k))
    exact = torch.stack((q, k, v), 1).reshape(y.shape)
    return Quantized(round_clamp(exact), exact)


def cosine_attention(
    qkv: Tensor, head_scale: Tensor, bias: Tensor, mask: Tensor | None, output_factor: float
) -> Quantized:
    """`window_attention` by cosine, whose `heads` and `factor` head_scale f32 [h] stands for:

    x[j] = (q k[j]) * head_scale[h] / (len(q) * len(k[j])) + bias[h, i, j] + mask[w, i, j], len(a) = sqrt(max(1, a a)).
    """
    q, k, v = split_heads(qkv, len(head_scale), bias.shape[-1])
    length_q, length_k = (t.double().square().sum(-1).clamp(min=1).sqrt() for t in (q, k))
    cosine = gemm_s32(q, k).double() / (length_q[..., :, None] * length_k[..., None, :])
    scaled = cosine * head_scale.double()[:, None, None]
    biased = scaled + bias.double()
    x = with_mask(biased, mask)
    # The engine's x is float32: what a scaled cosine takes, and two sums.
    error = (COSINE_ROUNDINGS * scaled.abs() + biased.abs() + (x.abs() if mask is not None else 0)) * 2.0**-24
    return attend(x, error, v, output_factor)


def linear_post_norm_residual(
    x: Tensor,
    linear: Linear,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor,
    order: Tensor,
    inverse_scale: float,
) -> Stream:
    """residual + LayerNorm of the linear layer of x, then quantize in image order; x s8 [M, K] in window order. The
    attention's projection and norm1."""
    normed = layer_norm(accumulate(x, linear), norm_weight, norm_bias)
    stream = residual.double() + in_image_order(normed, residual, order)
    return Stream(stream, quantize_stream(stream, inverse_scale))


def norm_slack(y: Tensor, slack: Tensor, norm_weight: Tensor) -> Tensor:
    """The most that a LayerNorm of rows y [M, C] moves by where they move by at most `slack`, float64 [M, C]:
    abs(gamma[i]) / std * (slack[i] + mean(slack) + abs(z[i]) * mean(abs(z) * slack)) with the normalized row z."""
    centred = y - y.mean(-1, keepdim=True)
    std = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    z = (centred / std).abs()
    moved = slack + slack.mean(-1, keepdim=True) + z * (z * slack).mean(-1, keepdim=True)
    return SECOND_ORDER * norm_weight.double().abs() / std * moved


def mlp_post_norm_residual(
    x: Tensor,
    fc1: Linear,
    fc2: Linear,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor,
    gelu_inverse_scale: float | None = None,
    inverse_scale: float | None = None,
    order: Tensor | None = None,
) -> Stream:
    """residual + LayerNorm of FC1, ReLU or GELU, FC2; then quantize in the next block's window order. x s8 [M, C] in
    image order. Without `inverse_scale` nothing but the residual stream [B, H, W, C] is written."""
    y, slack = mlp(x, fc1, fc2, gelu_inverse_scale)
    stream = residual.double() + layer_norm(y, norm_weight, norm_bias).reshape(residual.shape)
    quantized = None if inverse_scale is None else quantize_stream(stream, inverse_scale, order)
    return Stream(stream, quantized, norm_slack(y, slack, norm_weight).reshape(residual.shape))


# --- The whole model --------------------------------------------------------------------------------------------------


class FusedReferenceSwinV2(FusedReferenceSwin):
    """The golden model of a Swin-V2's engine file; `FusedReferenceSwin(file)` is one where the file holds a Swin-V2."""

    def _enter(self, x: Tensor, stage: StageGeometry, record: _Recorder) -> Tensor:
        return record("shift_partition", quantize_stream(x, *self._next(stage, 0)))

    def _block(
        self, x: Tensor, y: Tensor, stage: StageGeometry, block: int, record: _Recorder
    ) -> tuple[Tensor, Tensor | None]:
        prefix, amax = f"layers.{stage.index}.blocks.{block}.", self._amax(stage.index, block)
        w, shift = self._weights, stage.block_shift(block)
        norm1, norm2 = ((w[f"{prefix}{name}.weight"], w[f"{prefix}{name}.bias"]) for name in ("norm1", "norm2"))
        y = record("qkv", linear_cosine_qkv(y, self._qkv(prefix, amax), stage.heads))
        head_scale = applied_logit_scale(w[prefix + "attn.logit_scale"])
        bias = w[prefix + "attn.relative_position_bias"]
        mask = w[f"layers.{stage.index}.attn_mask"] if any(shift) else None
        output_factor = _float32(amax["matmul_v"] / amax["proj_input"])
        y = record("attention", cosine_attention(y, head_scale, bias, mask, output_factor))
        layer, inverse = self._linear(prefix + "attn.proj", amax["proj_input"]), _float32(127 / amax["fc1_input"])
        y = linear_post_norm_residual(y, layer, *norm1, x, window_order(stage, shift), inverse)
        x, y = record.stream("proj_norm", y, lambda residual: quantize_stream(residual, inverse))
        following = self._next(stage, block + 1) if block + 1 < stage.depth else (None, None)
        fc1, fc2, gelu_inverse = self._mlp(prefix, amax)
        y = mlp_post_norm_residual(y, fc1, fc2, *norm2, x, gelu_inverse, *following)
        return record.stream("mlp_norm", y, lambda residual: quantize_stream(residual, *following))

    def _next(self, stage: StageGeometry, block: int) -> tuple[float, Tensor]:
        """127 / amax of a block's input, and the window order that it is written in."""
        amax = self._amax(stage.index, block)["qkv_input"]
        return _float32(127 / amax), window_order(stage, stage.block_shift(block))

    def _merge(self, x: Tensor, stage: StageGeometry, record: _Recorder) -> Tensor:
        w, prefix = self._weights, f"layers.{stage.index}.downsample."
        amax = float(w[prefix + "amax"])
        batch, height, width, channels = x.shape
        y = record("patch_merge", Quantized(*patch_merge(x, _float32(127 / amax))))
        y = linear_float(y, self._linear(prefix + "reduction", amax))
        y = record("reduction", y.reshape(batch, (height + 1) // 2, (width + 1) // 2, 2 * channels))
        return record("reduction_norm", layer_norm(y, w[prefix + "norm.weight"], w[prefix + "norm.bias"]))

"""The golden model of the fused graph in plain PyTorch, one function per operation of the engine.

As pyharness/reference.py for the FT graphs: exact integer accumulators, float64 elsewhere, no line shared with the
engine. An operation that rounds within itself (the probabilities of the attention, the hidden channels of the MLP) can
round otherwise than the engine where a value lies next to a tie; such a result carries its `slack`, the most that its
exact value can move by then. Zero almost everywhere, so that almost every value is held to the usual bound.

Shapes: B images, H x W tokens, C channels, M = B*H*W tokens, N tokens per window, BW = B * windows, h heads of d
channels, F hidden channels of the MLP. Formulas: docs/fused.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyharness.reference import gelu, gemm_s32, layer_norm, near_tie

TOLERANCE = 1e-3
"""In int8 steps: how far from a tie a value may lie and still be rounded either way."""


class Linear(NamedTuple):
    """A linear layer: weight s8 [N, K]; scale f32 [N], what one unit of the accumulator is worth; bias f32 [N], may be
    empty."""

    weight: Tensor
    scale: Tensor
    bias: Tensor


class Norm(NamedTuple):
    """A LayerNorm, weight and bias f32 [C], and 127 / amax of the int8 tensor that it gives."""

    weight: Tensor
    bias: Tensor
    inverse_scale: float


class Quantized(NamedTuple):
    """An int8 tensor, the float64 value before rounding and clamping, and by how much that may be off (`slack`)."""

    q: Tensor
    exact: Tensor
    slack: Tensor | float = 0.0


class Stream(NamedTuple):
    """The residual stream [B, H, W, C] float64, what the next operation reads (None: nothing), and the slack of the
    residual stream."""

    residual: Tensor
    quantized: Quantized | None
    slack: Tensor | float = 0.0


def round_clamp(exact: Tensor, lowest: int = -128) -> Tensor:
    """Round half to even, clamp to [lowest, 127]; NaN becomes 0. int8."""
    rounded = exact.round().clamp(lowest, 127)
    return torch.where(exact.isnan(), 0.0, rounded).to(torch.int8)


def rounds_to(found: Tensor, wanted: Quantized) -> Tensor:
    """Where the int8 tensor `found` is `wanted`, or the value next to it that a tie allows. bool of wanted's shape."""
    found, allowed = found.reshape(wanted.exact.shape), wanted.slack + TOLERANCE
    return (round_clamp(wanted.exact - allowed) <= found) & (found <= round_clamp(wanted.exact + allowed))


def accumulate(x: Tensor, linear: Linear) -> Tensor:
    """acc * scale[n] + bias[n], float64 [M, N]; x s8 [M, K]."""
    y = gemm_s32(x, linear.weight).double() * linear.scale.double()
    return y + linear.bias.double() if linear.bias.numel() else y


def linear_s8(x: Tensor, linear: Linear) -> Quantized:
    """y = clamp(rne(acc * scale[n] + bias[n]), -128, 127): s8 [M, K] -> s8 [M, N]."""
    exact = accumulate(x, linear)
    return Quantized(round_clamp(exact), exact)


def linear_float(x: Tensor, linear: Linear) -> Tensor:
    """y = acc * scale[n] + bias[n]: s8 [M, K] -> float64 [M, N]. The patch merging's reduction, without a bias."""
    return accumulate(x, linear)


def window_attention(
    qkv: Tensor, heads: int, factor: float, bias: Tensor, mask: Tensor | None, output_factor: float
) -> Quantized:
    """Attention of every window and head: s8 [M, 3C] in window order, columns (q, k or v; head; channel) -> s8 [M, C].

    x[j] = (q k[j]) * factor + bias[h, i, j] + mask[w, i, j]; p[j] = rne(127 * exp(x[j] - max x)), integers;
    o = clamp(rne(sum_j p[j] v[j] * output_factor / sum_j p[j]), -128, 127). bias [h, N, N], mask [windows, N, N].
    """
    tokens, columns = bias.shape[-1], qkv.shape[1]
    q, k, v = qkv.reshape(-1, tokens, 3, heads, columns // (3 * heads)).permute(2, 0, 3, 1, 4)
    x = gemm_s32(q, k).double() * factor + bias.double()
    if mask is not None:
        x = (x.unflatten(0, (-1, len(mask))) + mask.double()[:, None]).flatten(0, 1)
    largest = x.amax(-1, keepdim=True)
    share = 127 * (x - largest).exp()
    p = share.round()
    total = p.sum(-1, keepdim=True)
    exact = (p @ v.double()) * (output_factor / total)
    # The engine's x is float32: three roundings of a number of x's size, and of the largest's, go through exp.
    tied = near_tie(share, TOLERANCE + share * 2.0**-22 * (x.abs() + largest.abs()))
    # Another rounding moves the mean of v by at most (|v[j]| + |mean|) / (the sum of the p that are left).
    least = total - (tied & (p > share)).sum(-1, keepdim=True)
    moved = tied.double() @ (v.double().abs() * output_factor) + tied.sum(-1, keepdim=True) * exact.abs()
    exact, slack = ((t.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)) for t in (exact, moved / least))
    return Quantized(round_clamp(exact), exact, slack)


def normalize(residual: Tensor, norm: Norm, order: Tensor | None = None) -> Quantized:
    """LayerNorm and quantize: [B, H, W, C] -> s8 [M, C], in window order where `order` (int64 [H*W]) is given."""
    normed = layer_norm(residual, norm.weight, norm.bias).flatten(1, 2)
    normed = normed if order is None else normed[:, order]
    exact = normed.flatten(0, 1) * norm.inverse_scale
    return Quantized(round_clamp(exact), exact)


def linear_residual(x: Tensor, linear: Linear, residual: Tensor, order: Tensor) -> Tensor:
    """residual + the linear layer of x, float64 [B, H, W, C]; x s8 [M, K] in window order, which is undone."""
    batch, height, width, channels = residual.shape
    windowed = accumulate(x, linear).reshape(batch, height * width, channels)
    image = torch.empty_like(windowed)
    image[:, order] = windowed
    return residual.double() + image.reshape(residual.shape)


def linear_residual_norm(x: Tensor, linear: Linear, residual: Tensor, order: Tensor, norm: Norm) -> Stream:
    """`linear_residual`, then LayerNorm and quantize in image order: the attention's projection and norm2."""
    stream = linear_residual(x, linear, residual, order)
    return Stream(stream, normalize(stream, norm))


def hidden_channels(x: Tensor, fc1: Linear, gelu_inverse_scale: float | None) -> tuple[Tensor, Tensor]:
    """The MLP's hidden channels s8 [M, F] of x s8 [M, C], and where they may be one higher or lower, bool [M, F].

    ReLU: clamp(rne(max(0, acc * scale[n])), 0, 127). GELU: clamp(rne(GELU(acc * scale[n] + bias[n]) * inverse scale)).
    """
    y = accumulate(x, fc1)
    exact = y.clamp(min=0) if gelu_inverse_scale is None else gelu(y) * gelu_inverse_scale
    lowest = 0 if gelu_inverse_scale is None else -128
    tied = round_clamp(exact - TOLERANCE, lowest) != round_clamp(exact + TOLERANCE, lowest)
    return round_clamp(exact, lowest), tied


def mlp_residual_norm(
    x: Tensor,
    fc1: Linear,
    fc2: Linear,
    residual: Tensor,
    gelu_inverse_scale: float | None = None,
    norm: Norm | None = None,
    order: Tensor | None = None,
) -> Stream:
    """FC1, ReLU or GELU, FC2, residual; then the next block's LayerNorm and quantize, in its window order.

    x s8 [M, C] in image order. With ReLU (`gelu_inverse_scale` None) fc1 scales to the steps of the hidden channels and
    its bias is empty. Without `norm` nothing but the residual stream [B, H, W, C] is written.
    """
    hidden, tied = hidden_channels(x, fc1, gelu_inverse_scale)
    stream = residual.double() + accumulate(hidden, fc2).reshape(residual.shape)
    slack = (tied.double() @ fc2.weight.double().abs().T * fc2.scale.double()).reshape(residual.shape)
    return Stream(stream, None if norm is None else normalize(stream, norm, order), slack)

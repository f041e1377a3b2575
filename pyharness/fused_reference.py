"""The golden model of the fused graph in plain PyTorch, one function per operation of the engine.

As pyharness/reference.py for the FT graphs: exact integer accumulators, float64 elsewhere, no line shared with the
engine. An operation that rounds within itself (the probabilities of the attention, the hidden channels of the MLP) can
round otherwise than the engine where a value lies next to a tie; such a result carries its `slack`, the most that its
exact value can move by then. Zero almost everywhere, so that almost every value is held to the usual bound.

Shapes: B images, H x W tokens, C channels, M = B*H*W tokens, N tokens per window, BW = B * windows, h heads of d
channels, F hidden channels of the MLP. Formulas: docs/fused.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyharness.config import FUSED_GRAPH, StageGeometry, SwinConfig
from pyharness.engine_file import EngineFile
from pyharness.errors import FormatError
from pyharness.fused_format import amax_fields
from pyharness.reference import (
    Node,
    final_norm_pool,
    gelu,
    gemm_s32,
    head,
    in_image_order,
    in_window_order,
    layer_norm,
    near_tie,
    patch_embed,
    patch_embed_norm,
    patch_merge_norm,
    window_order,
)

TOLERANCE = 1e-3
"""In int8 steps: how far from a tie a value may lie and still be rounded either way."""


# --- Operations -------------------------------------------------------------------------------------------------------


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


def round_clamp(exact: Tensor) -> Tensor:
    """Round half to even, clamp to [-128, 127]; NaN becomes 0. int8."""
    rounded = exact.round().clamp(-128, 127)
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
    q, k, v = split_heads(qkv, heads, bias.shape[-1])
    x = with_mask(gemm_s32(q, k).double() * factor + bias.double(), mask)
    # The engine's x is float32: three roundings of a number of x's size.
    return attend(x, x.abs() * 2.0**-22, v, output_factor)


def split_heads(qkv: Tensor, heads: int, tokens: int) -> Tensor:
    """q, k and v s8 [3, BW, h, N, d] of s8 [M, 3C] in window order."""
    return qkv.reshape(-1, tokens, 3, heads, qkv.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4)


def with_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """Logits [BW, h, N, N] plus mask [windows, N, N], or none."""
    return x if mask is None else (x.unflatten(0, (-1, len(mask))) + mask.double()[:, None]).flatten(0, 1)


def attend(x: Tensor, error: Tensor, v: Tensor, output_factor: float) -> Quantized:
    """`window_attention` from its logits float64 [BW, h, N, N] on, each of which the engine may have `error` off."""
    largest = x.amax(-1, keepdim=True)
    share = 127 * (x - largest).exp()
    p = share.round()
    total = p.sum(-1, keepdim=True)
    exact = (p @ v.double()) * (output_factor / total)
    # Through exp goes x's error, and that of whichever logit comes out as the largest.
    of_largest = error.where(x + error >= (x - error).amax(-1, keepdim=True), 0).amax(-1, keepdim=True)
    tied = near_tie(share, TOLERANCE + share * (error + of_largest))
    # Another rounding moves the mean of v by at most (|v[j]| + |mean|) / (the sum of the p that are left).
    least = total - (tied & (p > share)).sum(-1, keepdim=True)
    moved = tied.double() @ (v.double().abs() * output_factor) + tied.sum(-1, keepdim=True) * exact.abs()
    exact, slack = ((t.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)) for t in (exact, moved / least))
    return Quantized(round_clamp(exact), exact, slack)


def normalize(residual: Tensor, norm: Norm, order: Tensor | None = None) -> Quantized:
    """LayerNorm and quantize: [B, H, W, C] -> s8 [M, C]; s8 [P, C] in window order where `order` (int64 [P / B]) is
    given."""
    normed = layer_norm(residual, norm.weight, norm.bias).flatten(1, 2)
    normed = normed.flatten(0, 1) if order is None else in_window_order(normed, order)
    exact = normed * norm.inverse_scale
    return Quantized(round_clamp(exact), exact)


def linear_residual(x: Tensor, linear: Linear, residual: Tensor, order: Tensor) -> Tensor:
    """residual + the linear layer of x, float64 [B, H, W, C]; x s8 [M, K] in window order, which is undone."""
    return residual.double() + in_image_order(accumulate(x, linear), residual, order)


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
    return round_clamp(exact), round_clamp(exact - TOLERANCE) != round_clamp(exact + TOLERANCE)


def mlp(x: Tensor, fc1: Linear, fc2: Linear, gelu_inverse_scale: float | None) -> tuple[Tensor, Tensor]:
    """FC1, ReLU or GELU, FC2: s8 [M, C] -> float64 [M, C], and the slack that its hidden channels' ties give it."""
    hidden, tied = hidden_channels(x, fc1, gelu_inverse_scale)
    return accumulate(hidden, fc2), tied.double() @ fc2.weight.double().abs().T * fc2.scale.double()


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
    branch, slack = (t.reshape(residual.shape) for t in mlp(x, fc1, fc2, gelu_inverse_scale))
    stream = residual.double() + branch
    return Stream(stream, None if norm is None else normalize(stream, norm, order), slack)


# --- The whole model --------------------------------------------------------------------------------------------------


class FusedReferenceSwin:
    """The golden model of an engine file of the fused graph, with GELU or without.

    `reference(images)` gives float32 logits [B, num_classes], or the features [B, num_features] where num_classes is 0.
    FormatError for a file of another graph.
    """

    def __new__(cls, engine_file: EngineFile) -> FusedReferenceSwin:
        if cls is FusedReferenceSwin and engine_file.config.version == 2:
            from pyharness.fused_reference_v2 import FusedReferenceSwinV2  # which is built on this class

            cls = FusedReferenceSwinV2
        return super().__new__(cls)

    def __init__(self, engine_file: EngineFile) -> None:
        if engine_file.graph != FUSED_GRAPH:
            raise FormatError(f"an engine file of {engine_file.graph}; FusedReferenceSwin needs one of {FUSED_GRAPH}")
        self.config: SwinConfig = engine_file.config
        self.gelu = engine_file.gelu
        self._weights = engine_file.by_name()

    def __call__(
        self,
        images: Tensor,
        trace: dict[Node, object] | None = None,
        follow: Mapping[Node, Sequence[Tensor]] | None = None,
    ) -> Tensor:
        """Run on `images` float32 [B, in_chans, H, W].

        Where `trace` is a dict, every operation's result is put into it under its `Node`: a `Quantized`, a `Stream` or
        a float64 tensor. `follow` holds what another implementation's operations wrote: wherever one of its values is
        right (see `difference`) it is taken over, so that every operation is computed from that implementation's own
        inputs, and neither a tie nor the rounding of its residual stream spreads. The trace keeps our own results.
        Raises FormatError on images of another shape.
        """
        config, w = self.config, self._weights
        wanted = (config.in_chans, *config.img_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            raise FormatError(f"images must be [B, {wanted[0]}, {wanted[1]}, {wanted[2]}], found {list(images.shape)}")
        record = _Recorder({} if trace is None else trace, follow or {})
        x = record("patch_embed", patch_embed(images, w["patch_embed.proj.weight"], config.patch_size))
        parameters = (w[f"patch_embed.{name}"] for name in ("proj.bias", "norm.weight", "norm.bias"))
        x = record("patch_embed_norm", patch_embed_norm(x, *parameters))
        for stage in config.stages():
            x = self._stage(x, stage, record)
        x = record("final_norm_pool", final_norm_pool(x, w["norm.weight"], w["norm.bias"]))
        if config.num_classes:
            x = record("head", head(x, w["head.weight"], w["head.bias"]))
        return x.float()

    def _stage(self, x: Tensor, stage: StageGeometry, record: _Recorder) -> Tensor:
        y = self._enter(x, stage, record.at(stage.index, 0))
        for block in range(stage.depth):
            x, y = self._block(x, y, stage, block, record.at(stage.index, block))
        return self._merge(x, stage, record.at(stage.index)) if stage.has_downsample else x

    def _enter(self, x: Tensor, stage: StageGeometry, record: _Recorder) -> Tensor:
        """s8 [M, C] of the first block, in its window order, of the residual stream [B, H, W, C]."""
        return record("norm1_shift_partition", normalize(x, *self._norm1(stage, 0)))

    def _block(
        self, x: Tensor, y: Tensor, stage: StageGeometry, block: int, record: _Recorder
    ) -> tuple[Tensor, Tensor | None]:
        """Residual stream [B, H, W, C] and s8 [M, C] of norm1, in window order, to those of the next block."""
        prefix, amax = f"layers.{stage.index}.blocks.{block}.", self._amax(stage.index, block)
        shift = stage.block_shift(block)
        bias = self._weights[prefix + "attn.relative_position_bias"]
        mask = self._weights[f"layers.{stage.index}.attn_mask"] if any(shift) else None
        scale = self.config.qk_scale or stage.head_dim**-0.5
        factor = _float32(amax["matmul_q"] / 127 * (amax["matmul_k"] / 127) * scale)
        output_factor = _float32(amax["matmul_v"] / amax["proj_input"])
        y = record("qkv", linear_s8(y, self._qkv(prefix, amax)))
        y = record("attention", window_attention(y, stage.heads, factor, bias, mask, output_factor))
        norm2 = self._norm(prefix + "norm2", amax["fc1_input"])
        layer = self._linear(prefix + "attn.proj", amax["proj_input"])
        y = linear_residual_norm(y, layer, x, window_order(stage, shift), norm2)
        x, y = record.stream("proj_norm", y, lambda residual: normalize(residual, norm2))
        following = self._norm1(stage, block + 1) if block + 1 < stage.depth else None
        fc1, fc2, inverse = self._mlp(prefix, amax)
        y = mlp_residual_norm(y, fc1, fc2, x, inverse, *(following or (None, None)))
        return record.stream("mlp_norm", y, lambda residual: normalize(residual, *following))

    def _merge(self, x: Tensor, stage: StageGeometry, record: _Recorder) -> Tensor:
        prefix = f"layers.{stage.index}.downsample."
        amax = float(self._weights[prefix + "amax"])
        norm = self._norm(prefix + "norm", amax)
        y = Quantized(*patch_merge_norm(x, norm.weight, norm.bias, norm.inverse_scale))
        y = record("patch_merge_norm", y)
        batch, height, width, channels = x.shape
        y = linear_float(y, self._linear(prefix + "reduction", amax))
        return record("reduction", y.reshape(batch, (height + 1) // 2, (width + 1) // 2, 2 * channels))

    def _amax(self, stage: int, block: int) -> dict[str, float]:
        fields = amax_fields(self.config.version)
        return dict(zip(fields, self._weights[f"layers.{stage}.blocks.{block}.amax"].tolist()))

    def _norm(self, name: str, amax: float) -> Norm:
        return Norm(self._weights[name + ".weight"], self._weights[name + ".bias"], _float32(127 / amax))

    def _norm1(self, stage: StageGeometry, block: int) -> tuple[Norm, Tensor]:
        """norm1 of a block, and the window order that it writes in."""
        amax = self._amax(stage.index, block)["qkv_input"]
        norm = self._norm(f"layers.{stage.index}.blocks.{block}.norm1", amax)
        return norm, window_order(stage, stage.block_shift(block))

    def _linear(self, name: str, input_amax: float, step: float = 1.0) -> Linear:
        """A linear layer whose result is counted in `step`s."""
        w = self._weights
        scale = input_amax / 127 * w[name + ".weight_scale"].double() / step
        return Linear(w[name + ".weight"], scale.float(), w.get(name + ".bias", torch.zeros(0)))

    def _qkv(self, prefix: str, amax: dict[str, float]) -> Linear:
        """The QKV layer, whose three parts give Q, K and V each in steps of its own; Swin-V2's Q and K have none."""
        linear = self._linear(prefix + "attn.qkv", amax["qkv_input"])
        scale = amax["qkv_input"] / 127 * self._weights[prefix + "attn.qkv.weight_scale"].double()
        steps = torch.tensor([amax.get(f"matmul_{part}", 127.0) / 127 for part in "qkv"], dtype=torch.float64)
        steps = steps.repeat_interleave(len(scale) // 3)
        bias = (linear.bias.double() / steps).float() if linear.bias.numel() else linear.bias
        return linear._replace(scale=(scale / steps).float(), bias=bias)

    def _mlp(self, prefix: str, amax: dict[str, float]) -> tuple[Linear, Linear, float | None]:
        """FC1, FC2 and, with GELU, what its result is multiplied by to be quantized."""
        fc1 = self._linear(prefix + "mlp.fc1", amax["fc1_input"], 1.0 if self.gelu else amax["fc2_input"] / 127)
        fc2 = self._linear(prefix + "mlp.fc2", amax["fc2_input"])
        return fc1, fc2, _float32(127 / amax["fc2_input"]) if self.gelu else None


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def difference(value: Quantized | Tensor, found: Tensor, slack: Tensor | float = 0.0) -> Tensor:
    """Where `found`, another implementation's result, is wrong: bool of its shape.

    int8 must be the rounding of the exact value, or one that a tie within it allows. What is floating point must be
    within `slack`, 1e-5 and 1e-5 of the value, and the rounding to `found`'s type where that is not float32.
    """
    if isinstance(value, Quantized):
        return ~rounds_to(found, value)
    own_type = 0.0 if found.dtype == torch.float32 else 0.51 * torch.finfo(found.dtype).eps
    found = found.reshape(value.shape).double()
    return ~((found - value).abs() <= slack + 1e-5 + (1e-5 + own_type) * value.abs())


class _Recorder:
    """Puts results into a trace under the node's name and hands on what to compute with: `follow`'s, where right."""

    def __init__(
        self,
        trace: dict[Node, object],
        follow: Mapping[Node, Sequence[Tensor]],
        stage: int | None = None,
        block: int | None = None,
    ) -> None:
        self._trace, self._follow, self._stage, self._block = trace, follow, stage, block

    def at(self, stage: int, block: int | None = None) -> _Recorder:
        return _Recorder(self._trace, self._follow, stage, block)

    def __call__(self, op: str, value: Quantized | Tensor) -> Tensor:
        """An int8 tensor or a floating-point one."""
        node = Node(self._stage, self._block, op)
        self._trace[node] = value
        return _followed(value, self._follow[node][0]) if node in self._follow else _own(value)

    def stream(self, op: str, value: Stream, normalized: Callable[[Tensor], Quantized]) -> tuple[Tensor, Tensor | None]:
        """The residual stream, and what `normalized` makes of it where the operation writes that too."""
        node, residual, quantized = Node(self._stage, self._block, op), value.residual, value.quantized
        follow = self._follow.get(node)
        if follow:
            residual = _followed(residual, follow[0], value.slack)
            quantized = quantized and normalized(residual)
        self._trace[node] = value._replace(quantized=quantized)
        if quantized is None:
            return residual, None
        return residual, _followed(quantized, follow[1]) if follow and len(follow) > 1 else quantized.q


def _own(value: Quantized | Tensor) -> Tensor:
    return value.q if isinstance(value, Quantized) else value


def _followed(value: Quantized | Tensor, found: Tensor, slack: Tensor | float = 0.0) -> Tensor:
    own = _own(value)
    return torch.where(difference(value, found, slack), own, found.reshape(own.shape).to(own.dtype))

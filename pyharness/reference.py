"""The golden model: the INT8 Swin graphs in plain PyTorch, one function per operation of the engine.

Independent of the engine and of pyharness/fakequant.py: it reads the weight list and computes in float64. INT8 products
are accumulated exactly (a float64 holds every integer up to 2**53; the sums stay below 2**31), so a result can differ
from the engine's only where a value behind floating-point work lies next to a rounding tie. Every quantizing function
therefore also returns the exact value before rounding.

Scales are the float32 numbers of the scale list. Shapes: B images, H x W tokens, C channels, M = B*H*W tokens, N tokens
per window, BW = B * windows, h heads of d channels, F hidden channels of the MLP. Formulas: docs/architecture.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyharness.config import StageGeometry, SwinConfig
from pyharness.engine_file import EngineFile
from pyharness.errors import FormatError
from pyharness.ft_format import FIELD_BY_NAME, QUAD_PARTS

EPS = 1e-5
"""Of every LayerNorm."""


class Quantized(NamedTuple):
    """An int8 tensor and the float64 value before rounding and clamping."""

    q: Tensor
    exact: Tensor


class ResidualQuantized(NamedTuple):
    """The residual stream after an operation, and the int8 input of the next GEMM."""

    residual: Tensor
    quantized: Quantized


class Node(NamedTuple):
    """Name of an intermediate. Outside the blocks `block` is None, outside the stages `stage` too."""

    stage: int | None
    block: int | None
    op: str


def near_tie(exact: Tensor, tolerance: float = 1e-3) -> Tensor:
    """Where `exact` lies within `tolerance` of a rounding tie (k + 1/2), bool of the same shape."""
    return (exact - exact.floor() - 0.5).abs() <= tolerance


def _round_clamp(exact: Tensor, lowest: int = -128) -> Quantized:
    """Round half to even, clamp to [lowest, 127]; NaN becomes 0."""
    rounded = exact.round().clamp(lowest, 127)
    return Quantized(torch.where(exact.isnan(), 0.0, rounded).to(torch.int8), exact)


def quantize(x: Tensor, inverse_scale: float) -> Quantized:
    """q = clamp(rne(x * inverse_scale), -128, 127), inverse_scale = 127 / amax; NaN becomes 0."""
    return _round_clamp(x.double() * inverse_scale)


def dequantize(q: Tensor, scale: float) -> Tensor:
    """x = q * scale, float64; scale = amax / 127."""
    return q.double() * scale


def gemm_s32(a: Tensor, w: Tensor) -> Tensor:
    """acc[m, n] = sum_k a[m, k] * w[n, k], int32 [..., M, N] from int8 [..., M, K] and [..., N, K]."""
    return (a.double() @ w.double().transpose(-1, -2)).to(torch.int32)


def gemm_s8(a: Tensor, w: Tensor, factor: float) -> Quantized:
    """y = clamp(rne(acc * factor), -128, 127) with acc of `gemm_s32`; factor = amax_in * amax_w / (127 * amax_out)."""
    return _round_clamp(gemm_s32(a, w).double() * factor)


def gemm_relu_s8(a: Tensor, w: Tensor, factor: float) -> Quantized:
    """y = clamp(rne(max(0, acc * factor)), 0, 127): the GELU-less FC1, which quantizes straight to FC2's input."""
    return _round_clamp((gemm_s32(a, w).double() * factor).clamp(min=0), lowest=0)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last dimension, biased variance, float64."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + EPS).sqrt() * weight.double() + bias.double()


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), the erf form."""
    return 0.5 * x * (1 + torch.special.erf(x / math.sqrt(2)))


def window_order(stage: StageGeometry, shift: tuple[int, int]) -> Tensor:
    """Image token (h * W + w) at each position of window order, -1 for padding, int64 [windows * N].

    Place (i, j) of window (wh, ww) is (y, x) = (wh*win_h + i, ww*win_w + j) of the shifted image, which holds token
    ((y + shift_h) % H, (x + shift_w) % W) and ends at H and W; with `pad_first` sizes are the padded ones, and tokens
    beyond H or W are padding.
    """
    (height, width), (win_h, win_w) = stage.resolution, stage.window
    rows, columns = (_shifted(*sizes) for sizes in zip(stage.resolution, stage.padded, stage.cycle, shift))
    token = torch.where((rows[:, None] < height) & (columns[None, :] < width), rows[:, None] * width + columns, -1)
    blocks = [tile for band in token.split(win_h, dim=0) for tile in band.split(win_w, dim=1)]
    return torch.cat([tile.flatten() for tile in blocks])


def _shifted(size: int, padded: int, cycle: int, shift: int) -> Tensor:
    """The coordinate of the image at each one of the shifted image; `size` or more is padding."""
    at = torch.arange(padded)
    return torch.where(at < cycle, (at + shift) % cycle, size)


def in_window_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens [B, H*W, C] in window order, zeros where there is padding: [B * len(order), C]."""
    rows = torch.where((order < 0)[:, None], 0, tokens[:, order.clamp(min=0)])
    return rows.flatten(0, 1)


def in_image_order(rows: Tensor, residual: Tensor, order: Tensor) -> Tensor:
    """Rows [B * len(order), C] in window order to where their tokens lie in the image, shaped as residual
    [B, H, W, C]."""
    windowed = rows.reshape(len(residual), len(order), -1)
    image = windowed.new_empty(len(residual), residual.shape[1] * residual.shape[2], windowed.shape[-1])
    image[:, order[order >= 0]] = windowed[:, order >= 0]
    return image.reshape(residual.shape)


def neighbours(residual: Tensor) -> Tensor:
    """2x2 tokens in the order (row, column) = (0,0), (1,0), (0,1), (1,1), zeros beyond an odd side: [B, H, W, C] ->
    [B, ceil(H/2), ceil(W/2), 4C]."""
    batch, height, width, channels = residual.shape
    even = residual.new_zeros(batch, height + height % 2, width + width % 2, channels)
    even[:, :height, :width] = residual
    return torch.cat([even[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))], dim=-1)


def patch_embed(images: Tensor, weight: Tensor, patch: int) -> Tensor:
    """Patches times weight, float64 [B, H, W, E] from images [B, in_chans, H*patch, W*patch].

    weight [E, P] holds each filter as (channel, row, column).
    """
    batch, channels, height, width = images.shape
    x = images.double().reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3) @ weight.double().T


def patch_embed_norm(x: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    """Bias and LayerNorm of the patch embedding, float64 [B, H, W, E]; only the bias where norm_weight is empty."""
    x = x + bias.double()
    return layer_norm(x, norm_weight, norm_bias) if norm_weight.numel() else x


def norm1_shift_partition(
    residual: Tensor, weight: Tensor, bias: Tensor, order: Tensor, inverse_scale: float
) -> Quantized:
    """LayerNorm, cyclic shift, window partition, quantize: [B, H, W, C] -> s8 [P, C] in window order."""
    normed = layer_norm(residual, weight, bias).flatten(1, 2)
    return quantize(in_window_order(normed, order), inverse_scale)


def qkv_bias(
    qkv: Tensor, scale: float, bias: Tensor, inverse_scales: tuple[float, float, float], heads: int, tokens: int
) -> Quantized:
    """Dequantize, add the bias, quantize Q, K and V each with its own scale: s8 [M, 3C] -> s8 [3, BW, h, N, d]."""
    x = dequantize(qkv, scale)
    if bias.numel():
        x = x + bias.double()
    rows, columns = x.shape
    x = x.reshape(rows // tokens, tokens, 3, heads, columns // (3 * heads)).permute(2, 0, 3, 1, 4)
    parts = [quantize(part, inverse) for part, inverse in zip(x, inverse_scales)]
    return Quantized(torch.stack([p.q for p in parts]), torch.stack([p.exact for p in parts]))


def qk_gemm(q: Tensor, k: Tensor, factor: float) -> Quantized:
    """Q K^T of every window and head: s8 [BW, h, N, d] twice -> s8 [BW, h, N, N]."""
    return gemm_s8(q, k, factor)


def softmax(
    logits: Tensor, scale: float, qk_scale: float, bias: Tensor, mask: Tensor | None, inverse_scale: float
) -> Quantized:
    """quantize(softmax(q * scale * qk_scale + bias + mask)), s8 [BW, h, N, N].

    bias [h, N, N] is the relative position bias, mask [windows, N, N] that of a shifted block.
    """
    x = dequantize(logits, scale) * qk_scale + bias.double()
    if mask is not None:
        windows = mask.shape[0]
        x = (x.unflatten(0, (-1, windows)) + mask.double()[None, :, None]).flatten(0, 1)
    return quantize(torch.softmax(x, dim=-1), inverse_scale)


def pv_gemm(p: Tensor, v: Tensor, factor: float) -> Quantized:
    """P V of every window and head: s8 [BW, h, N, N] and [BW, h, N, d] -> s8 [M, C] in window order."""
    out = gemm_s8(p, v.transpose(-1, -2), factor)
    return Quantized(*(t.permute(0, 2, 1, 3).flatten(2).flatten(0, 1) for t in out))


def proj_bias_residual_norm2(
    proj: Tensor,
    scale: float,
    bias: Tensor,
    residual: Tensor,
    order: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    inverse_scale: float,
) -> ResidualQuantized:
    """Dequantize, add the bias, undo windows and shift, add the residual; then LayerNorm and quantize.

    proj s8 [P, C] in window order, residual [B, H, W, C] -> residual [B, H, W, C] and s8 [M, C] in image order.
    """
    residual = residual.double() + in_image_order(dequantize(proj, scale) + bias.double(), residual, order)
    normed = layer_norm(residual, norm_weight, norm_bias)
    return ResidualQuantized(residual, quantize(normed.flatten(0, 2), inverse_scale))


def fc1_bias_gelu(x: Tensor, scale: float, bias: Tensor, inverse_scale: float) -> Quantized:
    """Dequantize, add the bias, GELU, quantize: s8 [M, F] -> s8 [M, F]. The FT graph only."""
    return quantize(gelu(dequantize(x, scale) + bias.double()), inverse_scale)


def fc2_bias_residual(x: Tensor, scale: float, bias: Tensor, residual: Tensor) -> Tensor:
    """Dequantize FC2's s8 (int8_mode 1) or s32 (mode 2) output, add the bias and the residual: float64 [B, H, W, C]."""
    return residual.double() + (dequantize(x, scale) + bias.double()).reshape(residual.shape)


def patch_merge_norm(residual: Tensor, weight: Tensor, bias: Tensor, inverse_scale: float) -> Quantized:
    """Gather 2x2 tokens (`neighbours`), LayerNorm over 4C, quantize: [B, H, W, C] -> s8
    [B*ceil(H/2)*ceil(W/2), 4C]."""
    return quantize(layer_norm(neighbours(residual), weight, bias).flatten(0, 2), inverse_scale)


def reduction_dequantize(x: Tensor, scale: float, shape: tuple[int, int, int, int]) -> Tensor:
    """The next stage's residual stream, float64 [B, ceil(H/2), ceil(W/2), 2C], of the reduction's s8 or s32 output."""
    return dequantize(x, scale).reshape(shape)


def final_norm_pool(residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm, then the mean over all tokens: [B, H, W, C] -> float64 [B, C]."""
    return layer_norm(residual, weight, bias).mean((1, 2))


def head(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """features @ weight^T + bias, float64 [B, num_classes]."""
    return features @ weight.double().T + bias.double()


class BlockScales:
    """The scale list of one block, by name; all numbers are the list's own float32 numbers."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.tolist()

    def _quad(self, name: str, part: str) -> float:
        return self._values[FIELD_BY_NAME[name].index + QUAD_PARTS.index(part)]

    def amax(self, name: str) -> float:
        """amax of an activation or a weight."""
        return self._values[FIELD_BY_NAME[name].index]

    def dequant(self, name: str) -> float:
        """amax / 127 of an activation."""
        return self._quad(name, "dequant")

    def quant(self, name: str) -> float:
        """127 / amax of an activation."""
        return self._quad(name, "quant")

    def factor(self, name: str) -> float:
        """amax_in * amax_w / (127 * amax_out) of a GEMM."""
        return self._values[FIELD_BY_NAME[name].index]

    def s32_dequant(self, gemm: str) -> float:
        """float32 of amax_in * amax_w / 127 / 127: what one unit of an s32 accumulator is worth (int8_mode 2)."""
        product = self.amax(f"{gemm}_input") * self.amax(f"{gemm}_weight") / 127.0 / 127.0
        return float(torch.tensor(product, dtype=torch.float32))


class ReferenceSwin:
    """The golden model of an engine file. Both graphs, both int8 modes.

    `reference(images)` gives float32 logits [B, num_classes], or the features [B, num_features] where num_classes is 0.
    """

    def __new__(cls, engine_file: EngineFile) -> ReferenceSwin:
        if cls is ReferenceSwin and engine_file.config.version == 2:
            from pyharness.reference_v2 import ReferenceSwinV2  # which is built on this class

            cls = ReferenceSwinV2
        return super().__new__(cls)

    def __init__(self, engine_file: EngineFile) -> None:
        self.config: SwinConfig = engine_file.config
        self.gelu_less = engine_file.graph == "geluless_int8"
        self.int8_mode = engine_file.int8_mode
        self._weights = engine_file.by_name()

    def __call__(
        self,
        images: Tensor,
        trace: dict[Node, object] | None = None,
        follow: Mapping[Node, Tensor] | None = None,
    ) -> Tensor:
        """Run on `images` float32 [B, in_chans, H, W].

        Where `trace` is a dict, every operation's result is put into it under its `Node`: a `Quantized`, a
        `ResidualQuantized`, or a tensor. `follow` holds another implementation's int8 results: at a rounding tie its
        choice is taken over (see `near_tie`), so that one tie near the input does not pass for an error at the output.
        Raises FormatError on images of another shape.
        """
        config, w = self.config, self._weights
        wanted = (config.in_chans, *config.img_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            raise FormatError(f"images must be [B, {wanted[0]}, {wanted[1]}, {wanted[2]}], found {list(images.shape)}")
        recorder = _Recorder({} if trace is None else trace, follow or {})
        x = recorder("patch_embed", patch_embed(images, w["patch_embed.proj.weight"], config.patch_size))
        parameters = (w[f"patch_embed.{name}"] for name in ("proj.bias", "norm.weight", "norm.bias"))
        x = recorder("patch_embed_norm", patch_embed_norm(x, *parameters))
        for stage in config.stages():
            for block in range(stage.depth):
                x = self._block(x, stage, block, recorder.at(stage.index, block))
            if stage.has_downsample:
                x = self._merge(x, stage, recorder.at(stage.index))
        x = recorder("final_norm_pool", final_norm_pool(x, w["norm.weight"], w["norm.bias"]))
        if config.num_classes:
            x = recorder("head", head(x, w["head.weight"], w["head.bias"]))
        return x.float()

    def _scales(self, stage: int, block: int) -> BlockScales:
        return BlockScales(self._weights[f"layers.{stage}.blocks.{block}.amaxList"])

    def _block(self, x: Tensor, stage: StageGeometry, block: int, record: _Recorder) -> Tensor:
        prefix = f"layers.{stage.index}.blocks.{block}."
        order = window_order(stage, stage.block_shift(block))
        attended = self._attention(x, stage, block, order, record)
        s, w = self._scales(stage.index, block), self._weights
        x, fc1_in = record(
            "proj_bias_residual_norm2",
            proj_bias_residual_norm2(
                attended.q,
                s.dequant("proj_aftergemm"),
                w[prefix + "attn.proj.bias"],
                x,
                order,
                w[prefix + "norm2.weight"],
                w[prefix + "norm2.bias"],
                s.quant("fc1_input"),
            ),
        )
        hidden = self._fc1(fc1_in, prefix, s, record)
        fc2, scale = self._linear("fc2", hidden, w[prefix + "mlp.fc2.weight"], s, record)
        return record("fc2_bias_residual", fc2_bias_residual(fc2, scale, w[prefix + "mlp.fc2.bias"], x))

    def _attention(self, x: Tensor, stage: StageGeometry, block: int, order: Tensor, record: _Recorder) -> Quantized:
        prefix = f"layers.{stage.index}.blocks.{block}."
        s, w = self._scales(stage.index, block), self._weights
        y = record(
            "norm1_shift_partition",
            norm1_shift_partition(x, w[prefix + "norm1.weight"], w[prefix + "norm1.bias"], order, s.quant("qkv_input")),
        )
        y = record("qkv_gemm", gemm_s8(y.q, w[prefix + "attn.qkv.weight"], s.factor("qkv_factor")))
        inverse_scales = (s.quant("matmul_q"), s.quant("matmul_k"), s.quant("matmul_v"))
        y = record(
            "qkv_bias",
            qkv_bias(
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
                self.config.qk_scale or stage.head_dim**-0.5,
                w[prefix + "attn.relative_position_bias"],
                w[f"layers.{stage.index}.attn_mask"] if shifted else None,
                s.quant("matmul_a"),
            ),
        )
        y = record("pv_gemm", pv_gemm(y.q, v, s.factor("pv_factor")))
        return record("proj_gemm", gemm_s8(y.q, w[prefix + "attn.proj.weight"], s.factor("proj_factor")))

    def _fc1(self, x: Quantized, prefix: str, s: BlockScales, record: _Recorder) -> Quantized:
        """FC1 and its activation, up to FC2's int8 input."""
        weight = self._weights[prefix + "mlp.fc1.weight"]
        if self.gelu_less:
            return record("fc1_gemm", gemm_relu_s8(x.q, weight, s.factor("fc1_factor")))
        y = record("fc1_gemm", gemm_s8(x.q, weight, s.factor("fc1_factor")))
        bias = self._weights[prefix + "mlp.fc1.bias"]
        return record("fc1_bias_gelu", fc1_bias_gelu(y.q, s.dequant("fc1_aftergemm"), bias, s.quant("fc2_input")))

    def _linear(
        self, name: str, x: Quantized, weight: Tensor, s: BlockScales, record: _Recorder
    ) -> tuple[Tensor, float]:
        """FC2 or the reduction: its s8 or, in int8_mode 2, s32 output, and the scale that dequantizes it."""
        if self.int8_mode == 2:
            return record(f"{name}_gemm", gemm_s32(x.q, weight)), s.s32_dequant(name)
        out = record(f"{name}_gemm", gemm_s8(x.q, weight, s.factor(f"{name}_factor")))
        return out.q, s.dequant(f"{name}_aftergemm")

    def _merge(self, x: Tensor, stage: StageGeometry, record: _Recorder) -> Tensor:
        """Patch merging. Its scales stand in every list of the stage, all alike; the last block's are read."""
        prefix = f"layers.{stage.index}.downsample."
        s, w = self._scales(stage.index, stage.depth - 1), self._weights
        batch, height, width, channels = x.shape
        y = record(
            "patch_merge_norm",
            patch_merge_norm(x, w[prefix + "norm.weight"], w[prefix + "norm.bias"], s.quant("reduction_input")),
        )
        out, scale = self._linear("reduction", y, w[prefix + "reduction.weight"], s, record)
        shape = (batch, (height + 1) // 2, (width + 1) // 2, 2 * channels)
        return record("reduction_dequantize", reduction_dequantize(out, scale, shape))


class _Recorder:
    """Puts results into a trace under the node's name and hands them on, ties resolved as in `follow`."""

    def __init__(
        self,
        trace: dict[Node, object],
        follow: Mapping[Node, Tensor],
        stage: int | None = None,
        block: int | None = None,
    ) -> None:
        self._trace, self._follow, self._stage, self._block = trace, follow, stage, block

    def at(self, stage: int, block: int | None = None) -> _Recorder:
        return _Recorder(self._trace, self._follow, stage, block)

    def __call__(self, op: str, value):
        node = Node(self._stage, self._block, op)
        if node in self._follow:
            if isinstance(value, ResidualQuantized):
                value = value._replace(quantized=_follow_ties(value.quantized, self._follow[node]))
            elif isinstance(value, Quantized):
                value = _follow_ties(value, self._follow[node])
        self._trace[node] = value
        return value


def _follow_ties(own: Quantized, other: Tensor) -> Quantized:
    """`own` with `other`'s value where the two are one apart next to a rounding tie."""
    other = other.reshape(own.q.shape)
    tie = near_tie(own.exact) & ((own.q.int() - other.int()).abs() == 1)
    return own._replace(q=torch.where(tie, other, own.q))

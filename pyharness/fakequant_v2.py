"""The parts in which a fake-quantized Swin-V2 differs from pyharness/fakequant.py's Swin-V1.

Cosine attention: q and k of every head have length 1, `matmul_q` and `matmul_k` quantize them so, and each head has its
own logit scale. LayerNorms stand behind attention, MLP and reduction instead of ahead of them, so what enters the GEMMs
is the residual stream itself.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyharness.attention_geometry import (
    attention_mask,
    expand_bias_table,
    from_windows,
    merge_neighbours,
    to_windows,
)
from pyharness.config import StageGeometry, SwinConfig
from pyharness.fakequant import EPS, Mlp, QuantLinear, make_quantizer

LARGEST_LOGIT_SCALE = math.log(100.0)
"""The learnt logarithm counts up to this."""


class WindowAttentionV2(nn.Module):
    """Cosine attention within windows, [B * windows, N, C] -> same."""

    def __init__(self, stage: StageGeometry, config: SwinConfig) -> None:
        super().__init__()
        self.window, self.heads = stage.window, stage.heads
        self.qkv = QuantLinear(stage.dim, 3 * stage.dim, bias=False, aftergemm=True)
        self.q_bias = nn.Parameter(torch.empty(stage.dim)) if config.qkv_bias else None
        self.v_bias = nn.Parameter(torch.empty(stage.dim)) if config.qkv_bias else None
        self.proj = QuantLinear(stage.dim, stage.dim, bias=True, aftergemm=True)
        self.logit_scale = nn.Parameter(torch.empty(stage.heads, 1, 1))
        rows = (2 * stage.window[0] - 1) * (2 * stage.window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, stage.heads))
        self.matmul_q_input_quantizer = make_quantizer()
        self.matmul_k_input_quantizer = make_quantizer()
        self.matmul_v_input_quantizer = make_quantizer()
        self.matmul_a_input_quantizer = make_quantizer()
        self.softmax_input_quantizer = make_quantizer()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.qkv(x)
        if self.q_bias is not None:
            x = x + torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.matmul_q_input_quantizer(F.normalize(q, dim=-1))
        k = self.matmul_k_input_quantizer(F.normalize(k, dim=-1))
        v = self.matmul_v_input_quantizer(v)
        logits = self.softmax_input_quantizer(q @ k.transpose(-1, -2))
        logits = logits * self.logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp()
        logits = logits + expand_bias_table(self.relative_position_bias_table, self.window)
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        attention = self.matmul_a_input_quantizer(logits.softmax(dim=-1))
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class BlockV2(nn.Module):
    """One Swin-V2 block, [B, H, W, C] -> same."""

    def __init__(self, stage: StageGeometry, block: int, config: SwinConfig, graph: str, int8_mode: int) -> None:
        super().__init__()
        self.stage, self.shift = stage, stage.block_shift(block)
        self.attn = WindowAttentionV2(stage, config)
        self.norm1 = nn.LayerNorm(stage.dim, EPS)
        self.mlp = Mlp(stage, config, graph, int8_mode)
        self.norm2 = nn.LayerNorm(stage.dim, EPS)
        self.register_buffer("attn_mask", attention_mask(stage) if any(self.shift) else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.attn(to_windows(x, self.stage, self.shift), self.attn_mask))
        x = x + from_windows(y, self.stage, self.shift)
        return x + self.norm2(self.mlp(x))


class PatchMergingV2(nn.Module):
    """2x2 tokens to one of twice the channels, [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]; the norm comes last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = QuantLinear(4 * dim, 2 * dim, bias=False, aftergemm=True)
        self.norm = nn.LayerNorm(2 * dim, EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(merge_neighbours(x)))

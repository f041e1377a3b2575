"""Swin-V2's continuous relative position bias, from its small MLP to the table of a window.

The MLP maps the log-spaced offset of two tokens to one number per head; 16 * sigmoid of it is added to their logit. It
depends on the weights alone, so it is computed once, when a model becomes a quantizable one, and everything behind that
holds a table as Swin-V1 has it. Source: Liu et al. 2022, Swin Transformer V2, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyharness.config import SwinConfig

LARGEST_BIAS = 16.0
"""The sigmoid's factor: every bias lies between 0 and this."""

_MLP = ("attn.cpb_mlp.0.weight", "attn.cpb_mlp.0.bias", "attn.cpb_mlp.2.weight")


def log_spaced_offsets(window: tuple[int, int], trained_window: int = 0) -> Tensor:
    """The MLP's input for every offset (query - key), float32 [(2*win_h-1) * (2*win_w-1), 2], row offset first.

    Offsets are scaled so that the largest one of the window that the weights were trained with (`trained_window`, or
    this one where 0) is 8, and then to sign(x) * log2(1 + |x|) / 3, so that a larger window extrapolates little.
    """
    axes = []
    for size in window:
        largest = (trained_window or size) - 1
        axes.append(torch.arange(1 - size, size, dtype=torch.float32) / max(largest, 1))
    offsets = 8 * torch.cartesian_prod(*axes)
    return offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)


def continuous_bias_table(mlp: tuple[Tensor, Tensor, Tensor], window: tuple[int, int], trained_window: int) -> Tensor:
    """The bias of every offset, [(2*win_h-1) * (2*win_w-1), heads]: 16 * sigmoid(w2 @ relu(w1 @ offset + b1)).

    `mlp` is (w1 [hidden, 2], b1 [hidden], w2 [heads, hidden]).
    """
    w1, b1, w2 = mlp
    hidden = (log_spaced_offsets(window, trained_window).to(w1) @ w1.T + b1).relu()
    return LARGEST_BIAS * torch.sigmoid(hidden @ w2.T)


def with_bias_tables(state: Mapping[str, Tensor], config: SwinConfig) -> dict[str, Tensor]:
    """`state` of a Swin-V2 (Microsoft's layout) with `attn.relative_position_bias_table` in place of each MLP."""
    result = dict(state)
    trained = config.pretrained_window_size or (0,) * len(config.depths)
    for stage in config.stages():
        for block in range(stage.depth):
            prefix = f"layers.{stage.index}.blocks.{block}."
            mlp = tuple(result.pop(prefix + name) for name in _MLP)
            table = continuous_bias_table(mlp, stage.window, trained[stage.index])
            result[prefix + "attn.relative_position_bias_table"] = table
    return result

"""Tables that follow from a stage's geometry alone: the shift mask and the relative position index.

Source: Liu et al. 2021, Swin Transformer, section 3.2 (shifted windows, relative position bias).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from pyharness.config import StageGeometry

MASKED = -100.0
"""Added to the logits of token pairs that came from different regions of the image; exact in fp16."""


def attention_mask(stage: StageGeometry) -> torch.Tensor:
    """Mask of the shifted blocks of `stage`, float32 [windows, N, N]: 0 or MASKED.

    After the cyclic shift the last window of a row or column holds tokens from opposite edges of the image. Tokens
    attend to each other only where both coordinates belong to the same edge. Padding counts as tokens of the image's.
    """
    (height, width), (win_h, win_w) = stage.padded, stage.window
    rows = _edge_labels(height, win_h, stage.shift[0])
    columns = _edge_labels(width, win_w, stage.shift[1])
    region = rows[:, None] * 3 + columns[None, :]
    region = region.view(height // win_h, win_h, width // win_w, win_w).transpose(1, 2)
    region = region.reshape(stage.windows, stage.window_area)
    return (region[:, :, None] != region[:, None, :]).float() * MASKED


def _edge_labels(size: int, window: int, shift: int) -> torch.Tensor:
    """Label per coordinate: 0 before the last window, 1 in its part from the far edge, 2 in the part that wrapped."""
    labels = torch.zeros(size, dtype=torch.long)
    if shift:
        labels[-window:] = 1
        labels[-shift:] = 2
    return labels


def to_windows(x: torch.Tensor, stage: StageGeometry, shift: tuple[int, int]) -> torch.Tensor:
    """Cyclic shift, padding with zeros and window partition: [B, H, W, C] -> [B * windows, N, C]."""
    batch, height, width, channels = x.shape
    (padded_h, padded_w), (win_h, win_w) = stage.padded, stage.window
    padding = (0, 0, 0, padded_w - width, 0, padded_h - height)
    if stage.pad_first:
        x = functional.pad(x, padding)
    x = x.roll((-shift[0], -shift[1]), (1, 2))
    if not stage.pad_first:
        x = functional.pad(x, padding)
    x = x.view(batch, padded_h // win_h, win_h, padded_w // win_w, win_w, channels).transpose(2, 3)
    return x.reshape(-1, stage.window_area, channels)


def from_windows(x: torch.Tensor, stage: StageGeometry, shift: tuple[int, int]) -> torch.Tensor:
    """Inverse of `to_windows`: [B * windows, N, C] -> [B, H, W, C]."""
    (height, width), (padded_h, padded_w), (win_h, win_w) = stage.resolution, stage.padded, stage.window
    x = x.view(-1, padded_h // win_h, padded_w // win_w, win_h, win_w, x.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, padded_h, padded_w, x.shape[-1])
    if stage.pad_first:
        return x.roll(shift, (1, 2))[:, :height, :width]
    return x[:, :height, :width].roll(shift, (1, 2))


def merge_neighbours(x: torch.Tensor) -> torch.Tensor:
    """2x2 tokens in the order (row, column) = (0,0) (1,0) (0,1) (1,1), zeros beyond an odd side: [B, H, W, C] ->
    [B, ceil(H/2), ceil(W/2), 4C]."""
    batch, height, width, channels = x.shape
    x = functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    x = x.view(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
    return x.flatten(3)


def relative_position_index(window: tuple[int, int]) -> torch.Tensor:
    """Row of the bias table for each pair of tokens of a window, int64 [N, N].

    The table has (2*win_h-1) * (2*win_w-1) rows, one per offset (query - key), row offset first.
    """
    win_h, win_w = window
    row = torch.arange(win_h).repeat_interleave(win_w)
    column = torch.arange(win_w).repeat(win_h)
    row_offset = row[:, None] - row[None, :] + win_h - 1
    column_offset = column[:, None] - column[None, :] + win_w - 1
    return row_offset * (2 * win_w - 1) + column_offset


def expand_bias_table(table: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Relative position bias [heads, N, N] from its table [(2*win_h-1)*(2*win_w-1), heads]."""
    return table[relative_position_index(window)].permute(2, 0, 1).contiguous()


def collapse_bias(bias: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Inverse of `expand_bias_table`: every row of the table occurs in the expanded bias."""
    win_h, win_w = window
    table = bias.new_zeros((2 * win_h - 1) * (2 * win_w - 1), bias.shape[0])
    table[relative_position_index(window).flatten()] = bias.flatten(1).T.contiguous()
    return table

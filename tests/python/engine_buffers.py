"""Outputs the engine's ops write in tests: poisoned before the call, with guard bytes behind them."""

from __future__ import annotations

import torch
from torch import Tensor

GUARD_BYTES = 256
GUARD = 0xA5
POISON = 0x7D


class GuardedOutput:
    """A tensor of `shape` filled with poison, followed by guard bytes that `check` compares."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        count = torch.Size(shape).numel() * dtype.itemsize
        padded = (count + 15) // 16 * 16  # keeps the guard aligned for any dtype
        self._bytes = torch.full((padded + GUARD_BYTES,), POISON, dtype=torch.uint8)
        self._bytes[count:] = GUARD
        self._count = count
        self.tensor = self._bytes[:count].view(dtype).view(shape)

    def check(self) -> Tensor:
        """The tensor; AssertionError where anything behind it was written."""
        assert (self._bytes[self._count :] == GUARD).all(), "the op wrote past the end of its output"
        return self.tensor


def guarded_copy(source: Tensor) -> GuardedOutput:
    """A guarded tensor with `source`'s contents, for ops that update in place."""
    out = GuardedOutput(tuple(source.shape), source.dtype)
    out.tensor.copy_(source)
    return out

"""The fused graph's linear weights as int8: the step of each output channel, and rounding. Source: docs/fused.md."""

from __future__ import annotations

import torch
from torch import Tensor

from pyharness.config import BALANCED_RMS


def channel_steps(weight: Tensor, scales: str = "channel") -> Tensor:
    """The step of each output channel, float32 [N], of a weight [N, K]: its largest absolute value over 127. With
    `scales` "tensor" it is the whole weight's; with "balanced", where that is the smaller, root mean square over
    BALANCED_RMS where that is the larger.

    1 where the channel is zero, or so small that its step would be no normal float32.
    """
    weight = weight.double()
    steps = weight.abs().amax(1) / 127
    coarsest = steps.amax().expand_as(steps)
    if scales == "tensor":
        steps = coarsest
    elif scales == "balanced":
        steps = steps.maximum(weight.square().mean(1).sqrt() / BALANCED_RMS).minimum(coarsest)
    steps = steps.float()
    return torch.where(steps < torch.finfo(torch.float32).tiny, 1.0, steps)


def quantize_channels(weight: Tensor, steps: Tensor) -> Tensor:
    """int8 [N, K]: clamp(rne(w / step of its channel), -127, 127), in float64."""
    return (weight.double() / steps.double()[:, None]).round().clamp(-127, 127).to(torch.int8)

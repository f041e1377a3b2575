"""The fused graph's arithmetic in floating-point PyTorch: a calibrated model with its quantizers where that graph has
them. An accuracy model that needs no engine, what pyharness/fused_reference.py is held to, and what is trained for that
graph: rounding passes gradients straight through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyharness.calibrated import CalibratedCheckpoint
from pyharness.config import FUSED_GRAPH, WEIGHT_SCALES
from pyharness.errors import HarnessError
from pyharness.fakequant import FakeQuantSwin, QuantLinear, WindowAttention
from pyharness.fakequant_v2 import WindowAttentionV2
from pyharness.weight_steps import channel_steps, quantize_channels


class _StraightThrough(torch.autograd.Function):
    """`rounding(x)`, of x's shape, with the gradient of x itself."""

    @staticmethod
    def forward(ctx: object, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class RowRelative(nn.Module):
    """Probabilities [..., N] rounded to 127ths of their row's largest, and normalized again.

    Without the rounding this is the identity, so that its gradient is passed on as it is.
    """

    def forward(self, probabilities: Tensor) -> Tensor:
        return _StraightThrough.apply(probabilities, self._rounded)

    @staticmethod
    def _rounded(probabilities: Tensor) -> Tensor:
        p = (127 * probabilities / probabilities.amax(-1, keepdim=True)).round()
        return p / p.sum(-1, keepdim=True)


class CosineSteps(nn.Module):
    """Queries or keys [..., d], of length 1, rounded to 127ths of their own largest, as integers of whatever length
    scaled to 1. Its gradient, too, is passed on as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return _StraightThrough.apply(x, self._rounded)

    @staticmethod
    def _rounded(x: Tensor) -> Tensor:
        integers = (127 * x / x.abs().amax(-1, keepdim=True).clamp(min=1e-12)).round()
        return torch.nn.functional.normalize(integers, dim=-1)


class ChannelRounding(nn.Module):
    """A weight [N, K] rounded to steps of its output channels, which follow from the weight itself, by one of
    WEIGHT_SCALES: as the converter rounds it."""

    def __init__(self, scales: str = "channel") -> None:
        super().__init__()
        self.scales = scales

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self._rounded)

    def _rounded(self, weight: Tensor) -> Tensor:
        steps = channel_steps(weight, self.scales)
        return (quantize_channels(weight, steps) * steps[:, None]).to(weight.dtype)

    def clipped(self, weight: Tensor) -> int:
        """How many weights round to more than 127 steps."""
        steps = channel_steps(weight, self.scales).double()[:, None]
        return int((weight.double() / steps).round().abs().gt(127).sum())


@torch.no_grad()
def fused_model(
    checkpoint: CalibratedCheckpoint, weight_scales: str = "channel", *, keep_weights: bool = False
) -> FakeQuantSwin:
    """The fake-quantized model of `checkpoint` in the fused graph's arithmetic. Errors as its `to_model`.

    Weights are rounded to steps of their output channel, chosen by one of WEIGHT_SCALES; nothing is quantized after
    a GEMM or ahead of the softmax. Swin-V2's q and k have steps of their own instead of a calibrated one.

    The model's parameters are the rounded weights. With `keep_weights` they are the checkpoint's own, and each is
    rounded whenever it is used: for training.
    """
    model = checkpoint.to_model()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            rounding = ChannelRounding(weight_scales)
            if not keep_weights:
                module.weight.copy_(rounding(module.weight))
            module._weight_quantizer = rounding if keep_weights else nn.Identity()
            module._aftergemm_quantizer = None
        elif isinstance(module, (WindowAttention, WindowAttentionV2)):
            module.softmax_input_quantizer = nn.Identity()
            module.matmul_a_input_quantizer = RowRelative()
        if isinstance(module, WindowAttentionV2):
            module.matmul_q_input_quantizer = CosineSteps()
            module.matmul_k_input_quantizer = CosineSteps()
    return model


def model_in_graph(
    checkpoint: CalibratedCheckpoint,
    graph: str | None = None,
    weight_scales: str = "channel",
    *,
    keep_weights: bool = False,
) -> FakeQuantSwin:
    """The fake-quantized model of `checkpoint` with the quantizers of `graph`: the fused graph, or the checkpoint's own
    (also None), whose weights have a scale per tensor. `keep_weights` as in `fused_model`; those of the other graphs
    are kept anyway. HarnessError for another graph or other weight scales."""
    if weight_scales not in WEIGHT_SCALES:
        raise HarnessError(f"weight scales {weight_scales!r} are unknown; choose {', '.join(WEIGHT_SCALES)}")
    if graph == FUSED_GRAPH:
        return fused_model(checkpoint, weight_scales, keep_weights=keep_weights)
    if graph not in (None, checkpoint.graph):
        raise HarnessError(
            f"the checkpoint of {checkpoint.config.name} is calibrated for {checkpoint.graph}, not {graph}; its "
            f"quantizers are those of {checkpoint.graph}, and it runs as {FUSED_GRAPH}"
        )
    return checkpoint.to_model()

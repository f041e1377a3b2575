"""The fused graph's arithmetic in floating-point PyTorch: a calibrated model with its quantizers where that graph has
them. An accuracy model that needs no engine, and what pyharness/fused_reference.py is held to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyharness.calibrated import CalibratedCheckpoint
from pyharness.fakequant import FakeQuantSwin, QuantLinear, WindowAttention
from pyharness.fakequant_v2 import WindowAttentionV2
from pyharness.weight_steps import channel_steps, quantize_channels


class RowRelative(nn.Module):
    """Probabilities [..., N] rounded to 127ths of their row's largest, and normalized again."""

    def forward(self, probabilities: Tensor) -> Tensor:
        p = (127 * probabilities / probabilities.amax(-1, keepdim=True)).round()
        return p / p.sum(-1, keepdim=True)


class CosineSteps(nn.Module):
    """Queries or keys [..., d] rounded to 127ths of their own largest, as integers of whatever length scaled to 1."""

    def forward(self, x: Tensor) -> Tensor:
        integers = (127 * x / x.abs().amax(-1, keepdim=True).clamp(min=1e-12)).round()
        return torch.nn.functional.normalize(integers, dim=-1)


@torch.no_grad()
def fused_model(checkpoint: CalibratedCheckpoint, weight_scales: str = "channel") -> FakeQuantSwin:
    """The fake-quantized model of `checkpoint` in the fused graph's arithmetic. Errors as its `to_model`.

    Weights are rounded to steps of their output channel, chosen by one of WEIGHT_SCALES; nothing is quantized after
    a GEMM or ahead of the softmax. Swin-V2's q and k have steps of their own instead of a calibrated one.
    """
    model = checkpoint.to_model()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            steps = channel_steps(module.weight, weight_scales)
            module.weight.copy_(quantize_channels(module.weight, steps) * steps[:, None])
            module._weight_quantizer = nn.Identity()
            module._aftergemm_quantizer = None
        elif isinstance(module, (WindowAttention, WindowAttentionV2)):
            module.softmax_input_quantizer = nn.Identity()
            module.matmul_a_input_quantizer = RowRelative()
        if isinstance(module, WindowAttentionV2):
            module.matmul_q_input_quantizer = CosineSteps()
            module.matmul_k_input_quantizer = CosineSteps()
    return model

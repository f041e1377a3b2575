"""The fused graph's arithmetic in floating-point PyTorch: a calibrated model with its quantizers where that graph has
them. An accuracy model that needs no engine, and what pyharness/fused_reference.py is held to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyharness.calibrated import CalibratedCheckpoint
from pyharness.fakequant import FakeQuantSwin, QuantLinear, WindowAttention
from pyharness.weight_steps import channel_steps, quantize_channels


class RowRelative(nn.Module):
    """Probabilities [..., N] rounded to 127ths of their row's largest, and normalized again."""

    def forward(self, probabilities: Tensor) -> Tensor:
        p = (127 * probabilities / probabilities.amax(-1, keepdim=True)).round()
        return p / p.sum(-1, keepdim=True)


@torch.no_grad()
def fused_model(checkpoint: CalibratedCheckpoint, weight_scales: str = "channel") -> FakeQuantSwin:
    """The fake-quantized model of `checkpoint` in the fused graph's arithmetic. Errors as its `to_model`.

    Weights are rounded to steps of their output channel, chosen by one of WEIGHT_SCALES; nothing is quantized after
    a GEMM or ahead of the softmax.
    """
    model = checkpoint.to_model()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            steps = channel_steps(module.weight, weight_scales)
            module.weight.copy_(quantize_channels(module.weight, steps) * steps[:, None])
            module._weight_quantizer = nn.Identity()
            module._aftergemm_quantizer = None
        elif isinstance(module, WindowAttention):
            module.softmax_input_quantizer = nn.Identity()
            module.matmul_a_input_quantizer = RowRelative()
    return model

"""The blocks of timm's Swin models and what is changed in them, in place: activation, FC1 bias, padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock

RELU_WITH_FC1_BIAS = "relu_with_fc1_bias"
"""The activation, in meta data, of an ablation's student: ReLU, but with FC1 biases, which no graph has a place for."""


def blocks_of(model: SwinTransformer) -> list[SwinTransformerBlock]:
    """All Transformer blocks, from the input to the output."""
    return [block for stage in model.layers for block in stage.blocks]


def make_geluless_block(block: SwinTransformerBlock) -> None:
    """ReLU for GELU, FC1 bias zero and frozen, in place (seed paper, Algorithm 1, lines 4 to 6)."""
    block.mlp.act = nn.ReLU()
    with torch.no_grad():
        block.mlp.fc1.bias.zero_()
    block.mlp.fc1.bias.requires_grad_(False)


def make_relu_block(block: SwinTransformerBlock) -> None:
    """ReLU for GELU, in place; the FC1 bias stays and is trained on. Such a model is no GELU-less one."""
    block.mlp.act = nn.ReLU()


def make_geluless(model: SwinTransformer) -> None:
    """`make_geluless_block` on every block, in place."""
    for block in blocks_of(model):
        make_geluless_block(block)


def is_geluless(model: SwinTransformer) -> bool:
    """True where every block has ReLU and a zero FC1 bias; a half-converted model is not GELU-less."""
    return all(activation_of(b) == "relu" and not b.mlp.fc1.bias.any() for b in blocks_of(model))


def has_relu(model: SwinTransformer) -> bool:
    """True where every block has ReLU, with or without an FC1 bias."""
    return all(activation_of(block) == "relu" for block in blocks_of(model))


def activation_name(model: SwinTransformer) -> str:
    """What a model's meta data calls its activation: "gelu", "relu" (GELU-less) or RELU_WITH_FC1_BIAS."""
    return "relu" if is_geluless(model) else RELU_WITH_FC1_BIAS if has_relu(model) else "gelu"


def set_activation(model: SwinTransformer, activation: str | None) -> None:
    """Give a GELU model, in place, the activation that `activation_name` names; None is GELU."""
    if activation == "relu":
        make_geluless(model)
    elif activation == RELU_WITH_FC1_BIAS:
        for block in blocks_of(model):
            make_relu_block(block)


def activation_of(block: SwinTransformerBlock) -> str | None:
    """The activation that a block computes, None where it is neither GELU (erf) nor ReLU."""
    from timm.layers.activations import GELU as TimmGELU

    act = block.mlp.act
    if isinstance(act, nn.ReLU):
        return "relu"
    if isinstance(act, TimmGELU):  # the erf form, of Swin-V2; a class of its own
        return "gelu"
    return "gelu" if isinstance(act, nn.GELU) and act.approximate == "none" else None


def make_pad_first(model: SwinTransformer) -> None:
    """Padding ahead of the cyclic shift in every block, in place: Microsoft's detection code, mmdetection, torchvision
    and Hugging Face pad so, timm behind it. Weights stay, and where windows divide all tokens, the function too."""
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    from pyharness.pad_first import PadFirstBlock, PadFirstV2Block

    for block in blocks_of(model):
        block.__class__ = PadFirstV2Block if isinstance(block, SwinTransformerV2Block) else PadFirstBlock


def pads_first(block: SwinTransformerBlock) -> bool:
    """True where a block pads ahead of its cyclic shift."""
    from pyharness.pad_first import PadFirst

    return isinstance(block, PadFirst)

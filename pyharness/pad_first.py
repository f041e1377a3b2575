"""timm's Swin blocks, padded ahead of the cyclic shift. A module of their own, as their base classes need timm, whose
import takes seconds: `swin_blocks` imports this one where a model is there already."""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn


class PadFirst:
    """A block of timm's whose tokens are padded to whole windows ahead of the cyclic shift, and cut off behind it."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padding = (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0])
        return super()._attn(nn.functional.pad(x, padding))[:, :height, :width]


class PadFirstBlock(PadFirst, SwinTransformerBlock):
    """Swin-V1's. A class of the module's own, so that models can be copied and pickled."""


class PadFirstV2Block(PadFirst, SwinTransformerV2Block):
    """Swin-V2's."""

"""The Swin inside a detector's or segmenter's checkpoint, under the names of Microsoft's classifiers.

| | Microsoft's detection code | mmdetection, mmsegmentation, mmpretrain |
|---|---|---|
| all names begin with | `backbone.` | `backbone.` |
| patch embedding | `patch_embed.proj` | `patch_embed.projection` |
| stages | `layers` | `stages` |
| attention of a block | `attn` | `attn.w_msa` |
| FC1, FC2 | `mlp.fc1`, `mlp.fc2` | `ffn.layers.0.0`, `ffn.layers.1` |
| norm of stage i's features | `norm{i}` | `norm{i}` |
| 4C inputs of a downsample | pixel, then channel, as in classifiers | channel, then pixel |

The last stage's norm stands where a classifier has its only one. The others belong to the detector, as do neck and
heads: they are left out, and named. All of this code pads ahead of the cyclic shift. A classifier's Swin that is the
`backbone` of something else, under its own names and with its one `norm`, comes in too, and pads as it did.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

PREFIX = "backbone."

_MM_NAMES = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^stages\.(\d+)\.", r"layers.\1."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
_NORM = re.compile(r"^norm(\d+)\.(weight|bias)$")


def is_detector(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a model with a Swin as its backbone, or of mmpretrain's Swin."""
    return any(re.match(r"^(backbone\.(layers|stages)|stages)\.0\.blocks\.0\.attn\.", name) for name in names)


def backbone_of(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The backbone's tensors under Microsoft's names, with the head where it is a classifier's, and the meta data that
    goes with them: `pad_first`, and `backbone`, what it was and what was left out, in words."""
    prefixed = any(name.startswith(PREFIX) for name in state)
    own = {name.removeprefix(PREFIX): t for name, t in state.items() if name.startswith(PREFIX) or not prefixed}
    others = {name: t for name, t in state.items() if prefixed and not name.startswith(PREFIX)}
    is_mm = any(name.startswith("stages.") for name in own)
    if is_mm:
        own = {_microsoft_name(name): _in_pixel_order(name, tensor) for name, tensor in own.items()}
    norms = sorted({int(found[1]) for name in own if (found := _NORM.match(name))})
    stages = {int(found[1]) for name in own if (found := re.match(r"^layers\.(\d+)\.", name))}
    last = max(stages, default=-1)
    state = {}
    for name, tensor in own.items():
        norm = _NORM.match(name)
        if norm is None:
            state[name] = tensor
        elif int(norm[1]) == last:
            state[f"norm.{norm[2]}"] = tensor
    for name in ("weight", "bias"):
        if (head := others.pop(f"head.fc.{name}", None)) is not None:
            state[f"head.{name}"] = head
    left = [f"norm{i}" for i in norms if i != last] + sorted({name.split(".")[0] for name in others})
    whose = "mmdetection's names" if is_mm else "Microsoft's names"
    words = f"a backbone under {whose}" + (f", without {', '.join(left)}" if left else "")
    # A norm for each stage is a detector's. With a single one it may be anybody's model of which timm's Swin is a part.
    return state, {"pad_first": is_mm or bool(norms), "backbone": words}


def _microsoft_name(name: str) -> str:
    for pattern, replacement in _MM_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _in_pixel_order(name: str, tensor: Tensor) -> Tensor:
    """A downsample's [..., 4C], from torch.nn.Unfold's order (channel, row, column) to (column, row, channel)."""
    if not re.search(r"\.downsample\.(norm\.(weight|bias)|reduction\.weight)$", name) or tensor.shape[-1] % 4:
        return tensor
    *rows, width = tensor.shape
    return tensor.reshape(*rows, width // 4, 2, 2).transpose(-3, -1).reshape(*rows, width).contiguous()

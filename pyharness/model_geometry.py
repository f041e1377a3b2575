"""The geometry of a timm Swin model, and whether the engine computes exactly that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from pyharness.config import SwinConfig
from pyharness.errors import ModelError
from pyharness.swin_blocks import activation_of, blocks_of, pads_first

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock

_LAYER_NORM_EPS = 1e-5
"""What the engine computes with."""


def config_of(model: nn.Module, name: str) -> SwinConfig:
    """The geometry of a timm Swin-V1 or -V2 model, windows as configured (before the resolution-at-most-window rule).

    ModelError where the model is no such Swin or has something that the engine does not compute; FormatError where the
    image is no whole number of patches.
    """
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    if not isinstance(model, (SwinTransformer, SwinTransformerV2)):
        raise ModelError(
            f"{name}: is a {type(model).__name__}; only Swin-V1 and -V2 (timm's SwinTransformer, SwinTransformerV2) "
            "are supported"
        )
    version = 2 if isinstance(model, SwinTransformerV2) else 1
    first = model.layers[0].blocks[0]
    windows = _windows(model)
    _need_square(name, "patch size", model.patch_embed.patch_size)
    for window in windows:
        _need_square(name, "window", window)
    trained = [stage.blocks[0].attn.pretrained_window_size for stage in model.layers] if version == 2 else []
    for window in trained:
        _need_square(name, "pretrained window", window)
    config = SwinConfig(
        name=name,
        img_size=tuple(model.patch_embed.img_size),
        patch_size=model.patch_embed.patch_size[0],
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        embed_dim=model.patch_embed.proj.out_channels,
        depths=tuple(len(stage.blocks) for stage in model.layers),
        num_heads=tuple(stage.blocks[0].attn.num_heads for stage in model.layers),
        window_size=tuple(window[0] for window in windows),
        mlp_ratio=_mlp_ratio(model),
        qkv_bias=_has_qkv_bias(first, version),
        qk_scale=_qk_scale(first) if version == 1 else None,
        patch_norm=not isinstance(model.patch_embed.norm, nn.Identity),
        version=version,
        pretrained_window_size=tuple(w[0] for w in trained) if any(w[0] for w in trained) else (),
        pad_first=any(pads_first(block) for block in blocks_of(model)),
    )
    _check_computable(model, config)
    return config


def _windows(model: SwinTransformer) -> Sequence[tuple[int, int]]:
    """The window of each stage before it is made as small as the stage's tokens. timm's `set_input_size` scales windows
    with the tokens and leaves those that the model began with where they were."""
    reference = getattr(model, "_ref_window_sizes", None)
    if not reference:
        return [stage.blocks[0].window_size for stage in model.layers]
    grid, reference_grid = model.patch_embed.grid_size, getattr(model, "_ref_grid_size", None)
    if reference_grid is None or tuple(grid) == tuple(reference_grid):
        return reference
    from timm.models.swin_transformer import calc_stage_window_sizes

    return calc_stage_window_sizes(grid, reference, reference_grid)


def _mlp_ratio(model: SwinTransformer) -> float:
    """The least ratio that gives every stage its hidden channels, the whole part of channels * ratio: 96 channels and a
    ratio of 2.3 have 220, which says 2.29, but 768 have 1766."""
    blocks = [stage.blocks[0] for stage in model.layers]
    dim, hidden = max(((b.dim, b.mlp.fc1.out_features) for b in blocks), key=lambda sizes: sizes[1] / sizes[0])
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _has_qkv_bias(block: nn.Module, version: int) -> bool:
    return (block.attn.qkv.bias if version == 1 else block.attn.q_bias) is not None


def _qk_scale(block: SwinTransformerBlock) -> float | None:
    """The scale of a Swin-V1 block's logits, None where it is the default."""
    default = block.attn.num_heads**0.5 * block.dim**-0.5
    return None if abs(block.attn.scale / default - 1) < 1e-9 else block.attn.scale


def _need_square(name: str, what: str, size: tuple[int, int]) -> None:
    if size[0] != size[1]:
        raise ModelError(f"{name}: the {what} is {tuple(size)}; the engine needs it square")


def _check_computable(model: SwinTransformer, config: SwinConfig) -> None:
    """ModelError unless the model computes exactly what `config` describes."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ModelError(f"{config.name}: {message}; the engine cannot run this model")

    need(getattr(model, "absolute_pos_embed", None) is None, "has an absolute position embedding (ape)")
    need(model.global_pool == "avg", f"pools with {model.global_pool!r}, not the average")
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            need(module.eps == _LAYER_NORM_EPS, f"{name} has eps {module.eps}, not {_LAYER_NORM_EPS}")
    for stage, layer in zip(config.stages(), model.layers):
        for index, block in enumerate(layer.blocks):
            at = f"layers.{stage.index}.blocks.{index}"
            need(not block.always_partition, f"{at} partitions always (always_partition)")
            need(
                pads_first(block) == config.pad_first,
                f"{at} pads behind its cyclic shift, another block ahead of it",
            )
            need(block.dim == stage.dim, f"{at} has {block.dim} channels, not embed_dim * 2**stage = {stage.dim}")
            need(block.attn.qkv.out_features == 3 * stage.dim, f"{at} has a head_dim other than dim // heads")
            need(block.mlp.fc1.out_features == config.hidden_dim(stage.dim), f"{at} has its own mlp_ratio")
            need(_has_qkv_bias(block, config.version) == config.qkv_bias, f"{at} has its own qkv_bias")
            if config.version == 1:
                scale = config.qk_scale if config.qk_scale is not None else stage.head_dim**-0.5
                need(abs(block.attn.scale / scale - 1) < 1e-9, f"{at} has its own qk_scale {block.attn.scale}")
            else:
                trained = (config.pretrained_window_size or (0,) * len(config.depths))[stage.index]
                found = tuple(block.attn.pretrained_window_size)
                need(found == (trained, trained), f"{at} has its own pretrained window {found}")
            found = (tuple(block.window_size), tuple(block.shift_size))
            wanted = (stage.window, stage.block_shift(index))
            need(found == wanted, f"{at} has window and shift {found}, not {wanted}")
            found = tuple(block.input_resolution)
            need(found == stage.resolution, f"{at} is made for {found} tokens, {stage.resolution} come to it")
            masked = 0 if block.attn_mask is None else len(block.attn_mask)
            wanted = stage.windows if any(stage.block_shift(index)) else 0
            need(block.dynamic_mask or masked == wanted, f"{at} has a mask of {masked} windows, not {wanted}")
            need(activation_of(block) is not None, f"{at} has the activation {block.mlp.act}, not GELU (erf) or ReLU")

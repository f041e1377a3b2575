"""Geometries of Swin-V2 that several tests share."""

from __future__ import annotations

import dataclasses

from pyharness.config import MICRO_DIGITS, SwinConfig

MICRO = dataclasses.replace(MICRO_DIGITS, name="micro_v2", version=2)
"""14x14 tokens in windows of 7 that shift, then 7x7 in one window."""

FINE_TUNED = SwinConfig(
    "fine_tuned_v2", (32, 64), 2, 3, 0, 24, (2, 3), (2, 3), (8, 8), qkv_bias=False, version=2, pretrained_window_size=(6, 0)
)
"""16x32 tokens, then 8x16, which shift along one axis only; weights of a window of 6 in the first stage; no head."""

SMALL = SwinConfig("small_v2", (32, 32), 2, 3, 7, 24, (2, 2, 1), (2, 3, 4), (4, 4, 4), version=2)
CONFIGS = {
    "micro": MICRO,
    "three stages": SMALL,
    "not square": dataclasses.replace(SMALL, img_size=(32, 64)),
    "no qkv bias, features only": dataclasses.replace(SMALL, qkv_bias=False, num_classes=0),
    "no patch norm": dataclasses.replace(SMALL, patch_norm=False),
    "a window per stage": dataclasses.replace(SMALL, window_size=(8, 2, 4), mlp_ratio=2.5),
    "padded": dataclasses.replace(SMALL, img_size=(36, 44)),
    "padded ahead of the shift": dataclasses.replace(SMALL, img_size=(36, 44), pad_first=True),
    "window 16": dataclasses.replace(SMALL, img_size=(64, 64), window_size=(16, 16), depths=(2, 1), num_heads=(2, 3)),
}

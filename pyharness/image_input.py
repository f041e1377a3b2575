"""How images come into a model, as the meta data of its file says it under "input".

`{"mean": [...], "std": [...], "interpolation": ..., "crop_pct": ..., "crop_mode": ...}`, or parts of it. Pixels 0..255
are divided by 255, then (x - mean) / std, a number per channel each. Ahead of that an image is brought to the model's
size [H, W], scaled sizes being H and W over `crop_pct`, rounded down, with timm's words (`create_transform`):

| `crop_mode` | |
|---|---|
| `center`, or none | as it is, until it just covers the scaled size; then its centre |
| `squash` | pressed into the scaled size, whatever its shape; then the centre: with a `crop_pct` of 1 the whole image |
| `border` | as it is, until it just fits into the scaled size; then the centre, with the mean around the image |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

CROP_MODES = ("center", "squash", "border")
CENTER = CROP_MODES[0]

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
"""timm's names of them."""


def fault_of(note: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is found and what is needed, in words, of the first of interpolation, crop_pct and crop_mode in `note` that
    no image can be prepared by; None where there is none."""
    for key, fits, needed in (
        ("interpolation", INTERPOLATIONS.__contains__, f"one of {', '.join(INTERPOLATIONS)}"),
        ("crop_pct", is_crop_pct, "a number above 0 and at most 1"),
        ("crop_mode", CROP_MODES.__contains__, f"one of {', '.join(CROP_MODES)}"),
    ):
        if key in note and not fits(note[key]):
            found = repr(note[key])
            return f"has {key} {found if len(found) <= 40 else f'{found[:40]}...'}", needed
    return None


def is_crop_pct(value: Any) -> bool:
    """Whether `value` is the share of the scaled image that is taken."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def merged(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """`first` with what `then` says in its place. The crop is one thing: a crop_pct without a mode is timm's centre."""
    found = {**first, **then}
    if "crop_pct" in then and "crop_mode" not in then:
        found.pop("crop_mode", None)
    return found


def with_mode(note: Mapping[str, Any]) -> dict[str, Any]:
    """`note`, with the mode written out that a crop_pct alone stands for."""
    return {"crop_mode": CENTER, **note} if "crop_pct" in note else dict(note)


def in_words(note: Mapping[str, Any]) -> str:
    """What `note` says, in a line: `mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bicubic, crop_pct 1, squash`."""
    parts = [f"{key} {' '.join(f'{value:g}' for value in note[key])}" for key in ("mean", "std") if key in note]
    parts += [str(note["interpolation"])] if "interpolation" in note else []
    parts += [f"crop_pct {note['crop_pct']:g}"] if "crop_pct" in note else []
    parts += [str(note["crop_mode"])] if note.get("crop_mode", CENTER) != CENTER else []
    return ", ".join(parts)


def scaled_size(size: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """The size (H, W) that images are scaled to, of which `size` is taken: timm's, each side over `crop_pct`."""
    return math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)


def crop_pct_of(size: tuple[int, int], scaled: tuple[int, int]) -> float | None:
    """The crop_pct of few digits for which `scaled_size` of `size` is `scaled`; None where there is none."""
    most = min(side / larger for side, larger in zip(size, scaled))
    digits = range(1, 8)
    for share in (*(round(most, d) for d in digits), *(math.floor(most * 10**d) / 10**d for d in digits), most):
        if 0 < share <= 1 and scaled_size(size, share) == scaled:
            return share
    return None

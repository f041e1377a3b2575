"""Shapes and textures: an image classification set that is computed, not stored, at any size.

A class is a shape's outline together with the texture that fills it: 16 x 16 families, so up to 256 classes. Neither
alone decides: among the first 100 classes each shape comes with 6 or 7 textures. Everything else varies from image to
image: place, size, rotation, aspect, colours, texture angle, frequency and phase, a textured background, small shapes
as distractors, a strip across the object, light, blur and noise.

An image follows from (seed, split, index) alone: its random numbers are an integer hash of these, the same on every
machine. The arithmetic behind is float32, so that pixels may differ by rounding between kinds of processors and between
batches; the same batch on the same CPU repeats bit for bit.

Coordinates run from -1 to 1 over the image, x to the right and y down; angles are in radians.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from pyharness.errors import DataError

SCHEME = "procedural"
SPLITS = ("train", "val")
MIN_SIZE, MAX_SIZE = 16, 1024

SHAPES = (
    "disc", "triangle", "square", "star5", "ring", "flower3", "crescent", "ellipse",
    "pentagon", "square_frame", "star4", "flower6", "half_disc", "triangle_frame", "gear8", "peanut",
)  # fmt: skip
TEXTURES = (
    "plain", "stripes", "checks", "dots", "rings", "blobs", "zigzag", "spokes",
    "grid", "waves", "ramp", "dashes", "speckle", "spiral", "thin_lines", "wood",
)  # fmt: skip
MAX_CLASSES = len(SHAPES) * len(TEXTURES)

DISTRACTORS = 3
GREY = (0.299, 0.587, 0.114)
"""Luminance of red, green and blue (ITU-R BT.601)."""

# One row per shape. kind: 0 star polygon of n points whose inner corners lie at radius a; 1 flower of n petals and
# amplitude a; 2 ellipse of half axes 1 and a. A disc of radius cut_r around (cut_x, 0) is taken away, and only a wall
# of thickness 2 * shell is left of the rest; -9 and 4 take away nothing.
_POLYGON, _FLOWER, _ELLIPSE = 0, 1, 2
_SHAPE_ROWS = {
    #                  kind      n  a                       cut_x cut_r shell
    "disc":           (_ELLIPSE, 1, 1.0,                    0.0, -9.0, 4.0),
    "triangle":       (_POLYGON, 3, math.cos(math.pi / 3),  0.0, -9.0, 4.0),
    "square":         (_POLYGON, 4, math.cos(math.pi / 4),  0.0, -9.0, 4.0),
    "star5":          (_POLYGON, 5, 0.45,                   0.0, -9.0, 4.0),
    "ring":           (_ELLIPSE, 1, 1.0,                    0.0, -9.0, 0.19),
    "flower3":        (_FLOWER,  3, 0.26,                   0.0, -9.0, 4.0),
    "crescent":       (_ELLIPSE, 1, 1.0,                    0.55, 0.8, 4.0),
    "ellipse":        (_ELLIPSE, 1, 0.45,                   0.0, -9.0, 4.0),
    "pentagon":       (_POLYGON, 5, math.cos(math.pi / 5),  0.0, -9.0, 4.0),
    "square_frame":   (_POLYGON, 4, math.cos(math.pi / 4),  0.0, -9.0, 0.16),
    "star4":          (_POLYGON, 4, 0.36,                   0.0, -9.0, 4.0),
    "flower6":        (_FLOWER,  6, 0.16,                   0.0, -9.0, 4.0),
    "half_disc":      (_ELLIPSE, 1, 1.0,                    9.0, 9.0, 4.0),
    "triangle_frame": (_POLYGON, 3, math.cos(math.pi / 3),  0.0, -9.0, 0.13),
    "gear8":          (_POLYGON, 8, 0.68,                   0.0, -9.0, 4.0),
    "peanut":         (_FLOWER,  2, 0.3,                    0.0, -9.0, 4.0),
}  # fmt: skip

# One row per texture. A phase in cycles: along * U + zig * zigzag(V) + wave * sine(V) + out * distance + turns * angle
# + warp * noise; of its sine s, of the sine t of V and of the noise n (at `pitch` times the frequency) the value is
# bias + s*S + t*T + st*S*T + hi*max(S, T) + lo*min(S, T) + n*N + r*ramp, times `gain`, about one half.
_TEXTURE_ROWS = {
    #              along zig  wave out turns warp pitch   bias   s    t    st   hi   lo   n    r   gain
    "plain":      (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5,     1.0,  0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5),
    "stripes":    (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5,     0.0,  1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.5),
    "checks":     (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5,     0.0,  0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 5.0),
    "dots":       (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5,    -0.7,  1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.5),
    "rings":      (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5,     0.0,  1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.5),
    "blobs":      (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5,     0.0,  0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 2.5),
    "zigzag":     (1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.5,     0.0,  1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.5),
    "spokes":     (0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.5,     0.0,  1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.5),
    "grid":       (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5,    -0.75, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 4.0),
    "waves":      (0.7, 0.0, 1.0, 0.0, 0.0, 0.0, 0.5,     0.0,  1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.5),
    "ramp":       (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5,     0.0,  0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.6),
    "dashes":     (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5,     0.45, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 2.5),
    "speckle":    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.9,    -0.4,  0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 2.0),
    "spiral":     (0.0, 0.0, 0.0, 0.7, 3.0, 0.0, 0.5,     0.0,  1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.5),
    "thin_lines": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5,    -0.8,  1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0),
    "wood":       (1.0, 0.0, 0.0, 0.0, 0.0, 0.6, 0.4,     0.0,  1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.5),
}  # fmt: skip

_NOISE_DIRECTIONS = (0.3, 1.2, 1.9, 2.8)
_UNIFORMS = 96
"""Random numbers per image; `_Draw` hands them out in order, so inserting a draw changes all images."""
_CHUNK_PIXELS = (1 << 16, 1 << 23)
"""Pixels drawn at a time on a CPU and on a GPU."""


# --- What a data set is, in words -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProceduralSpec:
    """`procedural:classes=100,size=224,train=100000,val=10000,seed=0`; `size` None means the model's."""

    classes: int = 100
    size: int | None = None
    train: int = 100_000
    val: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("classes", 2, MAX_CLASSES),
            ("size", MIN_SIZE, MAX_SIZE),
            ("train", 1, 2**31),
            ("val", 1, 2**31),
            ("seed", 0, 2**31),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise DataError(f"{SCHEME}: {name} must be from {low} to {high}, found {value}")
        first, second = (_start(self.seed, split) for split in SPLITS)
        if _meet(self.train, self.val, first ^ second):
            raise DataError(
                f"{SCHEME}: with seed={self.seed}, some of the {self.val} held-out images have the random numbers of "
                f"some of the {self.train} training images; give another seed"
            )

    @classmethod
    def parse(cls, text: str) -> ProceduralSpec:
        """The specification that a `--data` word names. DataError for an unknown key or a value that is no number."""
        scheme, _, rest = text.partition(":")
        if scheme != SCHEME:
            raise DataError(f"{text!r} names no procedural data set; it begins with {SCHEME}")
        known = [f.name for f in fields(cls)]
        given: dict[str, Any] = {}
        for word in filter(None, rest.split(",")):
            key, _, value = word.partition("=")
            if key not in known or not value.isdigit() or key in given:
                raise DataError(
                    f"{text}: {word!r} is not understood; give each of {', '.join(known)} at most once as KEY=NUMBER, "
                    f"as in {SCHEME}:classes=100,size=224"
                )
            given[key] = int(value)
        return cls(**given)


def is_procedural(data: object) -> bool:
    """Whether a `--data` word names this data set."""
    return str(data).partition(":")[0] == SCHEME


def class_name(label: int) -> str:
    """Shape and texture of a class, as in "ring-checks"."""
    shape, texture = _families(torch.tensor([label]))
    return f"{SHAPES[int(shape)]}-{TEXTURES[int(texture)]}"


def labels_of(indices: Tensor, classes: int) -> Tensor:
    """Labels i64 [B] of the images `indices` i64 [B]: every run of `classes` images holds each class once."""
    rotation = _mix(indices // classes + 0x5EED)
    return (indices + rotation) % classes


def _families(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(shape, texture) i64 [B] of `labels`; one to one, and any first classes mix shapes and textures evenly."""
    row, shape = labels // len(SHAPES), labels % len(SHAPES)
    return shape, (shape + row) % len(TEXTURES)


# --- Random numbers ---------------------------------------------------------------------------------------------------


def _mix(x: Tensor) -> Tensor:
    """A hash of 32 bits, in int64: exact on every device, since no product passes 2**63."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x31848BAB) & mask
    x = ((x ^ (x >> 14)) * 0x2C1B3C6D) & mask
    return x ^ (x >> 16)


def _start(seed: int, split: str) -> int:
    return int(_mix(_mix(torch.tensor(seed, dtype=torch.int64)) + SPLITS.index(split) + 1))


def _keys(indices: Tensor, seed: int, split: str) -> Tensor:
    return _mix(indices ^ _start(seed, split))


def _meet(first: int, second: int, difference: int) -> bool:
    """Whether i ^ j is `difference` for any i below `first` and j below `second`: since `_mix` is one to one, whether
    two splits of these sizes, whose starts differ by so much, share a key."""
    begin = 0
    for bit in reversed(range(first.bit_length())):
        if first >> bit & 1:  # [begin, begin + 2**bit) is aligned, so XOR makes another aligned stretch of it
            if (begin ^ difference) >> bit << bit < second:
                return True
            begin += 1 << bit
    return False


def _uniforms(keys: Tensor, count: int) -> Tensor:
    """f32 [B, count] in [0, 1) for keys i64 [B]; multiples of 2**-24, so that no conversion rounds."""
    numbers = torch.arange(1, count + 1, device=keys.device)
    return (_mix(_mix(keys[:, None] + numbers * 0x1E3779B1)) >> 8).float() * 2.0**-24


class _Draw:
    """Hands out an image's random numbers, each as f32 [B, 1, 1] in a range."""

    def __init__(self, uniforms: Tensor) -> None:
        self._uniforms, self._next = uniforms, 0

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        self._next += 1
        assert self._next <= _UNIFORMS, "an image needs more random numbers than _UNIFORMS"
        return low + (high - low) * self._uniforms[:, self._next - 1, None, None]

    def sign(self) -> Tensor:
        return torch.where(self() < 0.5, -1.0, 1.0)

    def one_of(self, count: int) -> Tensor:
        """i64 [B], from 0 to count - 1."""
        return (self() * count).long().flatten()


# --- Drawing ----------------------------------------------------------------------------------------------------------


def render(
    indices: Tensor | Sequence[int],
    *,
    seed: int = 0,
    split: str = "train",
    size: int = 224,
    classes: int = 100,
    channels: int = 3,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Images f32 [B, channels, size, size] with values from 0 to 1, and labels i64 [B], both on `device`.

    Drawn a few at a time on a CPU, so that what is in between stays in its caches, and many at a time on a GPU.
    An image does not depend on the others of its batch, but for the rounding of an element's place in it.
    """
    if split not in SPLITS or channels not in (1, 3) or not MIN_SIZE <= size <= MAX_SIZE:
        raise DataError(f"{SCHEME}: split {split!r}, size {size}, {channels} channels cannot be drawn")
    device = torch.device(device)
    indices = torch.as_tensor(indices, dtype=torch.int64).to(device)
    labels = labels_of(indices, classes)
    keys = _keys(indices, seed, split)
    images = torch.empty(len(indices), channels, size, size, device=device)
    chunk = max(1, _CHUNK_PIXELS[device.type == "cuda"] // size**2)
    for begin in range(0, len(indices), chunk):
        part = slice(begin, begin + chunk)
        images[part] = _draw(keys[part], labels[part], size, channels)
    return images, labels


def _draw(keys: Tensor, labels: Tensor, size: int, channels: int) -> Tensor:
    draw = _Draw(_uniforms(keys, _UNIFORMS))
    shape, texture = _families(labels)
    axis = (torch.arange(size, device=keys.device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    x, y = axis.view(1, 1, size), axis.view(1, size, 1)

    # The object: its place, and how it is filled.
    place = [draw(-0.25, 0.25), draw(-0.25, 0.25), draw(0.48, 0.7), draw(0, 2 * math.pi), draw(-0.15, 0.15)]
    cover, away, angle = _shape(x, y, *place, shape)
    pair, middle = _colours(draw, channels, draw(0.2, 0.8), draw(0.28, 0.5))
    fill = _texture(draw, x - place[0], y - place[1], away, angle, draw(3.0, 5.0), place[2], texture)
    inside = _between(*pair, fill)

    # What is behind it: another texture, in colours that differ in lightness from the object's on average.
    ground = middle + torch.where(middle < 0.5, 1.0, -1.0) * draw(0.15, 0.4)
    pair, _ = _colours(draw, channels, ground, draw(0.08, 0.3))
    left, up = torch.broadcast_tensors(x - draw(-1, 1), y - draw(-1, 1))
    away, angle = torch.sqrt(left * left + up * up + 1e-8), torch.atan2(up, left)
    ground = _texture(draw, left, up, away, angle, draw(1.5, 4.0), 1.0, draw.one_of(len(TEXTURES)))
    image = _between(*pair, ground)

    for _ in range(DISTRACTORS):
        small = [draw(-0.95, 0.95), draw(-0.95, 0.95), draw(0.08, 0.2), draw(0, 2 * math.pi), draw(-0.15, 0.15)]
        spot, _, _ = _shape(x, y, *small, draw.one_of(len(SHAPES)))
        image = torch.lerp(image, _flat(draw, channels), spot.unsqueeze(1))
    image = torch.lerp(image, inside, cover.unsqueeze(1))

    # A strip across every other object.
    turn, offset, width = draw(0, 2 * math.pi), draw(-0.6, 0.6), draw(0.05, 0.12) * (draw() < 0.5)
    across = (x - place[0]) * turn.cos() + (y - place[1]) * turn.sin() - offset * place[2]
    strip = (0.5 + (width * place[2] - across.abs()) * (0.5 * size)).clamp(0, 1) * (width > 0)
    image = torch.lerp(image, _flat(draw, channels), strip.unsqueeze(1))

    turn, amount, brightness = draw(0, 2 * math.pi), draw(0, 0.35), draw(0.8, 1.1)
    light = brightness * (1.0 + amount * (x * turn.cos() + y * turn.sin()))
    image = image * light.unsqueeze(1)
    image = _blur(image, draw(-1, 1).clamp(min=0).unsqueeze(1))
    image = image + _grain(keys, size, channels) * draw(0, 0.2).unsqueeze(1)
    return image.clamp(0, 1)


@functools.cache
def _table(device: torch.device, kind: str) -> Tensor:
    """f32 [families, columns] of `_SHAPE_ROWS` or `_TEXTURE_ROWS`."""
    rows = [_SHAPE_ROWS[name] for name in SHAPES] if kind == "shapes" else [_TEXTURE_ROWS[name] for name in TEXTURES]
    return torch.tensor(rows, device=device)


def _shape(
    x: Tensor, y: Tensor, cx: Tensor, cy: Tensor, radius: Tensor, turn: Tensor, aspect: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How much of each pixel [B, H, W] the shapes `rows` i64 [B] cover, and the pixels' distance (in image units) and
    angle from the centre. All shapes run through the same arithmetic, so that a batch needs no sorting."""
    table = _table(x.device, "shapes")[rows]
    kind, n, a, cut_x, cut_r, shell = (column.view(-1, 1, 1) for column in table.unbind(1))
    dx, dy = x - cx, y - cy
    stretch = aspect.exp() / radius
    squeeze = (-aspect).exp() / radius
    u = (dx * turn.cos() + dy * turn.sin()) * stretch
    v = (dy * turn.cos() - dx * turn.sin()) * squeeze
    r = torch.sqrt(u * u + v * v + 1e-8)
    angle = torch.atan2(v, u)

    half = math.pi / n  # half a sector of the star polygon: from an outer corner at angle 0 to an inner one
    folded = (torch.remainder(angle + half, 2 * half) - half).abs()
    edge_x, edge_y = a * half.cos() - 1.0, a * half.sin()
    length = torch.sqrt(edge_x * edge_x + edge_y * edge_y)
    polygon = (edge_y * (r * folded.cos() - 1.0) - edge_x * (r * folded.sin())) / length
    flower = r - (1.0 - a + a * (n * angle).cos())
    ellipse = (torch.sqrt(u * u + (v / a) ** 2 + 1e-8) - 1.0) * a
    d = torch.where(kind == _POLYGON, polygon, torch.where(kind == _FLOWER, flower, ellipse))

    d = torch.maximum(d, cut_r - torch.sqrt((u - cut_x) ** 2 + v * v + 1e-8))
    d = (d + shell).abs() - shell
    cover = (0.5 - d * radius * (0.5 * x.shape[-1])).clamp(0, 1)
    return cover, r * radius, angle


def _texture(
    draw: _Draw, dx: Tensor, dy: Tensor, away: Tensor, angle: Tensor, frequency: Tensor, reach: Tensor | float,
    rows: Tensor,
) -> Tensor:  # fmt: skip
    """Values in [0, 1] [B, H, W] of the textures `rows` i64 [B]; `frequency` in cycles per unit of the image, `reach`
    the distance over which the ramp rises."""
    table = _table(dx.device, "textures")[rows]
    along, zig, wave, out, turns, warp, pitch, bias, s, t, st, hi, lo, n, r, gain = (
        column.view(-1, 1, 1) for column in table.unbind(1)
    )
    turn, tau = draw(0, 2 * math.pi), 2 * math.pi
    across = dx * turn.cos() + dy * turn.sin()
    down = dy * turn.cos() - dx * turn.sin()
    u, v = across * frequency + draw(), down * frequency + draw()
    noise = torch.zeros((), device=dx.device)
    for direction in _NOISE_DIRECTIONS:
        noise = noise + torch.sin((u * math.cos(direction) + v * math.sin(direction)) * (tau * pitch) + draw(0, tau))
    noise = noise * 0.5
    zigzag = (torch.remainder(v * 0.5, 1.0) - 0.5).abs() * 2.0
    phase = along * u + zig * zigzag + wave * 0.4 * torch.sin(v * (0.4 * tau))
    phase = phase + out * away * frequency + turns * angle / tau + warp * noise
    first, second = torch.sin(phase * tau + draw(0, tau) * (along == 0)), torch.sin(v * tau)
    value = bias + s * first + t * second + st * first * second + n * noise + r * down / reach
    value = value + hi * torch.maximum(first, second) + lo * torch.minimum(first, second)
    return (0.5 + draw.sign() * gain * value).clamp(0, 1)


def _colours(draw: _Draw, channels: int, lightness: Tensor, contrast: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two colours [B, channels, 1, 1] whose lightness differs by `contrast`, and their mean lightness [B, 1, 1]."""
    other = lightness + torch.where(lightness < 0.5, contrast, -contrast)
    return (_colour(draw, channels, lightness), _colour(draw, channels, other)), (lightness + other) / 2


def _colour(draw: _Draw, channels: int, lightness: Tensor) -> Tensor:
    """A colour [B, channels, 1, 1] of that lightness: the tint changes red, green and blue, not their luminance."""
    tint = torch.stack([draw(-0.25, 0.25) for _ in GREY], dim=1)
    if channels == 1:
        return lightness.unsqueeze(1)
    weights = torch.tensor(GREY, device=tint.device).view(1, 3, 1, 1)
    return (lightness.unsqueeze(1) + tint - (tint * weights).sum(1, keepdim=True)).clamp(0, 1)


def _flat(draw: _Draw, channels: int) -> Tensor:
    return _colour(draw, channels, draw(0.1, 0.9))


def _between(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(first, second, share.unsqueeze(1))


def _blur(image: Tensor, amount: Tensor) -> Tensor:
    """`image` mixed with its own box blur, about a hundredth of the image wide."""
    reach = max(1, round(image.shape[-1] / 112))
    padded = F.pad(image, (reach,) * 4, mode="replicate")
    width = 2 * reach + 1
    rows = F.avg_pool2d(padded, (1, width), stride=1)
    return torch.lerp(image, F.avg_pool2d(rows, (width, 1), stride=1), amount)


def _grain(keys: Tensor, size: int, channels: int) -> Tensor:
    """Noise [B, channels, H, W], uniform from -0.5 to 0.5: one hash of 32 bits a pixel, ten bits a channel."""
    pixels = torch.arange(size * size, device=keys.device).view(1, size, size)
    bits = _mix((keys ^ 0x3C6EF372).view(-1, 1, 1) + pixels * 0x1E3779B1)
    planes = [(bits >> (10 * c)) & 1023 for c in range(channels)]
    return (torch.stack(planes, dim=1).float() + 0.5) / 1024 - 0.5


# --- As a data set ----------------------------------------------------------------------------------------------------


class ProceduralDataset(Dataset):
    """(image f32 [C, size, size], label): normalized with `mean` and `std`, one number per channel each."""

    def __init__(
        self, spec: ProceduralSpec, split: str, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.spec, self.split, self.size = spec, split, size
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.classes = [class_name(label) for label in range(spec.classes)]

    def __len__(self) -> int:
        return getattr(self.spec, self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        images, labels = self.batch(torch.tensor([index]))
        return images[0], int(labels[0])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """What a DataLoader asks for: a batch drawn at once is several times as fast for small images."""
        images, labels = self.batch(indices)
        return list(zip(images, labels.tolist()))

    def batch(self, indices: Tensor | Sequence[int], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Many at once: images f32 [B, C, size, size] and labels i64 [B], made on `device`."""
        images, labels = render(
            indices, seed=self.spec.seed, split=self.split, size=self.size, classes=self.spec.classes,
            channels=len(self.mean), device=device,
        )  # fmt: skip
        return (images - self.mean.to(images.device)) / self.std.to(images.device), labels

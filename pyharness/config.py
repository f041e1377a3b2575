"""The geometry of a Swin model, V1 or V2, as the engine, the converter and the reference all read it."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pyharness.errors import FormatError

GRAPHS = ("ft_int8", "geluless_int8")
"""FasterTransformer's two graphs: the baseline, and the same after the patch series. A calibrated checkpoint is of one
of them: they say where quantizers are."""

FUSED_GRAPH = "fused_int8"
"""The graph that is free of FasterTransformer's structure (docs/fused.md); made from a checkpoint of either."""

ENGINE_GRAPHS = (*GRAPHS, FUSED_GRAPH)
"""Every graph that an engine file can be of."""

WEIGHT_SCALES = ("channel", "balanced", "tensor")
"""How the steps of the fused graph's weights are chosen (docs/fused.md): by each output channel's largest weight, the
most exact; the same, but no finer than BALANCED_RMS allows; by the tensor's largest weight. The CPU backend's GEMM for
AVX2 without VNNI is the faster the fewer steps most weights have (docs/epilogues.md)."""

BALANCED_RMS = 28.0
"""Steps that the root mean square of a channel's weights has at most with balanced scales: about what normal weights
have with one scale per tensor."""


@dataclass(frozen=True)
class StageGeometry:
    """What one stage computes on. `window` and `shift` are (h, w) after the resolution-at-most-window rule.

    Where windows do not divide the resolution, each block pads its tokens with zeros on the right and at the bottom, up
    to `padded`. `pad_first` says whether ahead of the cyclic shift, as Microsoft's detection code, mmdetection,
    torchvision and Hugging Face do, or behind it, as timm does; the attention mask is the same.
    """

    index: int
    dim: int
    depth: int
    heads: int
    resolution: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]
    has_downsample: bool
    pad_first: bool = False

    @property
    def padded(self) -> tuple[int, int]:
        """The resolution that whole windows cover."""
        height, width = (-(-size // window) * window for size, window in zip(self.resolution, self.window))
        return height, width

    @property
    def cycle(self) -> tuple[int, int]:
        """What the cyclic shift counts modulo."""
        return self.padded if self.pad_first else self.resolution

    @property
    def window_area(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def windows(self) -> int:
        return (self.padded[0] // self.window[0]) * (self.padded[1] // self.window[1])

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def shifts(self) -> bool:
        """Whether any block of the stage shifts, that is, whether the stage has an attention mask."""
        return self.depth > 1 and any(self.shift)

    def block_shift(self, block: int) -> tuple[int, int]:
        """Shift of block `block`: zero for even blocks, the stage's shift for odd ones."""
        return self.shift if block % 2 else (0, 0)


_WHOLE_NUMBERS = {"patch_size": 1, "in_chans": 1, "num_classes": 0, "embed_dim": 1, "version": 1}
"""Fields of a `SwinConfig` that are one whole number, and the least that each may be."""

_LISTS = {"img_size": 1, "depths": 1, "num_heads": 1, "window_size": 1, "pretrained_window_size": 0}
"""The same of lists of whole numbers."""


_LARGEST = 2**31 - 1
"""More than any of these numbers can be in use; sums and products of what is within it fit into float64."""

_LARGEST_QK_SCALE = 2**20
"""As in csrc/runtime/engine_file.cc."""


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    """Whether `value` is a number that float64 holds."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond float64
        return False


@dataclass(frozen=True)
class SwinConfig:
    """A Swin model. `window_size` has one entry per stage; `qk_scale` None means head_dim ** -0.5.

    `version` 2 is Swin-V2 (res-post-norm, cosine attention, no qk_scale). Its `pretrained_window_size` is the window,
    one per stage, that the weights of the position bias were trained with; empty, or 0 in a stage: this model's own.

    `pad_first` matters where windows do not divide a stage's tokens (`StageGeometry`), of images of `img_size` or of
    another size that the engine is given.
    """

    name: str
    img_size: tuple[int, int]
    patch_size: int
    in_chans: int
    num_classes: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: tuple[int, ...]
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
    patch_norm: bool = True
    version: int = 1
    pretrained_window_size: tuple[int, ...] = ()
    pad_first: bool = False

    def __post_init__(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise FormatError(f"model {self.name!r}: {message}")

        self._check_fields(need)
        need(len(self.img_size) == 2, f"img_size must be (height, width), found {self.img_size}")
        stages = len(self.depths)
        need(stages > 0, "depths is empty; at least one stage is needed")
        for field in ("num_heads", "window_size"):
            found = len(getattr(self, field))
            need(found == stages, f"{field} has {found} entries, depths has {stages}; give one per stage")
        self._check_version(need)
        need(
            all(size % self.patch_size == 0 for size in self.img_size),
            f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}",
        )
        for stage in self.stages():
            need(
                stage.dim % stage.heads == 0,
                f"stage {stage.index}: {stage.dim} channels do not divide into {stage.heads} heads",
            )

    def _check_fields(self, need: Callable[[bool, str], None]) -> None:
        """Types and bounds of each field by itself; what a file holds may be anything. Whole numbers become int."""
        need(isinstance(self.name, str), "name must be text")
        for field, least in _WHOLE_NUMBERS.items():
            value = getattr(self, field)
            fits = _is_whole(value) and least <= value <= _LARGEST
            need(fits, f"{field} must be a whole number from {least} to {_LARGEST}, found {value!r}")
            object.__setattr__(self, field, int(value))
        for field, least in _LISTS.items():
            values = getattr(self, field)
            fits = isinstance(values, (list, tuple)) and all(
                _is_whole(v) and least <= v <= _LARGEST for v in values
            )
            need(fits, f"{field} must be a list of whole numbers from {least} to {_LARGEST}, found {values!r}")
            object.__setattr__(self, field, tuple(int(value) for value in values))
        for field in ("qkv_bias", "patch_norm", "pad_first"):
            value = getattr(self, field)
            need(isinstance(value, bool), f"{field} must be true or false, found {value!r}")
        ratio, scale = self.mlp_ratio, self.qk_scale
        need(
            _is_finite(ratio) and 1 <= self.embed_dim * ratio <= _LARGEST,
            f"mlp_ratio must be a number that gives at least one of embed_dim {self.embed_dim} hidden channels, "
            f"found {ratio!r}",
        )
        need(
            scale is None or (_is_finite(scale) and 0 < scale <= _LARGEST_QK_SCALE),
            f"qk_scale must be null or a number above 0, at most {_LARGEST_QK_SCALE}, found {scale!r}",
        )

    def _check_version(self, need: Callable[[bool, str], None]) -> None:
        need(self.version in (1, 2), f"version {self.version!r} is unknown; Swin-V1 is 1, Swin-V2 is 2")
        trained, stages = self.pretrained_window_size, len(self.depths)
        if self.version == 1:
            need(not trained, "has a pretrained_window_size, which Swin-V1's position bias does not know")
        else:
            need(self.qk_scale is None, "has a qk_scale; Swin-V2 has a logit_scale of each head's own instead")
            need(
                len(trained) in (0, stages),
                f"pretrained_window_size has {len(trained)} entries, depths has {stages}; give one per stage, or none",
            )

    @property
    def num_features(self) -> int:
        """Channels of the pooled features: embed_dim * 2 ** (stages - 1)."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def is_padded(self) -> bool:
        """Whether windows of any stage do not divide its tokens."""
        return any(stage.padded != stage.resolution for stage in self.stages())

    def stages(self) -> Iterator[StageGeometry]:
        """The stages in order, downsample belonging to the end of a stage (Microsoft's convention)."""
        height, width = (size // self.patch_size for size in self.img_size)
        for index, depth in enumerate(self.depths):
            if index > 0:
                height, width = (height + 1) // 2, (width + 1) // 2  # patch merging pads odd sizes
            resolution = (height, width)
            wanted = self.window_size[index]
            window = tuple(min(r, wanted) for r in resolution)
            shift = tuple(0 if r <= wanted else wanted // 2 for r in resolution)
            yield StageGeometry(
                index=index,
                dim=self.embed_dim * 2**index,
                depth=depth,
                heads=self.num_heads[index],
                resolution=resolution,
                window=window,
                shift=shift,
                has_downsample=index + 1 < len(self.depths),
                pad_first=self.pad_first,
            )

    def hidden_dim(self, dim: int) -> int:
        """Hidden channels of the MLP of a block of `dim` channels."""
        return int(dim * self.mlp_ratio)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SwinConfig:
        """Inverse of `to_json`; FormatError where a field is missing, unknown or of the wrong type."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise FormatError(f"the model description is not readable: {error}") from None


def are_class_names(names: object, classes: int) -> bool:
    """Whether `names`, of a file's meta data, are those of `classes` classes: as many texts."""
    return isinstance(names, list) and len(names) == classes > 0 and all(isinstance(name, str) for name in names)


MICRO_DIGITS = SwinConfig(
    name="swin_micro_digits",
    img_size=(28, 28),
    patch_size=2,
    in_chans=1,
    num_classes=10,
    embed_dim=32,
    depths=(2, 2),
    num_heads=(1, 2),
    window_size=(7, 7),
)
"""The embedded default model: scikit-learn's digits at 28x28; 14x14 then 7x7 tokens, head size 32."""

"""The calibrated checkpoint: floating-point weights with the amax of every quantizer, in Microsoft's layout.

Written by pyharness/quantize.py; read by pyharness/convert.py and by everything that evaluates the fake-quantized
model. Safetensors, or .pth loadable with weights_only.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyharness.checkpoint import (
    AMAX_SUFFIX,
    describe_geometry,
    load_checkpoint,
    same_model,
    save_state_dict,
    to_microsoft_layout,
)
from pyharness.config import GRAPHS, SwinConfig
from pyharness.engine_file import amax_problem
from pyharness.errors import CalibrationError, CheckpointError, FormatError
from pyharness.ft_format import SCALE_FIELDS, quantizer_name, required_scales

if TYPE_CHECKING:
    from pyharness.fakequant import FakeQuantSwin

ACTIVATION_OF = {"ft_int8": "gelu", "geluless_int8": "relu"}


@dataclass(frozen=True, eq=False)
class CalibratedCheckpoint:
    """A state dict with its quantizers' amax (`*_quantizer._amax`, one float32 each), and what it is of.

    `meta` holds the rest: how it was calibrated, where the weights came from. JSON-serializable.
    """

    config: SwinConfig
    graph: str
    int8_mode: int
    state: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    def amax(self, stage: int, block: int) -> dict[str, float]:
        """amax by scale name of one block: every quantizer of the checkpoint, the stage's reduction included."""
        found = {}
        for scale in SCALE_FIELDS:
            key = f"{quantizer_name(scale.name, stage, block)}._amax" if scale.quantizer else ""
            if key in self.state:
                found[scale.name] = _scalar(key, self.state[key])
        return found

    def required(self) -> Iterator[tuple[str, float]]:
        """Full name and amax (NaN where it is missing) of each quantizer that the graph needs, each once."""
        seen = set()
        for stage in self.config.stages():
            for block in range(stage.depth):
                amax = self.amax(stage.index, block)
                for scale in required_scales(self.graph, self.int8_mode, stage.has_downsample):
                    name = quantizer_name(scale, stage.index, block)
                    if name not in seen:
                        seen.add(name)
                        yield name, amax.get(scale, math.nan)

    def check(self, origin: str = "checkpoint") -> None:
        """CalibrationError naming every required amax that is missing or cannot be used."""
        amax = dict(self.required())
        missing = [name for name in amax if f"{name}._amax" not in self.state]
        if len(missing) == len(amax):
            raise CalibrationError(
                f"{origin}: is not calibrated, none of its {len(amax)} quantizers has an amax; "
                "calibrate it with `python pyharness/quantize.py`"
            )
        problems = [f"{name} has no amax" for name in missing]
        problems += [problem for name in amax.keys() - set(missing) if (problem := amax_problem(name, amax[name]))]
        if problems:
            raise CalibrationError(
                f"{origin}: {'; '.join(sorted(problems))}. Calibrate again with pyharness/quantize.py: more images, "
                "or another --method"
            )

    def to_model(self) -> FakeQuantSwin:
        """The fake-quantized model. CheckpointError where the state dict does not fit the geometry."""
        from pyharness.fakequant import FakeQuantSwin

        self.check()
        model = FakeQuantSwin(self.config, self.graph, self.int8_mode)
        known = model.state_dict()
        # Amax of quantizers that no graph applies (the residuals') may stand in the file.
        state = {name: t for name, t in self.state.items() if name in known or not name.endswith("_quantizer._amax")}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"the calibrated checkpoint does not fit {self.config.name}: {error}") from None
        return model


def _scalar(name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise CalibrationError(f"{name} has {tensor.numel()} values; per-tensor quantization needs one")
    return float(tensor)


def checkpoint_of(model: FakeQuantSwin, meta: dict[str, Any]) -> CalibratedCheckpoint:
    """The checkpoint of a calibrated model: its own tensors, not copies."""
    return CalibratedCheckpoint(model.config, model.graph, model.int8_mode, dict(model.state_dict()), meta)


def save_calibrated(path: str | Path, checkpoint: CalibratedCheckpoint) -> None:
    """Write `checkpoint` to `path` (.safetensors, .pth or .pt), atomically. Raises as `CalibratedCheckpoint.check`."""
    checkpoint.check(str(path))
    meta = {
        **checkpoint.meta,
        "model": checkpoint.config.name,
        "config": dataclasses.asdict(checkpoint.config),
        "activation": ACTIVATION_OF[checkpoint.graph],
        "graph": checkpoint.graph,
        "int8_mode": checkpoint.int8_mode,
    }
    save_state_dict(path, checkpoint.state, meta)


def load_calibrated(path: str | Path, name: str | None = None, *, int8_mode: int | None = None) -> CalibratedCheckpoint:
    """Read a calibrated checkpoint: ours, which says what it is of, or one that FasterTransformer's tool wrote.

    The latter holds Microsoft's names and the quantizers' amax alone: its geometry is that of the timm model `name`,
    with the file's own numbers of classes and channels; graph and int8_mode follow from which quantizers it has
    (`int8_mode` overrules that where the file has more than the mode needs). How its images are normalized it does not
    say either: the model's own way, that of `data.input_normalization`, is written into the meta data. For one of ours
    `name` is not needed, and may be its own alone.

    CheckpointError where the file cannot be read or is not of that model; CalibrationError where it is not calibrated,
    or an amax is no use.
    """
    state, meta = load_checkpoint(path)
    if not any(key.endswith(AMAX_SUFFIX) for key in state):
        raise CalibrationError(
            f"{path}: is not calibrated, it has no amax of any quantizer; make a calibrated checkpoint with "
            "`python pyharness/quantize.py`"
        )
    state = {key: t.float().reshape(()) if _is_scalar_amax(key, t) else t for key, t in state.items()}
    if all(key in meta for key in ("config", "graph", "int8_mode")):
        checkpoint = _described(path, state, meta)
        own = checkpoint.config.name
        if name is not None and not same_model(name, own):
            raise CheckpointError(f"{path}: says that it is of {own}, not of {name}; give that name, or none (--model)")
        if int8_mode not in (None, checkpoint.int8_mode):
            raise CheckpointError(
                f"{path}: says that its int8_mode is {checkpoint.int8_mode}, not {int8_mode}; leave --int8-mode out"
            )
    else:
        if name is None:
            raise CheckpointError(
                f"{path}: is calibrated, as by FasterTransformer's tool, and does not say of which model; give its "
                f"timm name (--model). It shows {describe_geometry(state)}. For programs without --model write the "
                f"name into a file: python pyharness/convert.py to-checkpoint {path} OUT --model NAME"
            )
        checkpoint = _recognized(path, state, name, int8_mode)
    checkpoint.check(str(path))
    return checkpoint


def _is_scalar_amax(name: str, tensor: Tensor) -> bool:
    """FT's quantizers keep an amax as [] or as [1]; ours as []."""
    return name.endswith(AMAX_SUFFIX) and tensor.numel() == 1


def _described(path: str | Path, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> CalibratedCheckpoint:
    """The checkpoint of a file that says what it is of."""
    if meta["graph"] not in GRAPHS or meta["int8_mode"] not in (1, 2):
        raise FormatError(f"{path}: graph {meta['graph']!r}, int8_mode {meta['int8_mode']!r} are unknown")
    config = SwinConfig.from_json(json.dumps(meta["config"]))
    described = {"config", "graph", "int8_mode", "model", "activation"}
    rest = {key: value for key, value in meta.items() if key not in described}
    return CalibratedCheckpoint(config, meta["graph"], meta["int8_mode"], to_microsoft_layout(state), rest)


def _recognized(
    path: str | Path, state: Mapping[str, Tensor], name: str, int8_mode: int | None
) -> CalibratedCheckpoint:
    """The checkpoint of a file that does not say what it is of: of the timm model `name`, checked tensor by tensor."""
    from pyharness.data import input_normalization
    from pyharness.models import config_of, create_model, load_state, make_geluless

    weights = {key: tensor for key, tensor in state.items() if not key.endswith(AMAX_SUFFIX)}
    biases = [key for key in weights if key.endswith(".mlp.fc1.bias")]
    geluless = not any(weights[key].any() for key in biases)
    if geluless and any(key.endswith(".mlp.fc1._aftergemm_quantizer._amax") for key in state):
        raise CheckpointError(
            f"{path}: has no FC1 bias but zero, as a GELU-less model, yet a quantizer between FC1 and its bias, "
            "as a GELU model; give the calibrated file that pyharness/quantize.py wrote"
        )
    if int8_mode is None:
        int8_mode = 1 if any(key.endswith(".mlp.fc2._aftergemm_quantizer._amax") for key in state) else 2
    classes = len(weights["head.fc.weight"]) if "head.fc.weight" in weights else 0
    patches = weights.get("patch_embed.proj.weight")
    in_chans = None if patches is None or patches.dim() != 4 else patches.shape[1]
    model = create_model(name, num_classes=classes, in_chans=in_chans)
    if geluless:
        make_geluless(model)
        weights = {**{key: t for key, t in model.state_dict().items() if key.endswith(".mlp.fc1.bias")}, **weights}
    load_state(model, weights, {}, str(path))
    config = config_of(model, name)
    if config.version != 1:
        raise CheckpointError(
            f"{path}: is of a Swin-V2 and does not say so itself; such files are read for Swin-V1 only"
        )
    kept = {key: tensor for key, tensor in state.items() if not (geluless and key in biases)}
    graph = "geluless_int8" if geluless else "ft_int8"
    normalization = input_normalization(None, name, model)
    meta = {"weights": Path(path).name, **({} if normalization is None else {"input": normalization})}
    return CalibratedCheckpoint(config, graph, int8_mode, to_microsoft_layout(kept), meta)

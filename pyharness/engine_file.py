"""The engine file: FasterTransformer's weight list in one safetensors file with a versioned header.

The tensors keep the order of the list: each is stored under its position and its name, such as
`0003.layers.0.blocks.0.attn.proj.bias`.
The header's metadata holds the geometry, the graph and int8_mode, and how to make the file again.
Source of names, order, shapes and dtypes: pyharness/ft_format.py and docs/weight_format.md; for the fused graph
pyharness/fused_format.py and docs/fused.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyharness import ft_format, fused_format
from pyharness.config import ENGINE_GRAPHS, FUSED_GRAPH, StageGeometry, SwinConfig, are_class_names
from pyharness.errors import CalibrationError, FormatError
from pyharness.image_input import fault_of
from pyharness.tensor_file import LFS_POINTER, file_kind, load_tensors, save_tensors

MAGIC = "swin-int8"
VERSION = 1

MAKING = (
    "of weights `python pyharness/quantize.py --weights WEIGHTS --data DIR --out CALIBRATED` makes a calibrated "
    "checkpoint, and of that `python pyharness/convert.py to-engine CALIBRATED ENGINE_FILE` an engine file"
)

DTYPES = {"s8": torch.int8, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class TensorSpec:
    """What the weight list holds at one position. Empty slots have shape (0,)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return self.shape == (0,)


def weight_specs(config: SwinConfig, graph: str, gelu: bool = False) -> list[TensorSpec]:
    """Name, dtype and shape of every tensor of the weight list of `config` and `graph`, in order.

    `gelu` says whether a model of the fused graph has GELU; FasterTransformer's graphs say it themselves.
    """
    lists = fused_format if graph == FUSED_GRAPH else ft_format
    block_fields, stage_fields = lists.block_weights(config.version), lists.stage_weights(config.version)
    gelu = gelu if graph == FUSED_GRAPH else graph == "ft_int8"
    specs: list[TensorSpec] = []
    for stage in config.stages():
        symbols = _stage_symbols(config, stage)
        empty = _empty_slots(config, stage, gelu)
        for block in range(stage.depth):
            prefix = f"layers.{stage.index}.blocks.{block}."
            specs += _resolve(block_fields, prefix, symbols, empty)
        specs += _resolve(stage_fields, f"layers.{stage.index}.", symbols, empty)
    symbols = {
        "E": config.embed_dim,
        "P": config.in_chans * config.patch_size**2,
        "L": config.num_features,
        "K": config.num_classes,
    }
    empty = set() if config.patch_norm else {"patch_embed.norm.weight", "patch_embed.norm.bias"}
    specs += _resolve(lists.FINAL_WEIGHTS, "", symbols, empty)
    if config.num_classes:
        specs += _resolve(lists.HEAD_WEIGHTS, "", symbols, set())
    return specs


def weight_names(config: SwinConfig, graph: str) -> list[str]:
    """Checkpoint names of the weight list, in order."""
    if graph == FUSED_GRAPH:
        return [spec.name for spec in weight_specs(config, graph)]
    return ft_format.weight_names(config.depths, bool(config.num_classes), config.version)


def _stage_symbols(config: SwinConfig, stage: StageGeometry) -> dict[str, int]:
    return {
        "C": stage.dim,
        "F": config.hidden_dim(stage.dim),
        "H": stage.heads,
        "N": stage.window_area,
        "W": stage.windows,
    }


def _empty_slots(config: SwinConfig, stage: StageGeometry, gelu: bool) -> set[str]:
    empty = set()
    if not config.qkv_bias:
        empty.add("attn.qkv.bias")
    if not gelu:
        empty.add("mlp.fc1.bias")
    if not stage.has_downsample:
        lists = (*ft_format.STAGE_WEIGHTS, *fused_format.STAGE_WEIGHTS)
        empty.update(f.name for f in lists if f.name.startswith("downsample."))
    if not stage.shifts:
        empty.add("attn_mask")
    return empty


def _resolve(
    fields: tuple[ft_format.WeightField, ...], prefix: str, symbols: Mapping[str, int], empty: set[str]
) -> Iterator[TensorSpec]:
    for item in fields:
        shape = (0,) if item.name in empty else tuple(_dimension(text, symbols) for text in item.shape)
        yield TensorSpec(prefix + item.name, DTYPES[item.dtype], shape)


def _dimension(text: str, symbols: Mapping[str, int]) -> int:
    """Value of "96", "C" or "3C"."""
    symbol = text.lstrip("0123456789")
    return int(text.removesuffix(symbol) or 1) * (symbols[symbol] if symbol else 1)


@dataclass(frozen=True, eq=False)
class EngineFile:
    """Everything the engine needs: geometry, graph and the weight list, head included.

    `tensors` are checked against `weight_specs` (FormatError); their values are checked where a file is written or
    read (`check_scales`). `meta` is free text about the origin, JSON-serializable; only its "input", the normalization
    of the images (`data.input_normalization`), and its "classes", their names in order (`data.class_names`), are read
    by programs and checked (FormatError).
    """

    config: SwinConfig
    graph: str
    int8_mode: int
    tensors: list[torch.Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.graph not in ENGINE_GRAPHS:
            raise FormatError(f"graph {self.graph!r} is unknown; choose one of {', '.join(ENGINE_GRAPHS)}")
        modes = (1,) if self.graph == FUSED_GRAPH else (1, 2)  # the fused graph has one arithmetic only
        if self.int8_mode not in modes:
            raise FormatError(
                f"int8_mode {self.int8_mode!r} is unknown to {self.graph}; choose {' or '.join(map(str, modes))}"
            )
        require_int8_mode(self.config, self.int8_mode)
        specs = weight_specs(self.config, self.graph, self.gelu)
        if len(self.tensors) != len(specs):
            raise FormatError(
                f"the weight list of {self.config.name!r} ({self.graph}) has {len(specs)} tensors, "
                f"found {len(self.tensors)}"
            )
        self._check_activations_alike()
        for position, (tensor, spec) in enumerate(zip(self.tensors, specs)):
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise FormatError(
                    f"weight {position} ({spec.name}) must be {_dtype(spec.dtype)} {list(spec.shape)}, "
                    f"found {_dtype(tensor.dtype)} {list(tensor.shape)}"
                )
        if "input" in self.meta:
            _check_input(self.meta["input"], self.config.in_chans)
        if "classes" in self.meta:
            _check_classes(self.meta["classes"], self.config.num_classes)

    @property
    def gelu(self) -> bool:
        """Whether the model has GELU: the graph says it, in the fused graph an FC1 bias that is not empty."""
        if self.graph != FUSED_GRAPH:
            return self.graph == "ft_int8"
        return any(bias.numel() for bias in self._fc1_biases().values())

    def _fc1_biases(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in zip(self.names, self.tensors) if name.endswith(".mlp.fc1.bias")}

    def _check_activations_alike(self) -> None:
        """FormatError where a model of the fused graph has GELU in some blocks only."""
        empty = [name for name, bias in self._fc1_biases().items() if not bias.numel()]
        if self.graph == FUSED_GRAPH and self.gelu and empty:
            raise FormatError(
                f"{', '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty and other blocks have an FC1 bias; "
                "all blocks have GELU, with a bias each, or none has"
            )

    @property
    def names(self) -> list[str]:
        """Checkpoint names of `tensors`, in order."""
        return weight_names(self.config, self.graph)

    def by_name(self) -> dict[str, torch.Tensor]:
        """`tensors` by their name."""
        return dict(zip(self.names, self.tensors))


def _check_classes(names: Any, classes: int) -> None:
    """FormatError unless the meta data's "classes" has a name for each class."""
    if not are_class_names(names, classes):
        found = f"a list of {len(names)}" if isinstance(names, list) else _shown(names)
        raise FormatError(
            f'"classes" of the meta data, the names of the classes, is {found}; needed is a list of {classes} texts. '
            'Calibrate and convert again, or leave "classes" out'
        )


def _check_input(normalization: Any, channels: int) -> None:
    """FormatError unless the meta data's "input" has a mean and a std that float32 can work with for every channel, and
    what else it says of images is known (`image_input`)."""

    def need(condition: bool, found: str, needed: str) -> None:
        if not condition:
            raise FormatError(
                f'"input" of the meta data, the normalization of the images, {found}; needed is {needed}. Calibrate '
                'and convert again, or leave "input" out'
            )

    need(isinstance(normalization, dict), f"is {_shown(normalization)}", 'an object with "mean" and "std"')
    for key in ("mean", "std"):
        values = normalization.get(key)
        need(isinstance(values, (list, tuple)), f"has {key} {_shown(values)}", f"a list of {channels}, one per channel")
        need(len(values) == channels, f"has {len(values)} numbers as {key}", f"a list of {channels}, one per channel")
        for value in values:
            number = _as_float32(value)
            need(math.isfinite(number), f"has {_shown(value)} in {key}", "a number that is finite in float32")
            need(key == "mean" or number > 0, f"has {_shown(value)} in {key}", "a number above zero in float32")
    if fault := fault_of(normalization):
        need(False, *fault)


def _as_float32(value: Any) -> float:
    """`value` rounded to float32, infinite beyond; NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(value))
    except OverflowError:  # an int beyond float64
        return math.inf


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def require_int8_mode(config: SwinConfig, int8_mode: int) -> None:
    """FormatError where FT's graph of `config` has no such int8_mode."""
    if config.version == 2 and int8_mode != 1:
        raise FormatError(f"{config.name}: Swin-V2 has int8_mode 1 only, found {int8_mode}; leave --int8-mode out")


def scale_list(amax: Mapping[str, float], graph: str) -> torch.Tensor:
    """The float32 scale list [96] of one block, computed from the float32 value of every amax.

    Rounding the amax first makes the list a function of the stored amax, so that a round trip is exact.
    """
    rounded = {name: float(np.float32(value)) for name, value in amax.items()}
    with np.errstate(over="ignore"):  # an amax too small for its reciprocal becomes inf; check_scales names it
        return torch.from_numpy(np.array(ft_format.encode_scales(rounded, graph), dtype=np.float64).astype(np.float32))


def check_scales(ef: EngineFile, origin: str = "engine file") -> None:
    """Check every scale list of `ef`, and that its numbers are finite; of the fused graph also what scales belong to.

    Raises CalibrationError naming every required amax that is zero, negative or not finite, and FormatError where the
    lists contradict each other or themselves, or a parameter holds NaN or infinity, which int8 would turn into numbers.
    """
    tensors = ef.by_name()
    if ef.graph == FUSED_GRAPH:
        _check_fused(ef, tensors, origin)
    else:
        _check_lists(ef, tensors, origin)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FormatError(f"{origin}: {name} holds NaN or infinity; convert the checkpoint again")


def _check_lists(ef: EngineFile, tensors: Mapping[str, torch.Tensor], origin: str) -> None:
    """The scale lists of FT's graphs; errors as `check_scales`."""
    bad: dict[str, None] = {}
    for stage in ef.config.stages():
        required = ft_format.required_scales(ef.graph, ef.int8_mode, stage.has_downsample)
        for block in range(stage.depth):
            amax = ft_format.decode_scales(tensors[f"layers.{stage.index}.blocks.{block}.amaxList"].tolist())
            for name in required:
                problem = amax_problem(ft_format.quantizer_name(name, stage.index, block), amax[name])
                if problem:
                    bad[problem] = None
    if bad:
        raise CalibrationError(f"{origin}: {'; '.join(bad)}. Calibrate again with pyharness/quantize.py.")
    for stage in ef.config.stages():
        for block in range(stage.depth):
            _check_consistent(tensors, f"layers.{stage.index}.blocks.", block, ef.graph, origin)


def _check_consistent(tensors: Mapping[str, torch.Tensor], prefix: str, block: int, graph: str, origin: str) -> None:
    """Both copies of a list are equal, all numbers follow from the amax values, a stage has one set for its merging."""
    values = tensors[f"{prefix}{block}.amaxList"]
    amax = ft_format.decode_scales(values.tolist())
    first = ft_format.decode_scales(tensors[f"{prefix}0.amaxList"].tolist())
    if not torch.equal(values, tensors[f"{prefix}{block}.h_amaxList"]):
        fault = "differs from h_amaxList"
    elif not torch.equal(values, scale_list(amax, graph)):
        fault = f"holds numbers that do not follow from its amax values for the {graph} graph"
    elif any(amax[name] != first[name] for name in amax if name.startswith("reduction")):
        fault = f"has another amax for the patch merging than {prefix}0.amaxList"
    else:
        return
    raise FormatError(f"{origin}: {prefix}{block}.amaxList {fault}; convert the checkpoint again")


def _check_fused(ef: EngineFile, tensors: Mapping[str, torch.Tensor], origin: str) -> None:
    """CalibrationError for an amax that is no use; FormatError for a weight's step that is not above zero and for a
    weight of -128."""
    bad, fields = [], fused_format.amax_fields(ef.config.version)
    for stage in ef.config.stages():
        for block in range(stage.depth):
            amax = zip(fields, tensors[f"layers.{stage.index}.blocks.{block}.amax"].tolist())
            bad += [amax_problem(ft_format.quantizer_name(name, stage.index, block), value) for name, value in amax]
        amax = zip(fused_format.STAGE_AMAX_FIELDS, tensors[f"layers.{stage.index}.downsample.amax"].tolist())
        bad += [amax_problem(ft_format.quantizer_name(name, stage.index, 0), value) for name, value in amax]
    if any(bad):
        problems = "; ".join(problem for problem in bad if problem)
        raise CalibrationError(f"{origin}: {problems}. Calibrate again with pyharness/quantize.py.")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8 and (tensor == -128).any():
            fault = "holds -128; weights lie within -127..127"
        elif name.endswith(".weight_scale") and not (tensor > 0).all() and tensor.isfinite().all():
            fault = f"has the step {tensor.min():g}; every step must be greater than zero"
        else:
            continue
        raise FormatError(f"{origin}: {name} {fault}; convert the checkpoint again")


SMALLEST_AMAX = 2.0**-24
LARGEST_AMAX = 2.0**24
"""An amax must lie above the first (ModelOpt, too, takes less for zero) and below the second; within these bounds every
number of a scale list, products and reciprocals included, is a normal float32."""


def amax_problem(name: str, value: float) -> str | None:
    """What is wrong with the amax `value` of `name`, in words, or None."""
    problem = ft_format.check_finite_positive(name, value)
    if problem is None and not SMALLEST_AMAX < value < LARGEST_AMAX:
        problem = f"{name} has amax {value:g}; it must lie between {SMALLEST_AMAX:.3g} and {LARGEST_AMAX:.3g}"
    return problem


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hint(ef: EngineFile) -> str:
    if ef.meta.get("hint"):
        return str(ef.meta["hint"])
    return (
        f"python pyharness/quantize.py --model {ef.config.name} --weights WEIGHTS --int8-mode {ef.int8_mode} "
        "--out calibrated.safetensors && python pyharness/convert.py to-engine calibrated.safetensors ENGINE_FILE"
        + (f" --graph {FUSED_GRAPH}" if ef.graph == FUSED_GRAPH else "")
    )


def _strict(value: Any) -> Any:
    """`value` with what Python's JSON has and other readers refuse replaced: NaN and infinity by null, halves of
    surrogate pairs (names of files and folders that are no UTF-8) by question marks."""
    if isinstance(value, Mapping):
        return {_strict(key): _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def save_engine_file(path: str | Path, ef: EngineFile) -> None:
    """Write `ef` to `path` atomically; the same content gives the same bytes. Raises as `check_scales` does."""
    check_scales(ef)
    keyed = {f"{position:04d}.{name}": tensor for position, (name, tensor) in enumerate(zip(ef.names, ef.tensors))}
    header = {
        "format": MAGIC,
        "version": str(VERSION),
        "config": replace(ef.config, name=_strict(ef.config.name)).to_json(),
        "graph": ef.graph,
        "int8_mode": str(ef.int8_mode),
        "hint": _strict(_hint(ef)),
        "meta": json.dumps(_strict(ef.meta), sort_keys=True, allow_nan=False),
    }
    save_tensors(path, keyed, header)


def load_engine_file(path: str | Path) -> EngineFile:
    """Read an engine file.

    Raises FormatError where the file is cut off, is no engine file, has a newer version, or its tensors are not those
    of its header; CalibrationError where a scale cannot be used.
    """
    kind = file_kind(path)
    if kind and kind != LFS_POINTER:
        raise FormatError(f"{path}: is {kind}, not an engine file; {MAKING}")
    tensors, header = load_tensors(path, FormatError)
    ef = _from_header(str(path), tensors, header)
    check_scales(ef, str(path))
    return ef


def _from_header(path: str, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> EngineFile:
    if header.get("format") != MAGIC:
        raise FormatError(
            f"{path}: a safetensors file, but no engine file (format is {header.get('format')!r}, needed {MAGIC!r}); "
            f"{MAKING}"
        )
    if header.get("version") != str(VERSION):
        raise FormatError(
            f"{path}: engine file version {header.get('version')!r}, this program reads version {VERSION}; "
            f"update the program, or make the file again: {header.get('hint', 'see docs/weight_format.md')}"
        )
    missing = [key for key in ("config", "graph", "int8_mode", "meta") if key not in header]
    if missing:
        raise FormatError(f"{path}: the header lacks {', '.join(missing)}; make the file again")
    try:
        int8_mode, meta = int(header["int8_mode"]), json.loads(header["meta"])
    except ValueError as error:
        raise FormatError(f"{path}: the header is not readable: {error}") from None
    if not isinstance(meta, dict):
        raise FormatError(f"{path}: meta must be a JSON object, found {_shown(meta)}; make the file again")
    try:
        config, graph = SwinConfig.from_json(header["config"]), header["graph"]
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    keys = [f"{position:04d}.{name}" for position, name in enumerate(weight_names(config, graph))]
    lacking, extra = sorted(set(keys) - tensors.keys()), sorted(tensors.keys() - set(keys))
    if lacking or extra:
        raise FormatError(
            f"{path}: the tensors are not those of {config.name!r} ({graph}): "
            f"missing {_some(lacking)}, unexpected {_some(extra)}. Make it again: {header.get('hint', '')}"
        )
    try:
        return EngineFile(config, graph, int8_mode, [tensors[key] for key in keys], meta)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"

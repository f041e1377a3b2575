"""What timm writes beside the weights of a model: its geometry, how its images come in, what its classes are called.

- The training program's checkpoint has its options under `args`, an argparse.Namespace or a dict: `model`, `img_size`,
  `input_size`, `model_kwargs`, `mean`, `std`, `interpolation`, `crop_pct`, ...
- The folder of `save_for_hf` and `push_to_hf_hub` has config.json: `architecture`, `model_args`, `pretrained_cfg` with
  `input_size`, `mean`, `std`, ..., `label_names`; beside it the weights under timm's names.

Plain values are taken and nothing else; one line on stderr says which. The numbers of classes and channels are always
those of the weights. A name that timm does not have, or of no Swin, is left to --model, and what else is said holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyharness.config import SwinConfig, are_class_names
from pyharness.errors import CheckpointError, HarnessError
from pyharness.image_input import fault_of, in_words
from pyharness.model_geometry import config_of
from pyharness.training import report_once

CONFIG_NAME = "config.json"
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Files that hold the weights of a folder, the first found counts."""

_GEOMETRY = (
    "patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias", "pretrained_window_sizes",
)  # fmt: skip
"""Arguments of timm's Swins, besides the image's size, that the geometry follows from."""


# --- The training program's options -----------------------------------------------------------------------------------


def meta_of_training(content: Any, state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Meta data of a checkpoint of timm's training program: `content` is all of it, `state` its weights in timm's
    layout. {} where it has no options, or is no Swin's."""
    options = content.get("args") if isinstance(content, Mapping) else None
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    if not isinstance(options, Mapping) or "patch_embed.proj.weight" not in state:
        return {}
    arguments = options.get("model_kwargs")
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    # As timm: the model's own argument, else input_size [C, H, W], else img_size.
    sizes = (_size(arguments.get("img_size")), _size(options.get("input_size")), _size(options.get("img_size")))
    size = next((each for each in sizes if each), None)
    return _meta(options.get("model"), size, arguments, options, [], state, f"{path}: of its training options (args)")


# --- The folder -------------------------------------------------------------------------------------------------------


def weights_in(folder: Path) -> Path | None:
    """The file with the weights of a folder of timm's; None where the folder is none. CheckpointError where its weights
    are missing, or config.json cannot be read."""
    if _folder_fields(folder) is None:
        return None
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    names = ", ".join(WEIGHT_NAMES)
    raise CheckpointError(f"{folder}: has timm's {CONFIG_NAME} and none of {names}; fetch the weights")


def meta_of_folder(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Meta data that the config.json beside the weights `path` gives, which are `state` in timm's layout. {} where that
    is none of timm's, the file has not the name of its weights, or they are no Swin's."""
    fields = _folder_fields(path.parent) if path.name in WEIGHT_NAMES else None
    if fields is None or "patch_embed.proj.weight" not in state:
        return {}
    # Files of older versions of timm have no pretrained_cfg apart, and call label_names labels.
    cfg = fields["pretrained_cfg"] if isinstance(fields.get("pretrained_cfg"), Mapping) else fields
    arguments = dict(fields["model_args"]) if isinstance(fields.get("model_args"), Mapping) else {}
    size = _size(arguments.get("img_size")) or _size(cfg.get("input_size"))
    named = next((each[key] for key in ("label_names", "labels") for each in (fields, cfg) if each.get(key)), None)
    source = f"{path.parent}: of timm's {CONFIG_NAME}"
    return _meta(fields["architecture"], size, arguments, cfg, _names(named), state, source)


def _folder_fields(folder: Path) -> dict[str, Any] | None:
    """The fields of a folder's config.json where timm wrote it, else None."""
    try:
        fields = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever needs it says so
        return None
    is_timms = isinstance(fields, dict) and isinstance(fields.get("architecture"), str) and "model_type" not in fields
    return fields if is_timms else None


def _names(said: Any) -> list[str]:
    """The classes' names in order: of a list, or of a dict from numbers, which JSON has as text."""
    if isinstance(said, Mapping):
        said = [said.get(str(number), said.get(number)) for number in range(len(said))]
    return [str(name) for name in said] if isinstance(said, list) and None not in said else []


# --- What both have ---------------------------------------------------------------------------------------------------


def _meta(
    name: Any,
    size: tuple[int, int] | None,
    arguments: Mapping[str, Any],
    said: Mapping[str, Any],
    classes: list[str],
    state: Mapping[str, Tensor],
    source: str,
) -> dict[str, Any]:
    """Meta data, and the line about it: the model `name` with the image's `size` and timm's `arguments`, `said` of how
    its images come in, and the names of its `classes`. Without a model there is the "img_size" alone."""
    patches, head = state["patch_embed.proj.weight"], state.get("head.fc.weight")
    meta: dict[str, Any] = {}
    taken, left = [], []
    config, why = _config(name, size, arguments)
    if config is not None:
        config = dataclasses.replace(
            config, num_classes=0 if head is None else len(head), in_chans=int(patches.shape[1])
        )
        meta |= {"model": config.name, "config": dataclasses.asdict(config)}
        taken.append(config.name)
        size = config.img_size
    elif name is not None:
        left.append(f"model {name!r} ({why})")
    if size is not None:
        meta |= {} if config is not None else {"img_size": list(size)}
        taken.append(f"image {size[0]}x{size[1]}")
    note = _input(said, int(patches.shape[1]), left)
    if note:
        meta["input"] = note
        taken.append(in_words(note))
    if are_class_names(classes, 0 if head is None else len(head)):
        meta["classes"] = classes
        taken.append(f"the names of {len(classes)} classes")
    elif classes:
        left.append(f"{len(classes)} names of classes (the head has {0 if head is None else len(head)})")
    if taken or left:
        parts = [f"taken are {', '.join(taken)}"] if taken else []
        parts += [f"not taken are {', '.join(left)}"] if left else []
        report_once(f"{source} {'; '.join(parts)}")
    return meta


def _config(name: Any, size: tuple[int, int] | None, arguments: Mapping[str, Any]) -> tuple[SwinConfig | None, str]:
    """The geometry of timm's model `name` for images of `size`, or None and why."""
    wanted = {key: arguments[key] for key in _GEOMETRY if _is_plain(arguments.get(key))}
    if size is not None:
        wanted["img_size"] = list(size)
    return _geometry(str(name), json.dumps(wanted, sort_keys=True))


@functools.cache
def _geometry(name: str, wanted: str) -> tuple[SwinConfig | None, str]:
    import timm

    name = _registered(name)
    if name is None:
        return None, "timm does not have it; give one with --model"
    try:
        with torch.device("meta"):  # no memory, and no random numbers
            return config_of(timm.create_model(name, **json.loads(wanted)), name), ""
    except HarnessError as error:
        return None, str(error)
    except Exception as error:  # whatever timm's constructors raise for arguments that do not fit
        return None, f"timm cannot build it: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"


def _registered(name: str) -> str | None:
    """timm's name of a model that a program was asked for: without the hub in front, and the tag where timm does not
    know it. None where it has no such model."""
    import timm

    if ":" in name:  # hf-hub:timm/swin_tiny_patch4_window7_224.ms_in1k
        name = name.rpartition("/")[2].partition("@")[0]
    if not name or "/" in name or not timm.is_model(name):
        return None
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # the tag is of another version of timm, or the user's own
        return name.partition(".")[0]
    return name


def _size(value: Any) -> tuple[int, int] | None:
    """(H, W) of one number, of two, or of three with the channels in front; None for anything else."""
    if _is_whole(value):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) in (2, 3) and all(map(_is_whole, value)):
        return tuple(value[-2:])
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_plain(value: Any) -> bool:
    """Whether `value` is a number, or a list of such."""
    return isinstance(value, (bool, int, float)) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))


def _input(said: Mapping[str, Any], in_chans: int, left: list[str]) -> dict[str, Any]:
    """The meta data's "input": those of timm's values that are there and can be used; the others are added to
    `left`. Empty text and None are timm's ways to say nothing."""
    note: dict[str, Any] = {}
    for key in ("mean", "std"):
        if said.get(key) is None:
            continue
        values = said[key] if isinstance(said[key], (list, tuple)) else [said[key]]
        usable = all(_is_number(value) and (value > 0 or key == "mean") for value in values)
        if usable and len(values) in (1, in_chans):
            note[key] = [float(value) for value in values] * (in_chans if len(values) == 1 else 1)
        elif usable and values and in_chans == 1:
            note[key] = [sum(values) / len(values)]
        else:
            left.append(f"{key} {said[key]}")
    for key in ("interpolation", "crop_pct", "crop_mode"):
        if not said.get(key):
            continue
        if fault_of({key: said[key]}):
            left.append(f"{key} {said[key]!r}")
        else:
            note[key] = said[key]
    return note

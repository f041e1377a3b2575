"""Hugging Face's Swin and Swin-V2 (`SwinForImageClassification`, `SwinModel`; `Swinv2...`) as a folder: config.json and
model.safetensors, and preprocessor_config.json, which says how images come in.

Read and written here without `transformers`, offline. Names, beside Microsoft's (of Swin-V2 with `swinv2.` in front):

| Hugging Face | Microsoft |
|---|---|
| `swin.embeddings.patch_embeddings.projection`, `swin.embeddings.norm` | `patch_embed.proj`, `patch_embed.norm` |
| `swin.encoder.layers.{i}.blocks.{j}.attention.self.query`, `.key`, `.value` | `layers.{i}.blocks.{j}.attn.qkv` |
| `... .attention.output.dense` | `... .attn.proj` |
| `... .layernorm_before`, `.layernorm_after` | `... .norm1`, `.norm2` |
| `... .intermediate.dense`, `.output.dense` | `... .mlp.fc1`, `.mlp.fc2` |
| `swin.layernorm`, `classifier` | `norm`, `head` |
| `... .attention.self.logit_scale`, `.continuous_position_bias_mlp` (Swin-V2) | `... .attn.logit_scale`, `.cpb_mlp` |
| `... .attention.self.query.bias`, `.value.bias` (Swin-V2, whose key has none) | `... .attn.q_bias`, `.v_bias` |

A GELU-less model is one with `"hidden_act": "relu"` and FC1 biases of zero; with others it is RELU_WITH_FC1_BIAS.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyharness.atomic import atomic_path
from pyharness.config import StageGeometry, SwinConfig, are_class_names
from pyharness.errors import CheckpointError, FormatError, ModelError
from pyharness.image_input import CENTER, crop_pct_of, fault_of, merged, scaled_size
from pyharness.swin_blocks import RELU_WITH_FC1_BIAS
from pyharness.tensor_file import load_tensors, save_tensors
from pyharness.training import report_once

CONFIG_NAME = "config.json"
PROCESSOR_NAME = "preprocessor_config.json"
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files that hold the weights, the first found counts; an index names the parts of weights that were split."""

META_KEY = "swin_int8_meta"
"""Key in the safetensors header under which our own meta data (how it was distilled) stands beside `format: pt`."""

DEFAULTS = {
    "image_size": 224, "patch_size": 4, "num_channels": 3, "embed_dim": 96, "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24), "window_size": 7, "mlp_ratio": 4.0, "qkv_bias": True, "hidden_act": "gelu",
    "use_absolute_embeddings": False, "layer_norm_eps": 1e-5,
}  # fmt: skip
"""What a field that config.json leaves out stands for (transformers' SwinConfig)."""

V2_DEFAULTS = {**DEFAULTS, "pretrained_window_sizes": (0, 0, 0, 0)}
"""The same of transformers' Swinv2Config."""

MODEL_TYPES = {"swin": 1, "swinv2": 2}
"""config.json's model_type, which also begins the names of tensors -> Swin's version."""

_TYPE_OF = {version: name for name, version in MODEL_TYPES.items()}

_BLOCK_NAMES = {
    "attention.self.relative_position_bias_table": "attn.relative_position_bias_table",
    "attention.relative_position_bias.relative_position_bias_table": "attn.relative_position_bias_table",
    "attention.self.logit_scale": "attn.logit_scale",
    "attention.self.continuous_position_bias_mlp": "attn.cpb_mlp",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
"""Hugging Face's name below a block -> Microsoft's. The second of two is that of a model in memory since transformers
5; files keep the first."""

_OUTER_NAMES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.norm": "patch_embed.norm",
    "layernorm": "norm",
    "classifier": "head",
}

_QKV = ("query", "key", "value")
_DERIVED = (".relative_position_index", ".relative_coords_table")
"""How the names of buffers end that older files hold and the geometry gives."""

_QKV_NAME = re.compile(
    r"^(layers\.\d+\.blocks\.\d+\.)attention\.(?:self\.(query|key|value)|([qkv])_proj)\.(weight|bias)$"
)


RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""timm's name of an interpolation -> Pillow's number, which Hugging Face's `resample` is."""

PROCESSORS = ("ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil", "ViTFeatureExtractor")
"""Processors by whose rules fields are read here; a Swin's is one of them, and so is one that is not named."""


def is_huggingface(names: Iterable[str]) -> bool:
    """Whether tensor names are those of Hugging Face's Swin."""
    return any(without_type(name) == "embeddings.patch_embeddings.projection.weight" for name in names)


def without_type(name: str) -> str:
    """A tensor's name without the model's type in front of it, which a model without a classifier leaves out."""
    for model_type in MODEL_TYPES:
        name = name.removeprefix(f"{model_type}.")
    return name


# --- Reading ----------------------------------------------------------------------------------------------------------


def load_folder(folder: str | Path, weights: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in Microsoft's layout, and the meta data: model, config, activation, "input" where there is a
    preprocessor_config.json (`read_processor`), and ours where it has any. `weights` names one of the folder's files;
    None is the one that goes by its usual name. A part of weights in many files stands for all of them.

    CheckpointError where a file is missing or cut off, or is no Swin; ModelError and FormatError for a Swin that the
    engine cannot run.
    """
    folder = Path(folder)
    fields = _read_json(folder / CONFIG_NAME)
    if str(fields.get("model_type")) not in MODEL_TYPES:
        raise CheckpointError(
            f"{folder}: config.json is of model_type {fields.get('model_type')!r}; a Swin ('swin') or Swin-V2 "
            "('swinv2') is needed"
        )
    tensors, own_meta = _read_weights(folder, weights)
    state = to_microsoft_names(tensors, str(folder), MODEL_TYPES[fields["model_type"]])
    config, activation = read_config(fields, state, str(folder))
    own = own_meta.get("config")
    if isinstance(own, dict) and isinstance(own.get("name"), str):  # we wrote it, and the folder may have another name
        config = dataclasses.replace(config, name=own["name"])
    meta = {**own_meta, "model": config.name, "config": dataclasses.asdict(config), "activation": activation}
    if names := read_labels(fields, config.num_classes):
        meta["classes"] = names
    if (folder / PROCESSOR_NAME).is_file():
        meta["input"] = _input_of(folder / PROCESSOR_NAME, config, own_meta.get("input"))
    return state, meta


def _input_of(path: Path, config: SwinConfig, ours: Any) -> dict[str, Any]:
    """The meta data's "input" of a folder with the processor `path`, beside weights whose own meta data says `ours`:
    that where the processor is as `write_processor` made it of it, which cannot say all."""
    fields, ours = _read_json(path), ours if isinstance(ours, dict) else {}
    usable = {"mean", "std"} <= ours.keys() and isinstance(ours["mean"], list) and isinstance(ours["std"], list)
    if usable and not fault_of(ours) and write_processor(config, ours) == {"do_center_crop": False, **fields}:
        return ours
    return merged(ours, read_processor(fields, config, str(path)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; a Hugging Face model is a folder with {CONFIG_NAME} and {WEIGHT_NAMES[0]}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, found a {type(content).__name__}")
    return content


def _read_weights(folder: Path, weights: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of the folder, or of the file `weights`, and our own meta data ({} in a file that others wrote)."""
    found = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if weights is not None:
        found = index_of(weights) or weights
    if found is None:
        raise CheckpointError(f"{folder}: has none of {', '.join(WEIGHT_NAMES)}; the weights are missing")
    if found.suffix != ".json":
        return _read_file(found)
    tensors: dict[str, Tensor] = {}
    for part in sorted(set(_parts_of(found).values())):
        if Path(part).name != part:
            raise CheckpointError(f"{found}: names {part}, which is outside the folder; refused")
        tensors |= _read_file(folder / part)[0]
    return tensors, {}


def index_of(file: Path) -> Path | None:
    """The index beside `file` that names it as one of its parts, None where there is none."""
    indices = (file.parent / name for name in WEIGHT_NAMES if name.endswith(".json"))
    return next((i for i in indices if i.is_file() and file.name in _parts_of(i).values()), None)


def read_with(file: Path) -> list[Path]:
    """What else `load_folder` reads where it is given `file`, one of a Hugging Face folder's: configuration, index and
    parts. [] where no config.json is beside it. CheckpointError where an index is damaged."""
    folder, index = file.parent, index_of(file)
    if not (folder / CONFIG_NAME).is_file():
        return []
    parts = [] if index is None else [index.name, *sorted(set(_parts_of(index).values()))]
    names = dict.fromkeys([CONFIG_NAME, PROCESSOR_NAME, *parts])
    return [folder / name for name in names if name != file.name and (folder / name).is_file()]


def _parts_of(index: Path) -> dict[str, str]:
    """The file of each tensor, by the index of weights in many files."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(part, str) for part in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map of file names; fetch it again")
    return weight_map


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.suffix == ".safetensors":
        tensors, header = load_tensors(path, CheckpointError)
        try:
            meta = json.loads(header.get(META_KEY, "{}"))
        except ValueError:
            meta = None
        if not isinstance(meta, dict):
            raise CheckpointError(f"{path}: the header's {META_KEY} is not a JSON object; the file is damaged")
        return tensors, meta
    from pyharness.checkpoint import load_pickle, unwrap_state_dict

    return unwrap_state_dict(path, load_pickle(path)), {}


def to_microsoft_names(tensors: Mapping[str, Tensor], source: str, version: int = 1) -> dict[str, Tensor]:
    """The tensors under Microsoft's names, query, key and value joined, but for Swin-V2's biases, of which key has
    none. What has no counterpart keeps its name.

    CheckpointError where one of them is missing, or has a bias that it should not have.
    """
    state: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        name = without_type(name).removeprefix("encoder.")
        if name.endswith(_DERIVED):
            continue
        if match := _QKV_NAME.match(name):
            part = match[2] or {"q": "query", "k": "key", "v": "value"}[match[3]]
            apart.setdefault(f"{match[1]}attn.qkv.{match[4]}", {})[part] = tensor
        else:
            state[_renamed(name)] = tensor
    for name, parts in apart.items():
        biases = version == 2 and name.endswith(".bias")
        needed = ("query", "value") if biases else _QKV
        if lacking := [part for part in needed if part not in parts]:
            listed = "query and value" if biases else "query, key and value"
            raise CheckpointError(f"{source}: {name} needs {listed}; {', '.join(lacking)} is missing")
        if not biases:
            state[name] = torch.cat([parts[part] for part in _QKV])
        elif "key" in parts:
            raise CheckpointError(f"{source}: {name} is given for key too, which has none in Swin-V2")
        else:
            prefix = name.removesuffix("qkv.bias")
            state |= {f"{prefix}q_bias": parts["query"], f"{prefix}v_bias": parts["value"]}
    return state


def _renamed(name: str) -> str:
    block = re.match(r"^(layers\.\d+\.blocks\.\d+\.)(.*)$", name)
    prefix, rest = (block[1], block[2]) if block else ("", name)
    for theirs, ours in (_BLOCK_NAMES if block else _OUTER_NAMES).items():
        if rest == theirs or rest.startswith(f"{theirs}."):
            return prefix + ours + rest[len(theirs) :]
    return name


def read_config(fields: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> tuple[SwinConfig, str]:
    """Geometry and activation of config.json's `fields`; the number of classes is that of the weights.

    (transformers leaves the labels out of config.json where there are two, its default.) What Hugging Face's Swin pads,
    it pads ahead of the cyclic shift: `SwinLayer.maybe_pad`, then `torch.roll`; its Swin-V2 too.
    """
    version = MODEL_TYPES[fields["model_type"]]
    fields = {**(DEFAULTS if version == 1 else V2_DEFAULTS), **fields}
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    labels = fields.get("id2label")
    if classes and isinstance(labels, dict) and len(labels) not in (0, classes):
        raise CheckpointError(f"{source}: the classifier has {classes} classes, config.json names {len(labels)} labels")
    activation = fields["hidden_act"]
    if activation not in ("gelu", "relu"):
        raise ModelError(f"{source}: hidden_act is {activation!r}; the engine computes 'gelu' (erf) and 'relu'")
    if activation == "relu" and any(t.any() for name, t in state.items() if name.endswith(".mlp.fc1.bias")):
        activation = RELU_WITH_FC1_BIAS
    if fields["use_absolute_embeddings"]:
        raise ModelError(f"{source}: has absolute position embeddings; the engine cannot run this model")
    if abs(fields["layer_norm_eps"] - 1e-5) > 1e-12:
        raise ModelError(f"{source}: layer_norm_eps is {fields['layer_norm_eps']}; the engine computes with 1e-05")
    try:
        image, patch = fields["image_size"], fields["patch_size"]
        image = (image, image) if isinstance(image, int) else tuple(image)
        patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        if len(set(patch)) != 1:
            raise ModelError(f"{source}: the patch size is {patch}; the engine needs it square")
        config = SwinConfig(
            name=Path(source).resolve().name or "swin",
            img_size=image,
            patch_size=patch[0],
            in_chans=fields["num_channels"],
            num_classes=classes,
            embed_dim=fields["embed_dim"],
            depths=tuple(fields["depths"]),
            num_heads=tuple(fields["num_heads"]),
            window_size=(fields["window_size"],) * len(fields["depths"]),
            mlp_ratio=float(fields["mlp_ratio"]),
            qkv_bias=fields["qkv_bias"],
            version=version,
            pretrained_window_size=_trained_windows(fields) if version == 2 else (),
            pad_first=True,
        )
    except (TypeError, ValueError, FormatError) as error:
        raise FormatError(f"{source}: config.json does not describe a Swin ({error})") from None
    check_windows(config)
    return dataclasses.replace(config, name=published_name(config) or config.name), activation


def read_labels(fields: Mapping[str, Any], classes: int) -> list[str]:
    """The names of the classes that config.json's `fields` give, in order; empty where there are none, or those that
    transformers makes up (LABEL_0)."""
    labels = fields.get("id2label")
    if not isinstance(labels, dict) or not classes:
        return []
    names = [labels.get(str(number)) for number in range(classes)]
    if not all(isinstance(name, str) for name in names) or names == _numbered(classes):
        return []
    return names


def _numbered(classes: int) -> list[str]:
    return [f"LABEL_{number}" for number in range(classes)]


def _trained_windows(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """`pretrained_window_sizes`, one per stage; () where all are the model's own. Default and null are of four stages,
    which models of fewer have too."""
    windows = tuple(fields["pretrained_window_sizes"] or ())[: len(fields["depths"])]
    return windows if any(windows) else ()


def read_processor(fields: Mapping[str, Any], config: SwinConfig, source: str) -> dict[str, Any]:
    """What the `fields` of preprocessor_config.json say of images: the meta data's "input", or those parts of it that
    they give (mean, std, interpolation, crop_pct, crop_mode).

    The mean and std are of pixels over 255, one number per channel, whatever the file scales pixels by. How an image
    comes to its size is read as transformers' ViTImageProcessor does it: pressed into `size` as a whole (timm's
    "squash"), or its shorter side resized, and then the centre, where there is a crop. What is not followed, as a
    crop of another size than the model's, is named in one line on stderr. CheckpointError for numbers that cannot be
    used.
    """
    found: dict[str, Any] = {}
    if _says(fields, "do_normalize", True):
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
            if fields.get(theirs) is not None:
                found[ours] = _per_channel(fields[theirs], theirs, config.in_chans, source)
    else:
        found = {"mean": [0.0] * config.in_chans, "std": [1.0] * config.in_chans}
    factor = fields.get("rescale_factor", 1 / 255) if _says(fields, "do_rescale", True) else 1
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise CheckpointError(f"{source}: rescale_factor is {factor}; a finite number above zero is needed")
    factor *= 255
    if abs(factor - 1) > 1e-6:
        if len(found) < 2:
            raise CheckpointError(f"{source}: scales pixels its own way and lacks image_mean or image_std; add them")
        found = {key: [value / factor for value in values] for key, values in found.items()}
    left: list[str] = []
    processor = fields.get("image_processor_type") or fields.get("feature_extractor_type")
    if processor not in (None, *PROCESSORS):
        left.append(f"rules of {processor} that ViTImageProcessor does not have")
    if _says(fields, "do_resize", True):
        found |= _resampling(fields, left)
        found |= _crop(fields, config, processor in (None, *PROCESSORS), left)
    else:
        left.append("do_resize false")
    if _says(fields, "do_pad", False):
        left.append("do_pad")
    if left:
        report_once(f"note: {source}: not followed: {'; '.join(left)}")
    return found


def _says(fields: Mapping[str, Any], key: str, default: bool) -> bool:
    """A field that is true or false; null stands for the default."""
    value = fields.get(key)
    return default if value is None else bool(value)


def _resampling(fields: Mapping[str, Any], left: list[str]) -> dict[str, Any]:
    resample = fields.get("resample")
    names = {number: name for name, number in RESAMPLE.items()}
    if isinstance(resample, int) and resample in names:
        return {"interpolation": names[resample]}
    if resample is not None:
        left.append(f"resample {resample!r}, which is none of {', '.join(map(str, sorted(names)))}")
    return {}


def _crop(fields: Mapping[str, Any], config: SwinConfig, is_vit: bool, left: list[str]) -> dict[str, Any]:
    """crop_pct, and crop_mode where it is not timm's own, of the fields `size` and `crop_size`; what cannot be followed
    is added to `left`. {} where there is no size."""
    if fields.get("size") is None:
        return {}
    size, wanted = _sides(fields["size"], is_vit), config.img_size
    needed = "x".join(map(str, wanted))
    unfollowed = f"size {json.dumps(fields['size'])}"
    if not _says(fields, "do_center_crop", False):
        if isinstance(size, tuple):
            if size != wanted:
                left.append(f"{unfollowed}, since the model takes {needed}, which images are pressed into")
            return {"crop_pct": 1.0, "crop_mode": "squash"}
        left.append(f"{unfollowed} without a crop")
        return {}
    crop = _sides(fields.get("crop_size"), True)
    if crop != wanted:
        left.append(f"crop_size {json.dumps(fields.get('crop_size'))}, since the model takes {needed}")
        return {}
    if isinstance(size, tuple) and (share := crop_pct_of(crop, size)):
        return {"crop_pct": share, "crop_mode": "squash"}
    if isinstance(size, int) and crop[0] == crop[1] and (share := crop_pct_of(crop, (size, size))):
        return {"crop_pct": share}
    left.append(f"{unfollowed} with a crop of {needed}")
    return {}


def _sides(size: Any, is_vit: bool) -> tuple[int, int] | int | None:
    """(height, width) of a size, or the length of the shorter side, which leaves the other as it comes out; None for
    what is neither. One number is a square to ViTImageProcessor, and a shorter side to some others."""
    if isinstance(size, dict):
        given = {key: value for key, value in size.items() if value is not None}
        if given.keys() == {"shortest_edge"}:
            return given["shortest_edge"] if _is_length(given["shortest_edge"]) else None
        size = [given["height"], given["width"]] if given.keys() == {"height", "width"} else None
    elif is_vit and _is_length(size):
        size = [size, size]
    return tuple(size) if isinstance(size, list) and len(size) == 2 and all(map(_is_length, size)) else None


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _per_channel(values: Any, key: str, in_chans: int, source: str) -> list[float]:
    """A number per channel, of one for all, one each, or, for a grey model, those of colour, whose mean is taken."""
    values = values if isinstance(values, list) else [values]
    usable = all(isinstance(v, (int, float)) and math.isfinite(v) and (v > 0 or key == "image_mean") for v in values)
    if not usable or len(values) not in (1, in_chans, 3 if in_chans == 1 else 1):
        needed = "finite numbers" if key == "image_mean" else "finite numbers above zero"
        raise CheckpointError(f"{source}: {key} is {values}; {needed} are needed, one for each of {in_chans} channels")
    if in_chans == 1:
        return [sum(values) / len(values)]
    return [float(value) for value in (values * in_chans if len(values) == 1 else values)]


def published_name(config: SwinConfig) -> str | None:
    """timm's name of a model of this geometry, whatever its number of classes and channels; None where it has none."""
    size = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}.get(
        (config.embed_dim, config.depths[2]) if len(config.depths) == 4 else (0, 0)
    )
    for name, (window, image, trained) in _VARIANTS.get((config.version, size), {}).items():
        wanted = dataclasses.replace(
            config,
            img_size=(image, image),
            patch_size=4,
            depths=(2, 2, config.depths[2], 2),
            num_heads=tuple(config.embed_dim // 32 * 2**stage for stage in range(4)),
            window_size=(window,) * 4,
            mlp_ratio=4.0,
            qkv_bias=True,
            qk_scale=None,
            pretrained_window_size=trained,
        )
        if wanted == config:
            return f"{_TYPE_OF[config.version]}_{size}_{name}"
    return None


_OWN_WINDOWS_V1 = {"patch4_window7_224": (7, 224, ())}
_LARGE_IMAGES_V1 = {"patch4_window12_384": (12, 384, ())}
_OWN_WINDOWS_V2 = {"window8_256": (8, 256, ()), "window16_256": (16, 256, ())}
_FINE_TUNED_V2 = {
    "window12_192": (12, 192, ()),
    "window12to16_192to256": (16, 256, (12, 12, 12, 6)),
    "window12to24_192to384": (24, 384, (12, 12, 12, 6)),
}
_VARIANTS = {
    (1, "tiny"): _OWN_WINDOWS_V1,
    (1, "small"): _OWN_WINDOWS_V1,
    (1, "base"): {**_OWN_WINDOWS_V1, **_LARGE_IMAGES_V1},
    (1, "large"): {**_OWN_WINDOWS_V1, **_LARGE_IMAGES_V1},
    (2, "tiny"): _OWN_WINDOWS_V2,
    (2, "small"): _OWN_WINDOWS_V2,
    (2, "base"): {**_OWN_WINDOWS_V2, **_FINE_TUNED_V2},
    (2, "large"): _FINE_TUNED_V2,
}
"""By version and size: how the name goes on -> window, image, pretrained_window_size."""


# --- Writing ----------------------------------------------------------------------------------------------------------


def save_folder(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: SwinConfig,
    activation: str,
    meta: Mapping[str, Any],
    normalization: Mapping[str, Any] | None = None,
) -> None:
    """Write a model (Microsoft's layout) as a folder that `SwinForImageClassification.from_pretrained` loads, or
    `Swinv2ForImageClassification`'s.

    `normalization` says how images come in (`data.input_normalization`); None writes no preprocessor_config.json. Each
    file appears whole or not at all, config.json last, so that a folder without it is an unfinished one.
    ModelError where Hugging Face's Swin cannot express the geometry.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a Hugging Face model is a folder, give the name of one")
    names = meta.get("classes")
    fields = write_config(config, activation, names if are_class_names(names, config.num_classes) else ())
    header = {"format": "pt", META_KEY: json.dumps(dict(meta), sort_keys=True)}
    save_tensors(folder / WEIGHT_NAMES[0], to_huggingface_names(state, config.version), header)
    if normalization is None:
        (folder / PROCESSOR_NAME).unlink(missing_ok=True)  # it would be that of the model that was there before
    else:
        _write_json(folder / PROCESSOR_NAME, write_processor(config, normalization))
    _write_json(folder / CONFIG_NAME, fields)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def to_huggingface_names(state: Mapping[str, Tensor], version: int = 1) -> dict[str, Tensor]:
    """The tensors of Microsoft's layout under the names of Hugging Face's files, inverse of `to_microsoft_names`."""
    block_names: dict[str, str] = {}
    for theirs, ours in _BLOCK_NAMES.items():
        block_names.setdefault(ours, theirs)
    outer_names = {ours: theirs for theirs, ours in _OUTER_NAMES.items()}
    model = _TYPE_OF[version]
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.match(r"^(layers\.\d+\.blocks\.\d+\.)attn\.qkv\.(weight|bias)$", name):
            for part, rows in zip(_QKV, tensor.chunk(3)):
                result[f"{model}.encoder.{match[1]}attention.self.{part}.{match[2]}"] = rows.clone()
            continue
        if match := re.match(r"^(layers\.\d+\.blocks\.\d+\.)attn\.([qv])_bias$", name):
            part = {"q": "query", "v": "value"}[match[2]]
            result[f"{model}.encoder.{match[1]}attention.self.{part}.bias"] = tensor
            continue
        block = re.match(r"^(layers\.\d+\.blocks\.\d+\.)(.*)$", name)
        prefix, rest = (block[1], block[2]) if block else ("", name)
        for ours, theirs in (block_names if block else outer_names).items():
            if rest == ours or rest.startswith(f"{ours}."):
                rest = theirs + rest[len(ours) :]
                break
        outer = "encoder." if name.startswith("layers.") else ""
        result[rest if rest.startswith("classifier.") else f"{model}.{outer}{prefix}{rest}"] = tensor
    return result


def write_config(config: SwinConfig, activation: str, classes: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of config.json, with the names of the `classes` where they are known. ModelError where Hugging Face's
    Swin cannot express the geometry."""
    check_windows(config)
    if config.qk_scale is not None:
        raise ModelError(f"{config.name}: has its own qk_scale {config.qk_scale}, which Hugging Face's Swin has not")
    if not config.patch_norm:
        raise ModelError(f"{config.name}: has no norm behind the patch embedding, Hugging Face's Swin always has one")
    height, width = config.img_size
    labels = {str(number): name for number, name in enumerate(classes or _numbered(config.num_classes))}
    own: dict[str, Any] = {"architectures": ["SwinForImageClassification"]}
    if config.version == 2:
        trained = config.pretrained_window_size or (0,) * len(config.depths)
        own = {"architectures": ["Swinv2ForImageClassification"], "pretrained_window_sizes": list(trained)}
    return {
        **own,
        "model_type": _TYPE_OF[config.version],
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": config.window_size[0],
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "hidden_act": "gelu" if activation == "gelu" else "relu",
        "layer_norm_eps": 1e-5,
        "use_absolute_embeddings": False,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "dtype": "float32",
        "id2label": labels,
        "label2id": {label: int(index) for index, label in labels.items()},
    }


def write_processor(config: SwinConfig, normalization: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of preprocessor_config.json, of transformers' ViTImageProcessor, inverse of `read_processor`.

    What has no place there (`not_in_processor`), and an image of which no crop is told, is pressed into the model's
    size as a whole.
    """
    (height, width), crop_pct = config.img_size, normalization.get("crop_pct")
    fields = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(normalization["mean"]),
        "image_std": list(normalization["std"]),
    }
    if normalization.get("interpolation") in RESAMPLE:
        fields["resample"] = RESAMPLE[normalization["interpolation"]]
    mode = normalization.get("crop_mode", CENTER)
    if not crop_pct or (mode, crop_pct) == ("squash", 1) or not_in_processor(config, normalization):
        return fields
    rows, columns = scaled_size(config.img_size, crop_pct)
    fields["size"] = {"height": rows, "width": columns} if mode == "squash" else {"shortest_edge": rows}
    return {**fields, "do_center_crop": True, "crop_size": {"height": height, "width": width}}


def not_in_processor(config: SwinConfig, normalization: Mapping[str, Any]) -> str | None:
    """What of `normalization` transformers' ViTImageProcessor does not do, in words; None where it does all."""
    mode = normalization.get("crop_mode", CENTER)
    if mode == "border":
        return 'the crop_mode "border"'
    if mode == CENTER and normalization.get("crop_pct") and config.img_size[0] != config.img_size[1]:
        return "timm's centre crop for images that are not square"
    return None


def check_windows(config: SwinConfig) -> None:
    """ModelError unless Hugging Face's Swin computes on the same windows.

    It has one window size for all stages, and in Swin-V1 builds its position bias for it even where a stage is smaller.
    What it pads, it pads ahead of the cyclic shift.
    """
    if len(set(config.window_size)) != 1:
        raise ModelError(f"{config.name}: has windows {config.window_size}; Hugging Face's Swin has one for all stages")
    if config.version == 2:
        _check_rule(config, "Hugging Face's", _v2_windows(config))
    else:
        check_one_window_rule(config, "Hugging Face's")
        for stage in config.stages():
            if stage.window[0] != config.window_size[0]:
                raise ModelError(
                    f"{config.name}: stage {stage.index} has {stage.resolution} tokens, fewer than the window "
                    f"{config.window_size[0]}; Hugging Face's Swin cannot run that"
                )
    check_pads_first(config, "Hugging Face's Swin")


def _v2_windows(config: SwinConfig) -> list[tuple[int, int]]:
    """Window and shift of each stage in Hugging Face's Swin-V2: by the tokens' rows, for both directions, and by as
    many rows as there are where merging pads none."""
    rows = [config.img_size[0] // config.patch_size // 2**index for index in range(len(config.depths))]
    return [(r, 0) if r <= wanted else (wanted, wanted // 2) for r, wanted in zip(rows, config.window_size)]


def check_pads_first(config: SwinConfig, whose: str) -> None:
    """ModelError for a model that pads behind the cyclic shift, which `whose` code does not do."""
    if config.is_padded and not config.pad_first:
        raise ModelError(
            f"{config.name}: windows of {config.window_size} do not divide the tokens of image {config.img_size}, and "
            f"they are padded behind the cyclic shift, as in timm. {whose} pads ahead of it, and so would compute "
            "another function. Say --pad-first for the model that does the same, or give another --img-size"
        )


def check_one_window_rule(config: SwinConfig, whose: str) -> None:
    """ModelError unless Hugging Face's and Microsoft's rule for small stages gives the same windows and shifts.

    Theirs: where the shorter side is at most the window, the window is that side in both directions, and nothing
    shifts. Ours, as timm's, holds for each direction by itself. The two differ for some images that are not square.
    """

    def theirs(stage: StageGeometry) -> tuple[int, int]:
        wanted = config.window_size[stage.index]
        shortest = min(stage.resolution)
        return (shortest, 0) if shortest <= wanted else (wanted, wanted // 2)

    _check_rule(config, whose, [theirs(stage) for stage in config.stages()])


def _check_rule(config: SwinConfig, whose: str, theirs: Iterable[tuple[int, int]]) -> None:
    """ModelError unless the stages have `theirs`, a window and a shift of each for both directions."""
    for stage, (side, by) in zip(config.stages(), theirs):
        window, shift = (side, side), (by, by)
        if stage.window != window or (stage.depth > 1 and stage.shift != shift):
            raise ModelError(
                f"{config.name}: stage {stage.index} of {stage.resolution} tokens has windows {stage.window} shifted "
                f"by {stage.shift} here and in timm; {whose} Swin would take {window} shifted by {shift}, and so "
                "compute another function"
            )

"""Reading and writing checkpoints of timm, Microsoft and Hugging Face, without running code from the file.

The format is told from the content. Hugging Face's, a folder, is that of pyharness/hf_format.py, a detector's that of
pyharness/detector_format.py; what timm writes beside weights is that of pyharness/timm_format.py. The layouts of timm
and Microsoft differ in names only, each line by itself, since older versions of timm mix them:

| timm | Microsoft |
|---|---|
| `layers.{i+1}.downsample.*`, at the start of stage i+1 | `layers.{i}.downsample.*`, at the end of stage i |
| `head.fc.*` | `head.*` |
| not stored | buffers `relative_position_index`, `attn_mask`; Swin-V2's `relative_coords_table` |

Both gather a 2x2 patch for the reduction in the order (row, column) = (0,0), (1,0), (0,1), (1,1), so its columns are
the same; tests/python/test_models.py holds that down.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyharness.detector_format import backbone_of, is_detector
from pyharness.errors import CheckpointError
from pyharness.hf_format import CONFIG_NAME, index_of, is_huggingface, load_folder, without_type
from pyharness.tensor_file import TORCHSCRIPT, file_kind, load_tensors, need_content, save_tensors, save_torch
from pyharness.timm_format import meta_of_folder, meta_of_training, weights_in
from pyharness.training import report_once

FORMAT = "swin-checkpoint"
EMA_WRAPPERS = ("state_dict_ema", "model_ema")
"""Keys under which training programs store the moving average of the weights: what they evaluate, and timm loads."""

WRAPPERS = (*EMA_WRAPPERS, "model", "state_dict", "model_state_dict")
"""Keys under which training programs store the state dict, the first found counts. Where there is none of them, the one
key with tensors by name does."""

_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and training programs put before every name."""

AMAX_SUFFIX = "_quantizer._amax"
"""How the names of a calibrated checkpoint's scales end."""

_AVERAGED = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel keeps beside the weights."""

_DERIVED_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.")


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: the state dict in timm's layout, and the meta data stored with it ({} where there is none).

    A folder, or a file of one, as Hugging Face's or timm's: its meta data is that of config.json, where the file has
    none of ours; that of a checkpoint of timm's training program is that of its options. `.safetensors` by its suffix;
    anything else as a PyTorch file, restricted to what `load_pickle` takes. CheckpointError where the file is
    missing, cut off, holds objects whose loading could run code, no state dict, or is an engine file.
    """
    path, content = Path(path), None
    if path.is_dir():
        weights = weights_in(path)
        if weights is None:
            return _load_huggingface(path)
        path = weights
    if path.suffix == ".safetensors":
        tensors, header = load_tensors(path, CheckpointError)
        if header.get("format") == "swin-int8":
            raise CheckpointError(
                f"{path}: is an engine file, its weights are int8; `python pyharness/convert.py to-timm` (or to-hf, "
                "to-microsoft, to-checkpoint) makes a checkpoint of it"
            )
        state, meta = _without_prefix(tensors), _decode_meta(path, header.get("meta", "{}"))
    else:
        content = load_pickle(path)
        meta = content.get("meta", {}) if isinstance(content, Mapping) else {}
        state, meta = unwrap_state_dict(path, content), dict(meta) if isinstance(meta, Mapping) else {}
    if is_huggingface(state) or index_of(path) is not None:
        if not (path.parent / CONFIG_NAME).is_file():
            raise CheckpointError(
                f"{path}: is a Hugging Face checkpoint, whose geometry stands in {CONFIG_NAME}; put that file beside it"
            )
        return _load_huggingface(path.parent, path)
    if is_detector(state):
        state, meta = backbone_of(state)  # what a detector's training program wrote beside it is none of ours
        return to_timm_layout(state), meta
    state = to_timm_layout(state)
    if "config" not in meta:
        meta |= meta_of_training(content, state, path) or meta_of_folder(path, state)
    return state, meta


def _load_huggingface(folder: Path, weights: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state, meta = load_folder(folder, weights)
    return to_timm_layout(state), meta


def describe_state(names: Iterable[str]) -> str:
    """What a state dict seems to be of, in words, by the names of its tensors: for messages about one that won't do."""
    names = set(names)
    kinds = (
        ("a calibrated Swin checkpoint (with the amax of quantizers)", lambda n: n.endswith(AMAX_SUFFIX)),
        ("Hugging Face's Swin", lambda n: without_type(n).startswith("embeddings.patch_embeddings.")),
        ("a Swin-V2", lambda n: n.endswith((".attn.logit_scale", ".attn.cpb_mlp.0.weight"))),
        ("a masked-image pretraining checkpoint", lambda n: n.endswith("mask_token")),
        ("a Swin-V1 in Microsoft's layout", lambda n: n.startswith("layers.0.downsample.") or n == "head.weight"),
        ("a Swin-V1 in timm's layout", lambda n: n.endswith(".attn.relative_position_bias_table")),
        ("a ViT", lambda n: n == "cls_token"),
    )
    if not any(".attn." in name or name.startswith(("swin.", "swinv2.", "embeddings.")) for name in names):
        return f"no Swin (its first tensors: {', '.join(sorted(names)[:3])})"
    return next((kind for kind, fits in kinds if any(map(fits, names))), "no Swin that is known here")


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one model: what follows a dot (`.ms_in22k`) tells weights apart, not models."""
    return one.split(".")[0] == other.split(".")[0]


def describe_geometry(state: Mapping[str, Tensor]) -> str:
    """The sizes that a Swin state dict (timm's layout) shows, in words: "no sizes" where it has no bias tables."""
    tables = {
        name: t
        for name, t in state.items()
        if re.match(r"^layers\.\d+\.blocks\.0\.attn\.relative_position_bias_table$", name)
    }
    if not tables or "patch_embed.proj.weight" not in state:
        return "no sizes"
    if state["patch_embed.proj.weight"].dim() != 4:
        return f"patches of {state['patch_embed.proj.weight'].dim() - 2} dimensions, as of a video"
    stages = range(len(tables))
    depths = [
        sum(bool(re.match(rf"^layers\.{i}\.blocks\.\d+\.norm1\.weight$", name)) for name in state) for i in stages
    ]
    heads = [t.shape[-1] for t in tables.values()]
    windows = [(math.isqrt(t.shape[0]) + 1) / 2 for t in tables.values()]
    embed_dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    head = state.get("head.fc.weight")
    return (
        f"embed_dim {embed_dim}, depths {depths}, num_heads {heads}, windows [{', '.join(f'{w:g}' for w in windows)}], "
        f"patch {patch}, in_chans {in_chans}, {head.shape[0] if head is not None else 0} classes"
    )


def save_state_dict(path: str | Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `state_dict` with `meta` (JSON-serializable), atomically: .safetensors or .pth/.pt by the suffix."""
    path = Path(path)
    if path.suffix == ".safetensors":
        save_tensors(path, state_dict, {"format": FORMAT, "meta": json.dumps(meta, sort_keys=True)})
    elif path.suffix in (".pth", ".pt"):
        save_torch(path, {"model": {k: v.detach().clone() for k, v in state_dict.items()}, "meta": dict(meta)})
    else:
        raise CheckpointError(f"{path}: a checkpoint's name must end in .safetensors, .pth or .pt")


def to_timm_layout(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under timm's names, without derived buffers. A state dict in timm's layout stays as it is."""
    offset = 1 if _downsample_ends_stage(state_dict) else 0
    result = {}
    for name, tensor in state_dict.items():
        if name.rsplit(".", 1)[-1] in _DERIVED_BUFFERS:
            continue
        name = _DOWNSAMPLE.sub(lambda m: f"layers.{int(m[1]) + offset}.downsample.", name)
        result[re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)] = tensor
    return result


def to_microsoft_layout(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under Microsoft's names, without derived buffers. The inverse of `to_timm_layout`."""
    timm_names = to_timm_layout(state_dict)
    result = {}
    for name, tensor in timm_names.items():
        name = _DOWNSAMPLE.sub(lambda m: f"layers.{int(m[1]) - 1}.downsample.", name)
        result[re.sub(r"^head\.fc\.", "head.", name)] = tensor
    return result


def _downsample_ends_stage(state_dict: Mapping[str, Tensor]) -> bool:
    """True in Microsoft's layout: only there has stage 0 a downsample."""
    return any(name.startswith("layers.0.downsample.") for name in state_dict)


def _decode_meta(path: Path, text: str) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: the header's meta data is not JSON ({error})") from None
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path}: the header's meta data is a {type(meta).__name__}, a JSON object is needed")
    return meta


def load_pickle(path: Path) -> Any:
    """What `torch.load` reads with weights_only: tensors, plain containers, and argparse.Namespace, which holds values
    alone and in which training programs, timm's too, keep their options. CheckpointError as `load_checkpoint`."""
    if str(path) == "pretrained" and not path.is_file():
        fetch = "`python pyharness/convert.py to-timm pretrained FILE --model NAME` makes one of timm's weights"
        raise CheckpointError(f"{path}: no such file; {fetch}")
    need_content(path, CheckpointError)
    if file_kind(path) == TORCHSCRIPT:
        raise CheckpointError(f"{path}: is {TORCHSCRIPT}; save the model's state_dict() with torch.save instead")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not found:
            raise CheckpointError(f"{path}: not a readable checkpoint; it may be cut off. Fetch it again.") from None
        raise CheckpointError(
            f"{path}: refused, it holds an object ({found[1]}) whose loading could run code. A file of tensors only is "
            "needed: save the state dict alone with torch.save, or use .safetensors"
        ) from None
    # A damaged file can break the reader at any point, so the kinds of error are many.
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if "weights_only" in first_line:  # torch.load's advice to read the file unsafely
            raise CheckpointError(
                f"{path}: is of a kind that cannot be read without running code; save the model's state_dict() with "
                "torch.save, or use .safetensors"
            ) from None
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({first_line}); it may be cut off. Fetch it again."
        ) from None


def unwrap_state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict inside `content`: out of its wrapper, and without the prefix of a training program's wrapper.

    Where it holds the trained weights and their moving average, the average is taken, and one line says so.
    """
    found = [key for key in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
    usable = [key for key in found if key not in EMA_WRAPPERS or _is_tensors(content[key])]
    usable = usable or _keys_of_tensors(path, content) or found
    if usable:
        left = [key for key in found if key != usable[0]]
        if left and found[0] in EMA_WRAPPERS:
            report_once(_which_was_taken(path, usable[0], left))
        content = content[usable[0]]
        if usable[0] in EMA_WRAPPERS:
            content = {name: value for name, value in content.items() if name != _AVERAGED}
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, a state dict is needed (tensors by name)")
    strange = [
        str(name) for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise CheckpointError(
            f"{path}: {', '.join(strange[:5])} {'is' if len(strange) == 1 else 'are'} not a tensor by name; a state "
            f"dict, alone or under a key such as {', '.join(WRAPPERS)}, is needed"
        )
    return _without_prefix(content)


def _is_tensors(content: Any) -> bool:
    """Whether there are weights by name, not another program's bookkeeping of an average."""
    return isinstance(content, Mapping) and bool(content) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    )  # fmt: skip


def _keys_of_tensors(path: Path, content: Any) -> list[str]:
    """The key of `content` under which there are tensors by name, if any; CheckpointError where there are several."""
    keys = [key for key, value in content.items() if _is_tensors(value)] if isinstance(content, Mapping) else []
    if len(keys) > 1:
        raise CheckpointError(
            f"{path}: holds tensors by name under {', '.join(map(str, keys))}; one state dict is needed: save it alone"
        )
    return keys


def _which_was_taken(path: Path, taken: str, left: list[str]) -> str:
    why = "they are the moving average" if taken in EMA_WRAPPERS else "no tensors by name alone are there"
    return f"{path}: the weights under {taken} are taken, not what is under {' or '.join(left)}: {why}"


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if _AVERAGED in state and all(name.startswith("module.") for name in state if name != _AVERAGED):
        state = {name: tensor for name, tensor in state.items() if name != _AVERAGED}
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return _without_prefix({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return dict(state)

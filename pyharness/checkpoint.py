"""Reading and writing checkpoints, in timm's and in Microsoft's layout, without running code from the file.

The two layouts differ in names only:

| timm | Microsoft |
|---|---|
| `layers.{i+1}.downsample.*`, at the start of stage i+1 | `layers.{i}.downsample.*`, at the end of stage i |
| `head.fc.*` | `head.*` |
| not stored | buffers `relative_position_index`, `attn_mask`; Swin-V2's `relative_coords_table` |

Both gather a 2x2 patch for the reduction in the order (row, column) = (0,0), (1,0), (0,1), (1,1), so its columns are
the same; tests/python/test_models.py holds that down.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyharness.atomic import atomic_path
from pyharness.errors import CheckpointError
from pyharness.tensor_file import load_tensors, save_tensors

FORMAT = "swin-checkpoint"
WRAPPERS = ("model", "state_dict", "model_ema")
"""Keys under which training programs store the state dict, the first found counts."""

_DERIVED_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.")


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: the state dict in timm's layout, and the meta data stored with it ({} where there is none).

    `.safetensors` by its suffix; anything else as a PyTorch file, restricted to tensors and plain containers.
    CheckpointError where the file is missing, cut off, holds objects whose loading could run code, or no state dict.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors, header = load_tensors(path, CheckpointError)
        return to_timm_layout(tensors), _decode_meta(path, header.get("meta", "{}"))
    content = load_pickle(path)
    meta = content.get("meta", {}) if isinstance(content, Mapping) else {}
    return to_timm_layout(_unwrap(path, content)), dict(meta) if isinstance(meta, Mapping) else {}


def save_state_dict(path: str | Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `state_dict` with `meta` (JSON-serializable), atomically: .safetensors or .pth/.pt by the suffix."""
    path = Path(path)
    if path.suffix == ".safetensors":
        save_tensors(path, state_dict, {"format": FORMAT, "meta": json.dumps(meta, sort_keys=True)})
    elif path.suffix in (".pth", ".pt"):
        with atomic_path(path) as temporary:
            torch.save({"model": {k: v.detach().clone() for k, v in state_dict.items()}, "meta": dict(meta)}, temporary)
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
    """What `torch.load` reads with weights_only: tensors and plain containers. CheckpointError as `load_checkpoint`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
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
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({first_line}); it may be cut off. Fetch it again."
        ) from None


def _unwrap(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict inside `content`: out of its wrapper, and without the `module.` of DistributedDataParallel."""
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, a state dict is needed (tensors by name)")
    strange = [
        str(name) for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise CheckpointError(
            f"{path}: {', '.join(strange[:5])} {'is' if len(strange) == 1 else 'are'} not a tensor by name; a state "
            f"dict, alone or under one of the keys {', '.join(WRAPPERS)}, is needed"
        )
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return dict(content)

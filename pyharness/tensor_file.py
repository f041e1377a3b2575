"""Safetensors files that are the same byte for byte whenever their content is the same.

The safetensors library writes the metadata of the header in no fixed order, so that two runs give two different files.
Here the header is written again in sorted order: files can then be compared, and cached by their hash.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyharness.atomic import atomic_path
from pyharness.errors import HarnessError

_LENGTH = struct.Struct("<Q")
"""A safetensors file begins with the length of its JSON header, a little-endian 64-bit number."""

_ALIGNMENT = 8
"""The header is padded with spaces so that the tensors behind it begin at a multiple of this many bytes."""


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """`atomic_path` for files that may not fit: HarnessError, and no file, where the disk takes no more.

    The body writes and nothing else, since PyTorch's writer raises a bare RuntimeError.
    """
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise HarnessError(
            f"{path} could not be written ({reason}); is the disk full? Make room, or choose another place"
        ) from None


def save_torch(path: str | Path, content: Any) -> None:
    """`torch.save` of `content` to `path`, atomically. Raises as `writing`."""
    with writing(path) as temporary:
        torch.save(content, temporary)


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and the header's `metadata` to `path`, atomically and reproducibly. Raises as `writing`."""
    from safetensors.torch import save

    content = memoryview(save({name: t.detach().contiguous() for name, t in tensors.items()}, dict(metadata)))
    (length,) = _LENGTH.unpack_from(content)
    body = content[_LENGTH.size + length :]
    header = json.loads(bytes(content[_LENGTH.size : _LENGTH.size + length]))
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with writing(path) as temporary, open(temporary, "wb") as file:
        file.write(_LENGTH.pack(len(text)))
        file.write(text)
        file.write(body)


def load_tensors(path: str | Path, error: type[HarnessError]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read `path` whole: tensors by name, and the header's metadata.

    The tensors are copies, aligned by PyTorch's allocator, and do not change with the file. Raises `error` where the
    file is missing, cut off or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise error(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as reason:
        raise error(
            f"{path}: not a readable safetensors file ({reason}); it may be cut off or of another kind. Make it again."
        ) from None


def load_header(path: str | Path, error: type[HarnessError]) -> dict[str, str]:
    """The metadata of the header alone; no tensor is read. Raises `error` as `load_tensors`."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise error(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as reason:
        raise error(
            f"{path}: not a readable safetensors file ({reason}); it may be cut off or of another kind. Make it again."
        ) from None

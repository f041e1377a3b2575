"""Safetensors files that are the same byte for byte whenever their content is the same.

The safetensors library writes the metadata of the header in no fixed order, so that two runs give two different files.
Here the header is written again in sorted order: files can then be compared, and cached by their hash.
"""

from __future__ import annotations

import json
import struct
import zipfile
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

LFS_POINTER, TORCHSCRIPT, TORCH_FILE = "a Git LFS pointer", "a TorchScript archive", "a PyTorch checkpoint"
"""What `file_kind` calls files."""

_LFS_HEAD = b"version https://git-lfs.github.com/spec"
_OLD_TORCH_HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch.save's files of before PyTorch 1.6 begin: its magic number, pickled."""


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


def file_kind(path: str | Path) -> str:
    """What is at `path`, in words, where that is often taken for a file of tensors of another kind; "" otherwise."""
    path = Path(path)
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return ""
    try:
        with open(path, "rb") as file:
            head = file.read(len(_LFS_HEAD))
    except OSError:  # whoever reads it says why
        return ""
    if head == _LFS_HEAD:
        return LFS_POINTER
    if zipfile.is_zipfile(path):
        names = _names_in_zip(path)
        if any(name.endswith("/constants.pkl") for name in names):
            return TORCHSCRIPT
        return TORCH_FILE if any(name.endswith("/data.pkl") for name in names) else ""
    return TORCH_FILE if head.startswith(_OLD_TORCH_HEAD) else ""


def _names_in_zip(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):  # damaged; whoever reads it says so
        return []


def need_content(path: str | Path, error: type[HarnessError]) -> None:
    """Raise `error` where `path` is no file, or stands for one that Git LFS has not fetched."""
    kind = file_kind(path)
    if kind == LFS_POINTER:
        raise error(f"{path}: is {kind}, not the file itself; fetch that with `git lfs pull`")
    if kind == "a folder":
        raise error(f"{path}: is a folder, a file is needed")
    if not Path(path).is_file():
        raise error(f"{path}: no such file")


@contextmanager
def _opened(path: str | Path, error: type[HarnessError]) -> Iterator[Any]:
    """safetensors' reader of the file `path`; raises `error` as `load_tensors`."""
    from safetensors import SafetensorError, safe_open

    need_content(path, error)
    try:
        with open(path, "rb") as content, safe_open(_place(path, content.fileno()), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as reason:
        if kind := file_kind(path):
            raise error(f"{path}: is {kind}, not a safetensors file; give it a name that ends in .pth") from None
        raise error(
            f"{path}: not a readable safetensors file ({reason}); it may be cut off or of another kind. Make it again."
        ) from None


def _place(path: str | Path, descriptor: int) -> str:
    """The path of an open file, or where that is no UTF-8, which safetensors does not take, its descriptor's."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return f"/proc/self/fd/{descriptor}"
    return str(path)


def load_tensors(path: str | Path, error: type[HarnessError]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read `path` whole: tensors by name, and the header's metadata.

    The tensors are copies, aligned by PyTorch's allocator, and do not change with the file. Raises `error` where the
    file is missing, cut off or not a safetensors file.
    """
    with _opened(path, error) as file:
        metadata = file.metadata() or {}
        return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118


def load_header(path: str | Path, error: type[HarnessError]) -> dict[str, str]:
    """The metadata of the header alone; no tensor is read. Raises `error` as `load_tensors`."""
    with _opened(path, error) as file:
        return file.metadata() or {}

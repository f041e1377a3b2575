"""Models on libswin_int8_c (docs/runtime.md), for programs that have NumPy and no PyTorch.

To the bit what `pyharness.engine` gives from the torch extension; called as a C program calls it, so an example too.
Needs of this package `__init__.py` and `errors.py`, and nothing that is neither NumPy nor Python's own.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_int64, c_size_t, c_uint8, c_void_p
from pathlib import Path

import numpy as np

from pyharness.errors import EngineError

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = Path(__file__).resolve().parent / "_lib" / "libswin_int8_c.so.0.1"
"""Where the package has the library, swin_run beside it (cmake/runtime.cmake)."""

OK, ERROR_FILE, ERROR_ARGUMENT, ERROR_UNSUPPORTED, ERROR_MEMORY, ERROR_INTERNAL = range(6)
"""swin_status"""


class Options(ctypes.Structure):
    """swin_options"""

    _fields_ = (
        ("struct_size", c_size_t),
        ("device", c_char_p),
        ("isa", c_char_p),
        ("threads", c_int),
        ("residual", c_char_p),
    )


class Info(ctypes.Structure):
    """swin_info"""

    _fields_ = (
        ("struct_size", c_size_t),
        *((name, c_char_p) for name in ("name", "graph", "device", "isa")),
        ("threads", c_int),
        *((name, c_int64) for name in ("channels", "height", "width", "classes", "features", "outputs", "stages")),
        ("mean", POINTER(c_float)),
        ("std", POINTER(c_float)),
        ("class_names", POINTER(c_char_p)),
        ("interpolation", c_char_p),
        ("crop_pct", c_double),
        ("crop_mode", c_char_p),
    )


class StatusError(EngineError):
    """What the library refused: the `status`, and swin_last_error in words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def library_path() -> Path:
    """Where the library is looked for: SWIN_INT8_C_LIBRARY of the environment, else in the build of this checkout where
    there is one, else beside this file, where it is installed."""
    forced = os.environ.get("SWIN_INT8_C_LIBRARY")
    if forced:
        return Path(forced)
    built = ROOT / "build" / "release" / "lib" / "libswin_int8_c.so"
    return built if built.is_file() else INSTALLED


def program_path() -> Path:
    """swin_run, which is built and installed beside the library; EngineError where it is not there."""
    library = library_path()
    places = (library.parent.parent / "bin" / "swin_run", library.parent / "swin_run")
    for path in places:
        if path.is_file():
            return path
    raise EngineError(f"swin_run is not at {' or '.join(map(str, places))}: `bash scripts/build_ft.sh` builds it")


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library, its functions declared; EngineError where it is not there or cannot be loaded."""
    path = library_path()
    if not path.is_file():
        raise EngineError(
            f"the C library is not at {path}: `bash scripts/build_ft.sh` or `pip install .` builds it, "
            "SWIN_INT8_C_LIBRARY names another"
        )
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(f"{path} cannot be loaded: {error}. Build it again, on this machine") from None
    model, options, floats, pixels = c_void_p, POINTER(Options), c_void_p, POINTER(c_uint8)
    for name, arguments in {
        "swin_load": (c_char_p, options, POINTER(model)),
        "swin_load_memory": (c_char_p, c_size_t, options, POINTER(model)),
        "swin_at_size": (model, c_int64, c_int64, POINTER(model)),
        "swin_get_info": (model, POINTER(Info)),
        "swin_forward": (model, floats, c_int64, floats, c_void_p),
        "swin_features": (model, floats, c_int64, floats, c_void_p),
        "swin_stages": (model, floats, c_int64, POINTER(c_void_p), c_void_p),
        "swin_stage_shape": (model, c_int64, POINTER(c_int64)),
        "swin_normalize": (model, pixels, c_int64, POINTER(c_float), POINTER(c_float), floats),
        "swin_prepare": (model, pixels, c_int64, c_int64, c_int64, floats),
        "swin_workspace_bytes": (model, c_int64, POINTER(c_int64)),
    }.items():
        getattr(lib, name).argtypes = arguments
    lib.swin_free.argtypes, lib.swin_free.restype = (model,), None
    lib.swin_last_error.restype = lib.swin_version.restype = c_char_p
    return lib


def options(**fields) -> Options:
    """Options whose size is set."""
    return Options(ctypes.sizeof(Options), **fields)


def check(status: int) -> None:
    """StatusError where `status` is not SWIN_OK."""
    if status != OK:
        raise StatusError(status, library().swin_last_error().decode(errors="replace"))


def _floats(values: Sequence[float], count: int) -> ctypes.Array:
    """float[count]"""
    if len(values) != count:
        raise EngineError(f"found {len(values)} numbers for mean or std; {count}, one per channel, are needed")
    return (c_float * count)(*values)


class CModel:
    """A model of the C library, from a file's path or its bytes; StatusError for what the library refuses.

    Its memory is given back at the end of a `with` block, or by `close`; calls after that are refused.
    """

    def __init__(self, source: str | Path | bytes, given: Options | None = None) -> None:
        self.handle = c_void_p()
        out, with_options = byref(self.handle), None if given is None else byref(given)
        if isinstance(source, bytes):
            check(library().swin_load_memory(source, len(source), with_options, out))
        else:
            check(library().swin_load(os.fsencode(source), with_options, out))
        self._read_info()

    def _read_info(self) -> None:
        info = self.info()
        self.image_shape, self.outputs = (info.channels, info.height, info.width), info.outputs
        self.num_features = info.features

    def at_size(self, height: int, width: int) -> CModel:
        """The same model for images of another size, on the same weights in memory; each is closed by itself."""
        other = CModel.__new__(CModel)
        other.handle = c_void_p()
        check(library().swin_at_size(self.handle, height, width, byref(other.handle)))
        other._read_info()
        return other

    def __enter__(self) -> CModel:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Give the model's memory back; nothing where that is done."""
        library().swin_free(self.handle)
        self.handle = c_void_p()

    def info(self) -> Info:
        info = Info(ctypes.sizeof(Info))
        check(library().swin_get_info(self.handle, byref(info)))
        return info

    def forward(self, images: np.ndarray) -> np.ndarray:
        """Logits f32 [B, outputs] of images f32 [B, C, H, W]."""
        return self._run(library().swin_forward, images, self.outputs)

    def features(self, images: np.ndarray) -> np.ndarray:
        """Pooled features f32 [B, features] of images f32 [B, C, H, W]."""
        return self._run(library().swin_features, images, self.num_features)

    def stages(self, images: np.ndarray) -> list[np.ndarray]:
        """What every stage gives, f32 [B, H_i, W_i, C_i], of images f32 [B, C, H, W]: as `SwinInt8.forward_stages`."""
        images, shape, outputs = self._checked(images), (c_int64 * 3)(), []
        for stage in range(self.info().stages):
            check(library().swin_stage_shape(self.handle, stage, shape))
            outputs.append(np.empty((len(images), *shape), dtype=np.float32))
        places = (c_void_p * len(outputs))(*(out.ctypes.data for out in outputs))
        check(library().swin_stages(self.handle, images.ctypes.data, len(images), places, None))
        return outputs

    def _checked(self, images: np.ndarray) -> np.ndarray:
        if images.dtype != np.float32 or images.shape[1:] != self.image_shape:
            needed = f"float32 (B, {', '.join(map(str, self.image_shape))})"
            found = f"images are {images.dtype} {images.shape}"
            raise EngineError(f"{found}; {needed} is needed, or `at_size` of their size")
        return np.ascontiguousarray(images)

    def _run(self, function, images: np.ndarray, columns: int) -> np.ndarray:
        images = self._checked(images)
        out = np.empty((len(images), columns), dtype=np.float32)
        check(function(self.handle, images.ctypes.data, len(images), out.ctypes.data, None))
        return out

    def normalize(
        self, pixels: np.ndarray, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> np.ndarray:
        """Images f32 [B, C, H, W] of pixels u8 [B, H, W, C]."""
        channels, height, width = self.image_shape
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, channels):
            needed = f"uint8 (B, {height}, {width}, {channels})"
            raise EngineError(f"pixels are {pixels.dtype} {pixels.shape}; {needed} is needed")
        batch = len(pixels)
        images = np.full((batch, channels, height, width), np.nan, dtype=np.float32)
        given = [None if values is None else _floats(values, channels) for values in (mean, std)]
        data = np.ascontiguousarray(pixels).ctypes.data_as(POINTER(c_uint8))
        check(library().swin_normalize(self.handle, data, batch, *given, images.ctypes.data))
        return images

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """The image f32 [C, H, W] that the model takes, of a photograph u8 [height, width, C] of any size: resized,
        cropped and normalized as the file says. The rows may lie apart, as those of a larger array's part do."""
        channels = self.image_shape[0]
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
            found = f"a photograph is {pixels.dtype} {pixels.shape}"
            raise EngineError(f"{found}; uint8 (height, width, {channels}) is needed")
        height, width = pixels.shape[:2]
        if pixels.strides[1:] != (channels, 1) or pixels.strides[0] < width * channels:
            pixels = np.ascontiguousarray(pixels)
        image = np.empty(self.image_shape, dtype=np.float32)
        data = pixels.ctypes.data_as(POINTER(c_uint8))
        check(library().swin_prepare(self.handle, data, height, width, pixels.strides[0], image.ctypes.data))
        return image

    def workspace_bytes(self, batch: int) -> int:
        bytes_ = c_int64()
        check(library().swin_workspace_bytes(self.handle, batch, byref(bytes_)))
        return bytes_.value

"""Where an op of the table runs in tests: an instruction set of the CPU, or a CUDA device. Tests hold tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pyharness import engine

CPU_VARIANTS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "neon_i8mm", "neon_dotprod", "portable")
CUDA_TYPES = {"cuda_fp16": torch.float16, "cuda_bf16": torch.bfloat16}
CUDA_PARAMS = [pytest.param(name, marks=pytest.mark.gpu) for name in CUDA_TYPES]


class OpsOn:
    """`torch.ops.swin_int8` for CPU tensors, run on `device`: whole storages travel there and back.

    So the poison in an output and the guard bytes behind it lie around the device's tensor just as around ours.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def __getattr__(self, name: str) -> Callable[..., None]:
        op = getattr(torch.ops.swin_int8, name)

        def call(*args: object) -> None:
            moved: list[tuple[Tensor, Tensor]] = []
            op(*(self._moved(arg, moved) if isinstance(arg, Tensor) else arg for arg in args))
            for here, there in moved:
                here.copy_(there)  # waits for the device

        return call

    def _moved(self, tensor: Tensor, moved: list[tuple[Tensor, Tensor]]) -> Tensor:
        here = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        there = torch.empty(here.shape, dtype=torch.uint8, device=self._device)
        there.copy_(here)
        moved.append((here, there))
        view = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return view.set_(there.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


class Target:
    """`device`, `ops`: where, and the op table there. `real`: type of residual stream and parameters, whose rounding `close` allows for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_cpu = name not in CUDA_TYPES
        self.device = torch.device("cpu" if self.is_cpu else "cuda")
        self.real = CUDA_TYPES.get(name, torch.float32)
        self.ops = torch.ops.swin_int8 if self.is_cpu else OpsOn("cuda")

    def close(self, found: Tensor, wanted: Tensor, rtol: float = 1e-6, atol: float = 1e-6) -> None:
        """AssertionError where `found` is further from `wanted` than float32 arithmetic and one rounding to its type."""
        rounding = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps / 2
        torch.testing.assert_close(found.double(), wanted.double(), rtol=rtol + 1.01 * rounding, atol=atol)


@contextmanager
def target(name: str) -> Iterator[Target]:
    """The target of that name; skips the test where this machine lacks the instruction set."""
    if name in CUDA_TYPES:
        yield Target(name)
        return
    if name not in engine.cpu_variants():
        pytest.skip(f"this machine or build has no {name}")
    engine.select_cpu_variant(name)
    try:
        yield Target(name)
    finally:
        engine.select_cpu_variant("")

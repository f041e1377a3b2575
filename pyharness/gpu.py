"""What measuring on a GPU needs beside measure.py: the device asked for, its clock, its conditions and its ceilings."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from pyharness.errors import HarnessError

if TYPE_CHECKING:
    from pyharness.engine import OpInfo

DEVICES = ("cpu", "cuda")
COPY_BYTES = 1 << 30
MATRIX_SIDE = 8192
CEILING_RUNS = 20


def use_device(name: str) -> torch.device:
    """The device that `--device` names, the engine proven to run on it by one small operation.

    HarnessError where PyTorch sees no GPU, or the engine was built without CUDA or for another architecture.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HarnessError(
            f"--device {name}: PyTorch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU on this machine; "
            "leave the option out to run on the CPU"
        )
    from pyharness import engine

    engine.load()
    device = torch.device("cuda", torch.cuda.current_device())
    x, out = torch.ones(2, 16, dtype=torch.int8, device=device), torch.empty(2, 16, dtype=torch.half, device=device)
    try:
        torch.ops.swin_int8.dequantize(x, 1.0, out)
        torch.cuda.synchronize(device)
    except (NotImplementedError, RuntimeError) as error:
        raise HarnessError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def engine_info_on(device: torch.device) -> dict[str, str]:
    """`engine_info()` for results: on a GPU its backend and "isa" are those of the GPU."""
    from pyharness.engine import engine_info

    info = engine_info()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        info |= {"backend": "cuda", "isa": f"sm_{major}{minor}", "residual": "float16"}
    return info


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def conditions_on(device: torch.device, host: object) -> dict[str, object]:
    """What a result file's `meta` holds of the GPU, over what `measure.environment` said of the machine (`host`)."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "host": host,
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "gpu": {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "gemm_providers": cuda_info().get("providers"),
        },
    }


class CudaTimer:
    """Milliseconds of one call by CUDA events on the current stream, for `measure.time_alternating`.

    The device is idle when the call begins, so the time holds what launching costs: the latency a caller sees.
    `queued`: the same call goes ahead of it without waiting, so that launching hides behind it: the device's own time.
    """

    def __init__(self, device: torch.device, queued: bool = False) -> None:
        self._device, self._queued = device, queued
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize(self._device)
        if self._queued:
            call()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


LARGE_BATCH = 32
"""From here on a call of a Swin moves far more than any GPU's caches hold: what ran before it leaves no trace there."""


def timing_of(device: torch.device, batch: int, queued: bool = False) -> dict[str, Any]:
    """Arguments for `measure.time_alternating` that time calls of `batch` images on `device`; none on a CPU."""
    if device.type != "cuda":
        return {}
    untimed = None if queued or batch >= LARGE_BATCH else 1.0
    return {"timer": CudaTimer(device, queued), "settle_ms": untimed}


def _median_ms(timer: CudaTimer, call: Callable[[], object]) -> float:
    timer(call)
    return sorted(timer(call) for _ in range(CEILING_RUNS))[CEILING_RUNS // 2]


@torch.inference_mode()
def measure_ceilings(device: torch.device) -> dict[str, float]:
    """The GPU's ceilings, measured now through PyTorch, in the units of `engine.measure_ceilings`.

    copy_gb_s: bytes read plus written by a copy of 1 GiB; s8_gop_s: cuBLASLt's s8 product of random matrices;
    f32_gflop_s: a float32 product without TF32. The medians of some runs; a GEMM of ours may beat cuBLASLt's.
    """
    timer, rng = CudaTimer(device, queued=True), torch.Generator(device).manual_seed(0)
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=device, generator=rng)
    copy_ms = _median_ms(timer, functools.partial(torch.empty_like(source).copy_, source))
    shape, operations = (MATRIX_SIDE, MATRIX_SIDE), 2 * MATRIX_SIDE**3
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8, device=device, generator=rng) for _ in range(2))
    s8_ms = _median_ms(timer, lambda: torch._int_mm(a, b.t()))
    x, y = (torch.randn(shape, device=device, generator=rng) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        f32_ms = _median_ms(timer, lambda: x @ y)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {
        "copy_gb_s": 2 * COPY_BYTES / copy_ms / 1e6,
        "s8_gop_s": operations / s8_ms / 1e6,
        "f32_gflop_s": operations / f32_ms / 1e6,
    }


def cuda_info() -> dict[str, Any]:
    """What the engine says of its CUDA backend (csrc/torch/binding.cc); empty where it is not loaded."""
    ask = getattr(torch.ops.swin_int8, "cuda_info", None)
    return json.loads(ask()) if ask is not None else {}


def providers_of(ops: Iterable[OpInfo], choices: Iterable[dict[str, Any]]) -> dict[str, str]:
    """What ran each GEMM shape of `ops`: {"4096x96x384 s8": "cublaslt algo7"}. `choices`: those of `cuda_info`.

    An FT graph's GEMMs (named *_gemm) and the fused graph's leave different outputs of the same sizes.
    """
    products = set()
    for op in ops:
        if op.kind == "gemm" and (sizes := re.match(r"M=(\d+) ", op.shape)):
            of_ft = op.name.endswith("_gemm")
            for n, k in re.findall(r"N=(\d+) K=(\d+)", op.shape):
                products.add((int(sizes[1]), int(n), int(k), of_ft))
    return {
        f"{c['m']}x{c['n']}x{c['k']} {c['output']}": f"{c['provider']} {c['candidate']}".strip()
        for c in choices
        if (c["m"], c["n"], c["k"], not c["output"].startswith("channels_")) in products
    }


def gemm_providers(ops: Iterable[OpInfo], info: dict[str, str]) -> dict[str, str]:
    """Who runs the GEMMs of `ops`, for a result row: each shape on a GPU, the instruction set on a CPU."""
    found = providers_of(ops, cuda_info().get("choices", [])) if info["backend"] == "cuda" else {}
    return found or {"s8": f"{info['backend']} {info['isa']}"}

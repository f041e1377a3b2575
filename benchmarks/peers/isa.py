"""Forcing an instruction set: by the variables that libraries know, and where it can be had by what CPUID answers.

Every library looks once, when it is loaded, so a program that forces one has to start anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.peers import cpuid

NATIVE = "native"
"""No forcing: every library takes the best that it knows of on this machine."""

MARK = "SWIN_PEERS_ISA"
"""Set in a process that was started for an instruction set, to its name."""


@dataclass(frozen=True)
class Isa:
    """`bits`: width of its vectors; `variables`: what tells the libraries; `beyond`: parts of the names of kernels that
    need more than it."""

    bits: int
    variables: Mapping[str, str] = field(default_factory=dict)
    beyond: tuple[str, ...] = ()


def _variables(engine: str, aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {
        "SWIN_CPU_ISA": engine,
        "ATEN_CPU_CAPABILITY": aten,  # PyTorch's own kernels, and the code that torch.compile writes
        "ONEDNN_MAX_CPU_ISA": onednn,  # oneDNN, in PyTorch and in OpenVINO
        "DNNL_MAX_CPU_ISA": onednn,  # the older name of the same
        "MKL_ENABLE_INSTRUCTIONS": mkl,  # PyTorch's f32 GEMMs
    }


ISAS = {
    NATIVE: Isa(512),
    "amx_int8": Isa(512, _variables("amx_int8", "avx512", "AVX512_CORE_AMX", "AVX512_E4")),
    "avx512_vnni": Isa(512, _variables("avx512_vnni", "avx512", "AVX512_CORE_VNNI", "AVX512_E1"), ("amx", "bf16")),
    "avx_vnni": Isa(256, _variables("avx_vnni", "avx2", "AVX2_VNNI", "AVX2"), ("amx", "avx512")),
    "avx2": Isa(256, _variables("avx2", "avx2", "AVX2", "AVX2"), ("amx", "avx512", "vnni")),
}
"""By the name of the engine's variant."""

TORCH_READS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def cpu_flags() -> frozenset[str]:
    """The instruction sets of this processor, as Linux names them; empty where it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            line = next(line for line in file if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return frozenset()
    return frozenset(line.split(":", 1)[1].split())


def environment_for(isa: str, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` as a process needs it that runs on `isa`: what forces another one is taken out."""
    known = {name for entry in ISAS.values() for name in entry.variables} | {MARK}
    cleaned = {name: value for name, value in cpuid.unmasked(environment).items() if name not in known}
    forced = {**cleaned, **ISAS[isa].variables, MARK: isa}
    library = cpuid.mask_library() if isa in cpuid.MASKS else None
    return forced if library is None else cpuid.masked(forced, isa, library)


def restart_on(isa: str, argv: list[str] | None = None) -> None:
    """Start this program anew with the environment of `isa`; returns where it already runs in it."""
    if os.environ.get(MARK) == isa:
        return
    command = [sys.executable, *(sys.orig_argv[1:] if argv is None else argv)]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment_for(isa, os.environ))


def has_bf16(isa: str, flags: frozenset[str]) -> bool:
    """Whether bf16 arithmetic in hardware is there, and left in by `isa`."""
    return bool(flags & {"amx_bf16", "avx512_bf16"}) and isa in (NATIVE, "amx_int8")


def has_vnni(isa: str, flags: frozenset[str]) -> bool:
    """Whether u8 x s8 products are summed without saturating in between."""
    return bool(flags & {"avx512_vnni", "avx_vnni"}) and isa != "avx2"


def forced_eager(isa: str) -> str | None:
    """Whether `isa` holds in PyTorch's own kernels: "yes", or None where nothing is forced."""
    return None if isa == NATIVE else "yes"


def forced_compiled(isa: str, flags: frozenset[str], masked: bool) -> str | None:
    """Whether `isa` holds in code that torch.compile writes. Told "avx512" it takes AMX too where it finds AMX."""
    if isa == NATIVE:
        return None
    return "no" if isa == "avx512_vnni" and "amx_tile" in flags and not masked else "yes"


def forced_kernels(isa: str, kernels: Iterable[str], masked: bool) -> str | None:
    """Whether `isa` holds, by the names of the kernels that a library says it runs.

    "yes"; "partly" where GEMMs and convolutions keep to it and other kernels do not; "no" where GEMMs do not, or run in
    MLAS, which nothing but CPUID forces; "unknown" where no name tells an instruction set.
    """
    if isa == NATIVE:
        return None
    names = {name.lower() for name in kernels}
    too_much = {
        name for name in names if ("mlas" in name and not masked) or any(part in name for part in ISAS[isa].beyond)
    }
    if any("gemm" in name or "conv" in name for name in too_much):
        return "no"
    if too_much:
        return "partly"
    return "yes" if masked or any("avx" in name or "amx" in name for name in names) else "unknown"


def forced_by_cpuid(isa: str, masked: bool) -> str | None:
    """Whether `isa` holds in a library that goes by CPUID alone."""
    return None if isa == NATIVE else "yes" if masked else "no"

"""The processor's own answer to CPUID cut down to an instruction set, for libraries that cannot be told to keep to it.

`cpuid_mask.c` is compiled and preloaded. Where that cannot be had (no x86-64 Linux, a processor or a hypervisor without
CPUID faulting, no C compiler) the variables of peers.isa are all there is.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pyharness.atomic import atomic_path

SOURCE = Path(__file__).with_name("cpuid_mask.c")
VARIABLE = "SWIN_CPUID_MASK"
"""The instruction set that CPUID is cut down to, in a process that it is cut down in."""

MASKS = ("avx2", "avx_vnni", "avx512_vnni")
PRELOAD = "LD_PRELOAD"
STEM = "swin_cpuid_mask"


@functools.cache
def mask_library(folder: Path | None = None) -> Path | None:
    """The library to preload, compiled into `folder` (None: a cache of the user's) if it is not there; None where it
    would not work on this machine."""
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    cache = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swin_int8"
    library = cache / f"{STEM}-{digest}.so"
    if not library.exists():
        try:
            with tempfile.TemporaryDirectory() as scratch:
                made = Path(scratch) / library.name
                command = [compiler, "-O2", "-fPIC", "-shared", "-o", str(made), str(SOURCE), "-ldl"]
                if subprocess.run(command, capture_output=True).returncode != 0:
                    return None
                cache.mkdir(parents=True, exist_ok=True)
                with atomic_path(library) as temporary:
                    shutil.copyfile(made, temporary)
        except OSError:
            return None
    # What cannot be preloaded is passed over with a warning, a path with a space in it for one: so the probe looks.
    look = f"import sys; sys.exit({str(library)!r} not in open('/proc/self/maps').read())"
    probe = subprocess.run([sys.executable, "-c", look], env=masked(os.environ, MASKS[0], library), capture_output=True)
    return library if probe.returncode == 0 else None


def unmasked(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what `masked` added."""
    plain = {name: value for name, value in environment.items() if name != VARIABLE}
    others = [entry for entry in plain.pop(PRELOAD, "").split(":") if entry and STEM not in entry]
    return {**plain, PRELOAD: ":".join(others)} if others else plain


def masked(environment: Mapping[str, str], isa: str, library: Path) -> dict[str, str]:
    """`environment` for a process whose CPUID is cut down to `isa`, one of MASKS."""
    plain = unmasked(environment)
    before = plain.get(PRELOAD)
    return {**plain, VARIABLE: isa, PRELOAD: f"{library}:{before}" if before else str(library)}


def is_masked() -> bool:
    """Whether this process runs with a CPUID that is cut down."""
    return VARIABLE in os.environ

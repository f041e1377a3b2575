"""What peers need made once: exported and quantized models, kept in folders named after all that they depend on."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pyharness.errors import HarnessError
from pyharness.training import report


def version_of(package: str) -> str | None:
    """The installed version of `package`; None where it is not installed. Nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def digest_of(what: Mapping[str, Any]) -> str:
    """Twelve hex digits that tell one dict of JSON values from another."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def kept(work: Path, name: str, key: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder `<work>/<name>-<digest of key>`, which `make(folder)` filled, now or in an earlier run.

    It appears whole or not at all; HarnessError where it cannot be made.
    """
    folder = work / f"{name}-{digest_of(key)}"
    if folder.is_dir():
        return folder
    report(f"make {folder.name}")
    try:
        work.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=work))
    except OSError as error:
        raise HarnessError(f"{work} cannot be written to ({error.strerror}); choose another --work") from None
    try:
        make(temporary)
        (temporary / "key.json").write_text(json.dumps(dict(key), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def megabytes(folder: Path) -> float:
    """Size of a folder's files but key.json, in 10^6 bytes."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.name != "key.json") / 1e6

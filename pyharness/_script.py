"""Imported first by each program of this folder when it is run as a file: `python pyharness/x.py`.

Python then puts this folder on the path in the place of the repository root. This module mends that, so that
`import pyharness` works and no module of this folder shadows another package's, and says in one line what to do where
the packages that every program needs are missing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("numpy", "safetensors", "timm", "torch")


def missing_packages(names: tuple[str, ...] = NEEDED) -> list[str]:
    """Those of `names` that this Python cannot find. Nothing is imported."""
    return [name for name in names if importlib.util.find_spec(name) is None]


sys.path[0] = str(ROOT)

if missing := missing_packages():
    print(
        f"error: {sys.executable} has no {', '.join(missing)}. Run `bash scripts/build_ft.sh` once, "
        f"then start the program with `.venv/bin/python {Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}`.",
        file=sys.stderr,
    )
    sys.exit(2)

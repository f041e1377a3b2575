"""Write requirements/constraints.txt: the versions installed here of every package that swin-int8 needs, in whole.

Run it in an environment in which all tests passed:  .venv/bin/python scripts/update_constraints.py
The pins hold from the oldest Python on that all of these releases support. An older Python takes the newest releases
that still fit it, within the ranges of pyproject.toml.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "requirements" / "constraints.txt"
HEADER = """\
# The versions that the tests of this repository passed with. scripts/build_ft.sh installs with them; for a plain
# `pip install .` add `-c requirements/constraints.txt`. Written by scripts/update_constraints.py; do not edit.
"""
EXTRAS = ("build", "test", "data", "train", "peers")


def closure(root: str, extras: tuple[str, ...]) -> dict[str, str]:
    """Version by canonical name of all installed packages that `root[extras]` needs, directly or not."""
    found: dict[str, str] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    pending = [(root, extras)]
    while pending:
        name, wanted = pending.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # a requirement of another platform or of an extra that is not installed
        found[canonicalize_name(name)] = package.version
        for text in package.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *wanted)):
                pending.append((requirement.name, tuple(sorted(requirement.extras))))
    return found


def lowest_python(versions: dict[str, str]) -> str:
    """The lowest Python, as "3.11", that every package of `versions` installs on."""
    for minor in range(10, 100):
        if all(f"3.{minor}.99" in SpecifierSet(distribution(n).metadata["Requires-Python"] or "") for n in versions):
            return f"3.{minor}"
    raise SystemExit("error: no Python 3 suits every installed package")


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    versions = closure("swin-int8", EXTRAS)
    if "torch" not in versions:
        raise SystemExit("error: swin-int8 is not installed here; run bash scripts/build_ft.sh first")
    del versions["swin-int8"]
    marker = f'python_version >= "{lowest_python(versions)}"'
    lines = [f"{name}=={version} ; {marker}\n" for name, version in sorted(versions.items())]
    TARGET.write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {len(versions)} packages")


if __name__ == "__main__":
    main()

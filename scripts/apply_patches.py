#!/usr/bin/env python3
"""Copy the FT graph to a build folder and apply the patch series to the copy; the tree itself stays as it is."""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

GRAPH = Path("third_party/FasterTransformer")


def read_series(source: Path) -> list[Path]:
    """Patch files of `source`/patches/series, in order; comments and empty lines left out."""
    lines = (source / "patches" / "series").read_text(encoding="utf-8").splitlines()
    return [source / "patches" / line.strip() for line in lines if line.strip() and not line.startswith("#")]


def apply_series(source: Path, target: Path, git: str) -> None:
    """Copy `source`/third_party/FasterTransformer below `target` and apply the series; SystemExit with the reason."""
    shutil.copytree(source / GRAPH, target / GRAPH)
    for patch in read_series(source):
        if not patch.is_file():
            sys.exit(f"error: patches/series names {patch.name}, which is not in patches/")
        # --git-dir: an enclosing checkout must neither be searched for nor change how paths are read.
        command = [git, "--git-dir=/nonexistent", "apply", "--whitespace=nowarn", str(patch.resolve())]
        result = subprocess.run(command, cwd=target, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            sys.exit(
                f"error: {patch.name} does not apply to the FT graph:\n{result.stderr.strip()}\n"
                "The graph changed under the series: mend it with `bash scripts/patch_ft.sh edit` (patches/README.md)."
            )


def sync(fresh: Path, target: Path) -> None:
    """Replace `target` by `fresh`, leaving files that did not change untouched, so that a build rebuilds little."""
    wanted = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    for path in [p for p in target.rglob("*") if p.is_file()]:
        if path.relative_to(target) not in wanted:
            path.unlink()
    for name in wanted:
        old, new = target / name, fresh / name
        if old.is_file() and filecmp.cmp(old, new, shallow=False):
            old.touch()  # newer than what it was made from, as the build system expects
            continue
        old.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(new, old)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the repository")
    parser.add_argument("--target", type=Path, required=True, help="folder to hold the patched copy")
    parser.add_argument("--git", default="git", help="git program (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        apply_series(args.source, fresh, args.git)
        sync(fresh, args.target)


if __name__ == "__main__":
    main()

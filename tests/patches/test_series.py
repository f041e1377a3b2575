"""The patch series: it applies, it is small, each patch says why, and it leaves the baseline as it is."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRAPH = Path("third_party/FasterTransformer")
MAX_CHANGED_LINES = 150


def series() -> list[Path]:
    lines = (ROOT / "patches" / "series").read_text(encoding="utf-8").splitlines()
    return [ROOT / "patches" / line for line in lines if line and not line.startswith("#")]


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def apply_to(target: Path, source: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "apply_patches.py", "--source", source, "--target", target]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_series_and_folder_name_the_same_patches():
    assert series() and sorted(series()) == sorted((ROOT / "patches").glob("*.patch"))


def test_series_applies_and_the_baseline_stays(tmp_path):
    before = digest(ROOT / GRAPH)
    result = apply_to(tmp_path)
    assert result.returncode == 0, result.stderr
    assert digest(ROOT / GRAPH) == before
    patched = digest(tmp_path / GRAPH)
    assert patched.keys() == before.keys() and patched != before
    block = (tmp_path / GRAPH / "src/fastertransformer/models/swin_int8/SwinInt8Block.cc").read_text(encoding="utf-8")
    assert "fc1_bias_gelu" not in block and "Epilogue::kRelu" in block


def test_second_run_leaves_the_same_files(tmp_path):
    apply_to(tmp_path)
    first = digest(tmp_path)
    (tmp_path / GRAPH / "stray.cc").write_text("left over", encoding="utf-8")
    apply_to(tmp_path)
    assert digest(tmp_path) == first


def test_series_is_small():
    changed = sum(len(re.findall(r"^[+-](?![+-]{2} )", p.read_text(encoding="utf-8"), re.MULTILINE)) for p in series())
    assert 0 < changed < MAX_CHANGED_LINES


@pytest.mark.parametrize("patch", series(), ids=lambda p: p.name[:4])
def test_every_patch_gives_reason_numerics_and_proof(patch):
    header = patch.read_text(encoding="utf-8").split("\n---\n")[0]
    for part in ("\nWhy: ", "\nNumerics: ", "\nProof: "):
        assert part in header, f"{patch.name} has no '{part.strip()}'"
    proof = re.search(r"Proof: (tests/\S+\.py)", header)
    assert proof and (ROOT / proof[1]).is_file()


def test_a_patch_that_does_not_apply_is_named(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / GRAPH, source / GRAPH)
    shutil.copytree(ROOT / "patches", source / "patches")
    block = source / GRAPH / "src/fastertransformer/models/swin_int8/SwinInt8Block.cc"
    block.write_text(block.read_text(encoding="utf-8").replace("fc1_bias_gelu", "renamed"), encoding="utf-8")
    result = apply_to(tmp_path / "target", source)
    assert result.returncode != 0
    assert "0001-" in result.stderr and "patch_ft.sh edit" in result.stderr and "Traceback" not in result.stderr


def test_edit_and_refresh_give_the_series_back(tmp_path):
    """Opening the patched tree and writing it back changes nothing but dates and hashes; an edit lands in the series."""
    copy = tmp_path / "copy"
    for part in (GRAPH, Path("patches"), Path("scripts")):
        shutil.copytree(ROOT / part, copy / part)
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}

    def patch_ft(verb):
        result = subprocess.run(
            ["bash", "scripts/patch_ft.sh", verb], cwd=copy, env=env, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    patch_ft("edit")
    header = copy / "build/patch-edit" / GRAPH / "src/fastertransformer/models/swin_int8/SwinInt8Block.h"
    header.write_text(header.read_text(encoding="utf-8") + "// edited\n", encoding="utf-8")
    git = ["git", "-C", copy / "build/patch-edit"]
    subprocess.run([*git, "commit", "--quiet", "--all", "--message", "an edit"], env=env, check=True)
    patch_ft("refresh")
    names = [line for line in (copy / "patches/series").read_text().splitlines() if not line.startswith("#")]
    assert names[:-1] == [p.name for p in series()]
    assert f"applied {len(names)} patches" in patch_ft("apply")
    assert "// edited" in (copy / "build/patch-check" / header.relative_to(copy / "build/patch-edit")).read_text()

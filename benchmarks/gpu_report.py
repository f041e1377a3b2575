"""What scripts/gpu_check.sh knows of a machine before it starts, and the one page that sums up what it found.

    python benchmarks/gpu_report.py environment FOLDER   writes environment.json; status 3 where there is no GPU
    python benchmarks/gpu_report.py summary FOLDER       writes summary.md from whatever parts have left there
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python put this folder on the path in the place of the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pyharness import measure, results
from pyharness.errors import FormatError, run_cli

NO_GPU = 3
"""Exit status of `environment` without a GPU."""

NEEDED = ("numpy", "safetensors", "timm", "torch")
TIMM = "1.0.31"
"""The oldest that pyproject.toml takes; older ones have no windows per stage, and some cannot make models' shapes."""

OPTIONAL = {
    "pytest": "the GPU tests",
    "hypothesis": "the GPU tests",
    "matplotlib": "the plots",
    "cutlass_library": "the CUTLASS GEMMs (package nvidia-cutlass, or cmake's -DSWIN_CUTLASS_DIR)",
    "modelopt": "calibration; latencies on random weights do without",
    "sklearn": "the digits",
    "torchao": "the torchao peer",
    "torch_tensorrt": "the TensorRT peer",
}
"""Packages by import name, and what is left out without them."""

TOOLS = {"nvcc": "the build", "cmake": "the build", "ninja": "the build", "compute-sanitizer": "the sanitizer part"}

TOP_OPS = 8

BATCH_TITLES = {1: "Batch 1 (Python included, which draws ratios towards 1)", 8: "Batch 8", 32: "Batch 32"}


def find_tool(name: str) -> str | None:
    """The program on PATH, or in the CUDA toolkit's usual places."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(sys.executable).parent, *(Path(home) / "bin" for home in homes if home)]
    return shutil.which(name) or next((str(f / name) for f in folders if os.access(f / name, os.X_OK)), None)


def _first_line(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1] if done.returncode == 0 and lines else None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def environment() -> dict[str, Any]:
    """Machine, GPU, tools and packages; "missing" says in words what is not there and what goes without it."""
    packages = {name: importlib.util.find_spec(name) is not None for name in (*NEEDED, *OPTIONAL)}
    tools = {name: find_tool(name) for name in TOOLS}
    missing = {name: "everything" for name in NEEDED if not packages[name]}
    if packages["timm"] and _numbers(importlib.metadata.version("timm")) < _numbers(TIMM):
        missing[f"timm >= {TIMM}"] = f"models, tests; this one is {importlib.metadata.version('timm')}"
    missing |= {name: what for name, what in OPTIONAL.items() if not packages[name]}
    missing |= {name: what for name, what in TOOLS.items() if not tools[name]}
    found: dict[str, Any] = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "host": measure.cpu_name(),
        **measure.git_state(),
        "tools": {name: path and _first_line([path, "--version"]) for name, path in tools.items()},
        "versions": {name: importlib.metadata.version(name) for name in NEEDED if packages[name]},
        "missing": missing,
        "gpu": None,
    }
    if packages["torch"]:
        import torch

        found["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            from pyharness import gpu

            device = torch.device("cuda", torch.cuda.current_device())
            found |= {"gpu": gpu.conditions_on(device, found["host"]), "gpus": torch.cuda.device_count()}
    return found


def write_environment(folder: Path) -> int:
    found = environment()
    folder.mkdir(parents=True, exist_ok=True)
    results.write_json(folder / "environment.json", found)
    for name, what in found["missing"].items():
        print(f"not installed: {name}: {what}")
    if not found["gpu"]:
        print(
            f"error: no GPU here: PyTorch {found['versions'].get('torch', '(not installed)')}, "
            f"CUDA {found.get('cuda')}, sees none. This script measures a GPU; scripts/reproduce.sh and "
            "scripts/test.sh need none.",
            file=sys.stderr,
        )
        return NO_GPU
    print(f"GPU: {found['gpu']['device']}, driver {found['gpu']['driver']}, CUDA {found['cuda']}")
    return 0


# --- The summary ------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A line of parts.tsv: `status` is passed, FAILED, stopped (out of time) or skipped."""

    name: str
    status: str
    seconds: str
    note: str


def read_parts(folder: Path) -> list[Part]:
    """What the script noted; the last line of each part counts."""
    try:
        lines = (folder / "parts.tsv").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    parts = [Part(*(line.split("\t") + [""] * 4)[:4]) for line in lines if line.strip()]
    return list({part.name: part for part in parts}.values())


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _table(folder: Path, kind: str) -> dict[str, Any] | None:
    try:
        return results.load_table(folder, kind)
    except FormatError:
        return None


def _tail(path: Path, lines: int) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]


def test_counts(folder: Path) -> str | None:
    """The last line of gpu_tests.py, e.g. `61 passed, 3 skipped in 40.1s`."""
    lines = _tail(folder / "logs" / "tests" / "tests.log", 60)
    found = [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
    return found[-1].strip("= ") if found else None


def sanitizer_findings(folder: Path) -> dict[str, str]:
    """By tool what compute-sanitizer's own summary line says; `no summary` where it did not get that far."""
    found = {}
    for path in sorted((folder / "sanitizer").glob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
        found[path.stem] = lines[-1].strip() if lines else "no summary"
    return found


def is_clean(finding: str) -> bool:
    """`0 errors`, or racecheck's `0 hazards displayed (0 errors, 0 warnings)`."""
    numbers = re.findall(r"\d+", finding)
    return bool(numbers) and all(number == "0" for number in numbers)


class Claim(NamedTuple):
    """One thing the backend must show; `holds` is None where it was not measured."""

    text: str
    holds: bool | None
    found: str


def _rows(document: Mapping[str, Any] | None, batch: int) -> dict[tuple[str, str], dict[str, Any]]:
    rows = document["rows"] if document else []
    return {(row["model"], row["method"]): row for row in rows if row["batch"] == batch and row["vs_ft_int8"]}


def claims(folder: Path) -> list[Claim]:
    """What must be shown on a GPU, and what the folder's files say of it."""
    table, peers = _rows(_table(folder, "table2"), 128), _rows(_table(folder / "peers", "table2"), 128)
    drops = {model: 1 - table[model, "geluless_int8"]["vs_ft_int8"] for model, m in table if m == "geluless_int8"}
    compiled = {m: row["vs_ft_int8"] for (m, name), row in peers.items() if name.startswith("torch.compile")}

    def verdict(values: Mapping[str, float], good: Any) -> bool | None:
        if any(not good(value) for value in values.values()):
            return False
        return True if set(values) >= set(results.PUBLISHED) else None

    def listed(values: Mapping[str, float], form: str) -> str:
        return ", ".join(f"{model.split('_')[1]} {form.format(v)}" for model, v in values.items()) or "not measured"

    findings = sanitizer_findings(folder)
    clean = [is_clean(finding) for finding in findings.values()]
    counts = test_counts(folder)
    failed = next((part.status for part in read_parts(folder) if part.name == "tests"), None)
    return [
        Claim("GPU tests pass", None if failed in (None, "skipped") else failed == "passed", counts or "not run"),
        Claim(
            "GELU-less INT8 at least 11 % faster than FT INT8 on T, S, B and L, batch 128",
            verdict(drops, lambda drop: drop >= 0.11),
            listed({model: -100 * drop for model, drop in drops.items()}, "{:+.1f} %"),
        ),
        Claim(
            "FT INT8 at least as fast as torch.compile fp16, batch 128",
            verdict(compiled, lambda ratio: ratio >= 1),
            listed(compiled, "takes {:.2f} times FT INT8's time"),
        ),
        Claim(
            "no sanitizer findings",
            False if False in clean else True if len(clean) >= 4 else None,
            "; ".join(f"{tool}: {finding}" for tool, finding in findings.items()) or "not run",
        ),
    ]


def _latency_table(document: Mapping[str, Any]) -> str:
    rows = [
        (
            row["model"],
            str(row["batch"]),
            row["method"],
            results.milliseconds(row["latency_ms"] and row["latency_ms"]["median"]),
            str(row["latency_ms"]["runs"]) if row["latency_ms"] else "-",
            "-" if row["vs_ft_int8"] is None else results.percent_change(row["vs_ft_int8"]),
        )
        for row in document["rows"]
    ]
    return results.markdown_table(("model", "batch", "method", "ms", "rounds", "vs FT INT8"), rows, right=(1, 3, 4, 5))


def _op_table(document: Mapping[str, Any]) -> str:
    fused = [row for row in document["rows"] if row["kind"] == "fused" and row["graph"] == "ft_int8"]
    rows = [
        (
            row["op"],
            results.milliseconds(row["drop_ms"]),
            "-" if row["share"] is None else f"{100 * row['share']:.1f} %",
            results.milliseconds(row["direct_ms"]),
            "-" if row["ceiling_share"] is None else f"{100 * row['ceiling_share']:.0f} %",
        )
        for row in sorted(fused, key=lambda row: -(row["drop_ms"] or 0))[:TOP_OPS]
    ]
    header = ("op of FT INT8", "drop ms", "share", "direct ms", "of ceiling")
    return results.markdown_table(header, rows, right=range(1, 5))


def left_out_gemms(folder: Path) -> dict[str, str]:
    """SWIN_GEMM_SKIP's prefixes, those in force now and those that the preflight has found, and why."""
    found = (_json(folder / "gemm_preflight.json") or {}).get("checks", [])
    attempts = [(f"{c['provider']} {c['output']}", a) for c in found for a in c["attempts"] if a["blamed"]]
    preflight = _tail(folder / "gemm_skip.txt", 1000)
    named = [prefix for prefix in os.environ.get("SWIN_GEMM_SKIP", "").split(",") if prefix]
    why = dict.fromkeys([*preflight, *named], "")
    for prefix in why:
        said = [f"{a['blamed']}: {a['how']} ({check})" for check, a in attempts if a["blamed"].startswith(prefix)]
        why[prefix] = "; ".join(said) or ("named in SWIN_GEMM_SKIP" if prefix in named else "see gemm_preflight.log")
    return why


def _gemm_table(folder: Path) -> str:
    """Of each kind of GEMM output the number of shapes, and by provider what it offered, what was exact, what runs."""
    files = [_json(path) for path in sorted(folder.glob("tune_*.json"))]
    shapes = [shape for file in files if file for shape in file["shapes"]]
    rows = []
    for output in dict.fromkeys(shape["output"] for shape in shapes):
        mine = [shape for shape in shapes if shape["output"] == output]
        for provider in dict.fromkeys(name for shape in mine for name in shape["offered"]):
            offered = sum(shape["offered"].get(provider, 0) for shape in mine)
            proven = sum(shape["proven"].get(provider, 0) for shape in mine)
            runs = sum(shape["chosen"] == provider for shape in mine)
            rows.append((output, str(len(mine)), provider, str(offered), str(proven), str(runs)))
    header = ("output", "shapes", "provider", "candidates offered", "proven exact", "shapes it runs")
    return results.markdown_table(header, rows, right=(1, 3, 4, 5)) if rows else ""


def summary(folder: Path) -> str:
    """The page, from what is there; a part that left nothing is named as such."""
    found, parts = _json(folder / "environment.json") or {}, read_parts(folder)
    gpu = found.get("gpu") or {}
    commit = (found.get("commit") or "no git")[:12] + (" with local changes" if found.get("dirty") else "")
    text = f"# GPU check: {gpu.get('device', 'no GPU')}\n\n"
    text += f"Driver {gpu.get('driver')}, CUDA {found.get('cuda')}, torch {found.get('versions', {}).get('torch')}; "
    text += f"{found.get('host')}; commit {commit}.\n\n## What it must show\n\n"
    words = {True: "yes", False: "**NO**", None: "open"}
    rows = [(claim.text, words[claim.holds], claim.found) for claim in claims(folder)]
    text += results.markdown_table(("claim", "holds", "found"), rows)
    text += "\n## Parts\n\n" + results.markdown_table(("part", "status", "s", "note"), parts, right=(2,))
    tables = (
        ("Table 2", _table(folder, "table2"), _latency_table),
        *((BATCH_TITLES[n], _table(folder / f"batch{n}", "table2"), _latency_table) for n in (1, 8, 32)),
        ("Peers", _table(folder / "peers", "table2"), _latency_table),
        ("Table 1, dearest first", _table(folder, "table1"), _op_table),
    )
    for title, document, draw in tables:
        if document and document["rows"]:
            text += f"\n## {title}\n\n{draw(document)}"
            for name, why in (document["meta"].get("left_out") or {}).items():
                text += f"\n{name}: {why}\n"
    if gemms := _gemm_table(folder):
        text += f"\n## GEMMs\n\n{gemms}"
    if skipped := left_out_gemms(folder):
        text += "\n## GEMM candidates that were left out\n\nAll numbers are without them (`SWIN_GEMM_SKIP`).\n\n"
        text += "".join(f"- `{prefix}`: {why}\n" for prefix, why in skipped.items())
    if missing := found.get("missing"):
        text += "\n## Not installed here\n\n" + "".join(f"- {name}: {what}\n" for name, what in missing.items())
    text += "\nLogs: `logs/`. Every GEMM shape, its candidates, times and refusals: `tune_*.json`, `logs/tune.log`.\n"
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_report.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("environment", "summary"))
    parser.add_argument("folder", type=Path, help="the folder scripts/gpu_check.sh writes into")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.what == "environment":
        return write_environment(args.folder)
    results.write_text(args.folder / "summary.md", summary(args.folder))
    return 0


if __name__ == "__main__":
    run_cli(main)

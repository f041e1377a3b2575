"""Take Swin T, S, B, L, L-384 and two Swin-V2-T through every conversion and onto the engine, against the golden model.

    python scripts/check_real_sizes.py --out results/NAME

For each model, once with GELU and once without: timm's geometry with random weights of which every part matters; out to
the layouts of timm, Microsoft and Hugging Face and back, equal to the bit; calibrated on procedural images; through a
file as FasterTransformer's tool leaves it (names and scales alone) to the engine file, equal to the direct way; the
engine's logits on an image against the golden model (pyharness/reference.py, pyharness/fused_reference.py), ties
resolved as the engine did, by the bound of tests/python/test_engine.py. FasterTransformer's graph and the fused one
come from the same checkpoint. Swin-L is calibrated for int8_mode 2. Swin-V2 has no file of FasterTransformer's tool, as
its rows say. Random weights prove the conversion, and say nothing of accuracy.

Writes real_sizes.json and real_sizes.md, after every row; a run that was stopped goes on where it was as long as
options and commit are the same. The steps: scripts/real_size_steps.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import argparse
import gc
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict

from real_size_steps import SQNR_BOUND_DB, activation_of, check

from pyharness import measure
from pyharness.config import ENGINE_GRAPHS, FUSED_GRAPH
from pyharness.engine import engine_info
from pyharness.errors import run_cli
from pyharness.results import markdown_table, write_text
from pyharness.training import report

CASES = {
    "swin_tiny_patch4_window7_224": 1,
    "swin_small_patch4_window7_224": 1,
    "swin_base_patch4_window7_224": 1,
    "swin_large_patch4_window7_224": 2,
    "swin_large_patch4_window12_384": 2,
    "swinv2_tiny_window8_256": 1,
    "swinv2_tiny_window16_256": 1,
}
"""Models, and the int8_mode each is calibrated for (2 for Swin-L, as FasterTransformer's published figures), of which
the fused graph reads what it needs."""


def _text(value: float | str | None, digits: int = 1) -> str:
    """A cell: "-" for what was not measured."""
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.{digits}f}"


def _equal(value: bool | None) -> str:
    return {True: "equal", False: "DIFFERENT", None: "-"}[value]


COLUMNS = {
    "model": lambda row: row["model"],
    "graph": lambda row: row["graph"],
    "activation": lambda row: row["activation"],
    "int8_mode": lambda row: _text(None if row["graph"] == FUSED_GRAPH else row["int8_mode"], 0),
    "parameters M": lambda row: _text(row["parameters_m"]),
    "formats": lambda row: _equal(row["formats_equal"]),
    "transformers dB": lambda row: _text(row["transformers_sqnr_db"]),
    "FT file": lambda row: _equal(row["ft_file_equal"]),
    "wrong values": lambda row: _text(row["wrong_values"], 0),
    "engine dB": lambda row: _text(row["engine_sqnr_db"]),
    "own ties dB": lambda row: _text(row["engine_untied_sqnr_db"]),
    "against fp32 dB": lambda row: _text(row["fp32_sqnr_db"]),
    "engine file MB": lambda row: _text(row["engine_file_mb"], 0),
    "engine s": lambda row: _text(row["seconds"].get("engine")),
    "calibrate s": lambda row: _text(row["seconds"].get("calibrate")),
    "reference s": lambda row: _text(row["seconds"].get("reference")),
    "all s": lambda row: _text(sum(row["seconds"].values()), 0),
    "memory GB": lambda row: _text(row["peak_gb"]),
    "result": lambda row: "passed" if row["passed"] else "FAILED",
    "left out": lambda row: _text("; ".join(row["left_out"])),
}
WORDS = ("model", "graph", "activation", "formats", "FT file", "result", "left out")
"""Columns that are no numbers."""


def to_markdown(document: dict) -> str:
    """The rows as a table, and what its columns mean."""
    rows = [tuple(cell(row) for cell in COLUMNS.values()) for row in document["rows"]]
    right = [number for number, name in enumerate(COLUMNS) if name not in WORDS]
    meta = document["meta"]
    return (
        f"{markdown_table(tuple(COLUMNS), rows, right=right)}\n"
        "formats: the random model went out to timm's, Microsoft's and Hugging Face's format and came back with the "
        "same geometry, weights and logits, bit for bit. transformers: SQNR of its own float32 logits from our folder. "
        "FT file: names and scales alone, as FasterTransformer's tool leaves them, give the same engine file.\n"
        "wrong values: of all that the fused graph's operations wrote in the stages, what the golden model does not "
        "make of the inputs that the engine itself made; 0 passes. engine: SQNR of its logits on one image against the "
        f"golden model's, which follows the engine's roundings; {SQNR_BOUND_DB:g} and more passes. own ties: the same "
        "where the golden model rounds its own ties. against fp32: for random weights; it says nothing of trained "
        "ones.\n"
        "Both graphs of an activation come from one checkpoint, which was calibrated in the first of their rows. "
        "memory: the most that the process held during the row.\n"
        f"Times are of one run with {meta['threads']} CPU threads, on a machine that may have been busy.\n"
        f"Measured: {meta['device']}; torch {meta['torch']}; {meta['date'][:10]}; "
        f"commit {(meta['commit'] or '-')[:12]}.\n"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="check_real_sizes.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/local"), help="result folder (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="timm names")
    parser.add_argument("--graphs", nargs="+", choices=ENGINE_GRAPHS, default=list(ENGINE_GRAPHS))
    parser.add_argument("--calibration", type=int, default=4, help="images to calibrate on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    measure.need_positive(args, "--calibration", "--threads")
    threads = measure.set_threads(args.threads)
    target = args.out / "real_sizes.json"
    conditions = {"calibration": args.calibration, "seed": args.seed, "commit": measure.git_state()["commit"]}
    rows = _rows_of(target, conditions)
    for name in args.models:
        for activation in ("gelu", "relu"):
            wanted = [g for g in ENGINE_GRAPHS if g in args.graphs and activation in activation_of(g)]
            done = {row["graph"] for row in rows if (row["model"], row["activation"]) == (name, activation)}
            if missing := [graph for graph in wanted if graph not in done]:
                report(f"{name}, {activation}: {', '.join(missing)}")
                with tempfile.TemporaryDirectory() as folder:
                    for row in check(name, activation, missing, CASES[name], args.calibration, args.seed, Path(folder)):
                        rows.append(asdict(row))
                        _write(target, rows, {**measure.environment(engine_info(), threads), "conditions": conditions})
                gc.collect()
    print(target.with_suffix(".md").read_text(encoding="utf-8"))
    return 0 if all(row["passed"] for row in rows) else 1


def _write(target: Path, rows: list[dict], meta: dict) -> None:
    """The table, in the order of `CASES`."""
    rows.sort(key=lambda row: (list(CASES).index(row["model"]), row["activation"], row["graph"] == FUSED_GRAPH))
    document = {"meta": meta, "rows": rows}
    write_text(target, json.dumps(document, indent=2) + "\n")
    write_text(target.with_suffix(".md"), to_markdown(document))


def _rows_of(target: Path, conditions: dict) -> list[dict]:
    """Rows of an earlier run under the same conditions."""
    try:
        document = json.loads(target.read_text(encoding="utf-8"))
        return document["rows"] if document["meta"]["conditions"] == conditions else []
    except (OSError, ValueError, KeyError):
        return []


if __name__ == "__main__":
    run_cli(main)

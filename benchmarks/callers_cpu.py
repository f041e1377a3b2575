"""How many images a second a machine classifies, by how its threads are shared out: one caller whose calls use all of
them, or several callers at a time with fewer threads each. Measured with swin_run (docs/runtime.md), a process for each
arrangement, in alternation.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python put this folder on the path in the place of the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyharness import measure, results
from pyharness.config import ENGINE_GRAPHS, FUSED_GRAPH
from pyharness.errors import EngineError, run_cli
from pyharness.latency_breakdown import DEFAULT_MODEL
from pyharness.training import report

KIND = "callers_cpu"


@dataclass(frozen=True)
class CallersRow:
    """`callers` callers at a time, whose calls of `batch` images use `threads` threads each. `images_per_s`: of all
    callers together; `latency_ms`: the median call of each round; `vs_one_caller`: images a second over those of one
    caller with all threads, round by round."""

    model: str
    graph: str
    batch: int
    callers: int
    threads: int
    images_per_s: dict[str, float]
    latency_ms: dict[str, float]
    vs_one_caller: dict[str, float] | None


Round = dict[tuple[int, int], dict[str, Any]]
"""What swin_run said of each arrangement, (callers, threads of each), one after the other."""


def arrangements(threads: int) -> list[tuple[int, int]]:
    """(callers, threads of each) that share out `threads` without remainder, one caller first."""
    return [(callers, threads // callers) for callers in range(1, threads + 1) if threads % callers == 0]


def run_once(program: Path, file: Path, batch: int, callers: int, threads: int, seconds: float) -> dict[str, Any]:
    """What one run of swin_run says; EngineError where it fails."""
    words = ["--batch", batch, "--callers", callers, "--threads", threads, "--seconds", seconds, "--json"]
    done = subprocess.run([str(program), str(file), *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        raise EngineError(f"{program} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def rows_of(model: str, graph: str, batch: int, rounds: Sequence[Round]) -> list[CallersRow]:
    """One row per arrangement."""

    def name(callers: int, threads: int) -> str:
        return f"{callers}x{threads}"

    images = {name(*each): [said[each]["images_per_s"] for said in rounds] for each in rounds[0]}
    rows = []
    for callers, threads in rounds[0]:
        mine, whole = name(callers, threads), name(1, callers * threads)
        rows.append(
            CallersRow(
                model=model, graph=graph, batch=batch, callers=callers, threads=threads,
                images_per_s=measure.summarize(images[mine]).to_dict(),
                latency_ms=measure.summarize(
                    [said[callers, threads]["latency_ms"]["median"] for said in rounds]
                ).to_dict(),
                vs_one_caller=None if callers == 1 else measure.paired_ratio(images, mine, whole).to_dict(),
            )
        )  # fmt: skip
    return rows


def markdown(document: dict[str, Any]) -> str:
    """The table, and how it was measured."""

    def spread(stats: dict[str, float]) -> str:
        return " to ".join(results.number(stats[key], 1) for key in ("p10", "p90"))

    table = results.markdown_table(
        ("model", "graph", "batch", "callers x threads", "images/s (p10 to p90)", "a call, ms", "against one caller"),
        [
            (
                row["model"], row["graph"], str(row["batch"]), f"{row['callers']} x {row['threads']}",
                f"{results.number(row['images_per_s']['median'], 1)} ({spread(row['images_per_s'])})",
                results.milliseconds(row["latency_ms"]["median"]),
                f"{results.number(row['vs_one_caller']['median'])}x" if row["vs_one_caller"] else "",
            )
            for row in document["rows"]
        ],
        right=(2, 3, 4, 5, 6),
    )  # fmt: skip
    meta = document["meta"]
    return (
        f"{table}\nimages/s: of all callers together, median of {meta['rounds']} rounds of {meta['seconds']:g} s each, "
        f"the arrangements of a model in alternation. Last column: median of the ratios within rounds.\n\n"
        f"{results.conditions(meta)}.\n"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="callers_cpu.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="timm name (default: %(default)s)")
    parser.add_argument("--graph", choices=ENGINE_GRAPHS, default=FUSED_GRAPH, help="default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="N", help="of a call (default: 1 8)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads in all (default: PyTorch's choice)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2, metavar="S", help="of each run (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=results.ROOT / "results" / "local", metavar="DIR",
        help="folder of callers_cpu.json, .csv and .md (default: results/local)",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    measure.need_positive(args, "--threads", "--rounds")
    for batch in args.batch:
        measure.need_positive(argparse.Namespace(batch=batch), "--batch")
    measure.need_above_zero(args, "--seconds")
    from pyharness import engine
    from pyharness.c_library import program_path
    from pyharness.engine_file import save_engine_file
    from pyharness.models import config_of, create_model
    from pyharness.random_engine import random_engine_file

    threads, program = measure.set_threads(args.threads), program_path()
    meta = {**measure.environment(engine.engine_info(), threads), "rounds": args.rounds, "seconds": args.seconds}
    config = config_of(create_model(args.model), args.model)
    rows: list[CallersRow] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.engine.safetensors"
        save_engine_file(file, random_engine_file(config, args.graph))
        for batch in args.batch:
            report(f"{args.model}, {args.graph}, batch {batch}: {args.rounds} rounds")
            rounds = [
                {each: run_once(program, file, batch, *each, args.seconds) for each in arrangements(threads)}
                for _ in range(args.rounds)
            ]
            rows += rows_of(args.model, args.graph, batch, rounds)
    print(markdown(results.write_table(args.out, KIND, meta, rows, CallersRow, markdown)))
    return 0


if __name__ == "__main__":
    run_cli(main)

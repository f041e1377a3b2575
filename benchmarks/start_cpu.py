"""What a model costs before its first result, and per call: the C library (docs/runtime.md) beside the torch extension.

Each round starts two processes, one after the other, that load the same engine file, classify one image and end:
`swin_run`, and a Python that imports PyTorch and pyharness. Time is from the start of a process to its end, memory the
most resident memory that it held. Then both libraries, in this process, are timed in alternation.
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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyharness import measure, results
from pyharness.config import ENGINE_GRAPHS, FUSED_GRAPH
from pyharness.errors import EngineError, run_cli
from pyharness.latency_breakdown import DEFAULT_MODEL
from pyharness.training import report

KIND = "start_cpu"
C_LIBRARY, TORCH_EXTENSION = "c_library", "torch_extension"
TORCH_PROGRAM = """
import json, sys, numpy, torch
from pyharness.engine import SwinInt8
torch.set_num_threads(int(sys.argv[3]))
with torch.inference_mode():
    print(SwinInt8.from_file(sys.argv[1])(torch.from_numpy(numpy.load(sys.argv[2]))).argmax(1).item())
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"peak_mb": int(status["VmHWM"].split()[0]) * 1024 / 1e6}))
"""
"""As swin_run: its last line says the most memory it held, by the system's count of this program alone."""


@dataclass(frozen=True)
class StartRow:
    """One way to run one model. `process_ms`: from the start of a process to its end, one image classified in between;
    `peak_mb`: the most resident memory that such a process held, median; `latency_ms`: of a call."""

    model: str
    graph: str
    batch: int
    threads: int
    method: str
    process_ms: dict[str, float]
    peak_mb: float
    latency_ms: dict[str, float]
    latency_vs_torch: dict[str, float] | None


def run_process(command: Sequence[str]) -> tuple[float, float]:
    """(milliseconds from start to end, most resident memory in MB) of a process whose last line is JSON that says
    `peak_mb`; EngineError where it fails."""
    started = time.perf_counter_ns()
    done = subprocess.run(command, capture_output=True, text=True, cwd=measure.ROOT)
    elapsed = (time.perf_counter_ns() - started) / 1e6
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()[-500:]
        raise EngineError(f"`{command[0]}` ended with {done.returncode}: {said}")
    return elapsed, json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def time_processes(commands: dict[str, Sequence[str]], rounds: int) -> tuple[measure.Samples, measure.Samples]:
    """Milliseconds and MB of each command, one process each a round. The first round, which fills the disk's cache,
    does not count."""
    times: measure.Samples = {name: [] for name in commands}
    memory: measure.Samples = {name: [] for name in commands}
    for index in range(-1, rounds):
        for name, command in commands.items():
            ms, mb = run_process(command)
            if index >= 0:
                times[name].append(ms)
                memory[name].append(mb)
    return times, memory


def markdown(document: dict[str, Any]) -> str:
    """The table, and how it was measured."""

    def call(row: dict[str, Any]) -> str:
        median, p10, p90 = (results.milliseconds(row["latency_ms"][key]) for key in ("median", "p10", "p90"))
        return f"{median} ({p10} to {p90})"

    table = results.markdown_table(
        ("model", "graph", "run by", "process ms", "peak MB", "a call, ms (p10 to p90)", "against torch_extension"),
        [
            (
                row["model"], row["graph"], row["method"], results.milliseconds(row["process_ms"]["median"]),
                results.number(row["peak_mb"], 0), call(row),
                results.percent_change(row["latency_vs_torch"]["median"]) if row["latency_vs_torch"] else "",
            )
            for row in document["rows"]
        ],
        right=(3, 4, 5, 6),
    )  # fmt: skip
    meta = document["meta"]
    return (
        f"{table}\nprocess: start, load the file, classify one image, end; medians of {meta['rounds']} rounds. peak: "
        f"the most memory of such a process. A call: batch {meta['batch']}, in one process, in alternation; last "
        f"column: median of the ratios within rounds.\n\n{results.conditions(meta)}.\n"
    )


def measure_model(name: str, graph: str, args: argparse.Namespace, threads: int) -> list[StartRow]:
    """Both rows of one model with random weights."""
    import torch

    from pyharness.c_library import CModel, options, program_path
    from pyharness.engine import SwinInt8
    from pyharness.engine_file import save_engine_file
    from pyharness.models import config_of, create_model
    from pyharness.random_engine import random_engine_file

    config = config_of(create_model(name), name)
    images = measure.random_images(config, args.batch)
    with tempfile.TemporaryDirectory() as folder:
        file, one_image = Path(folder) / "model.engine.safetensors", Path(folder) / "image.npy"
        save_engine_file(file, random_engine_file(config, graph))
        np.save(one_image, images[:1].numpy())
        which, where, how_many = str(file), str(one_image), str(threads)
        commands = {
            C_LIBRARY: [str(program_path()), which, "--images", where, "--threads", how_many, "--json"],
            TORCH_EXTENSION: [sys.executable, "-c", TORCH_PROGRAM, which, where, how_many],
        }
        report(f"{name}, {graph}: {args.rounds} rounds of two processes")
        times, memory = time_processes(commands, args.rounds)
        report(f"{name}, {graph}: {args.runs} rounds of calls")
        reference = SwinInt8.from_file(file)
        with CModel(file, options(threads=threads)) as model, torch.inference_mode():
            if not np.array_equal(model.forward(images.numpy()), reference(images).numpy()):
                raise EngineError(f"{name}, {graph}: the libraries' logits differ; build both anew, from one commit")
            pixels = images.numpy()
            calls = {C_LIBRARY: lambda: model.forward(pixels), TORCH_EXTENSION: lambda: reference(images)}
            samples = measure.time_alternating(calls, args.runs)
    versus = {C_LIBRARY: measure.paired_ratio(samples, C_LIBRARY, TORCH_EXTENSION).to_dict(), TORCH_EXTENSION: None}
    return [
        StartRow(
            model=name, graph=graph, batch=args.batch, threads=threads, method=method,
            process_ms=measure.summarize(times[method]).to_dict(), peak_mb=measure.quantile(memory[method], 0.5),
            latency_ms=measure.summarize(samples[method]).to_dict(), latency_vs_torch=versus[method],
        )
        for method in commands
    ]  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="start_cpu.py", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--models", nargs="+", default=[DEFAULT_MODEL], metavar="NAME", help=f"timm names (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--graph", choices=ENGINE_GRAPHS, default=FUSED_GRAPH, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images of the timed calls (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="processes of each kind (default: 10)")
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="rounds of calls (default: 200)")
    parser.add_argument(
        "--out", type=Path, default=results.ROOT / "results" / "local", metavar="DIR",
        help="folder of start_cpu.json, .csv and .md (default: results/local)",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    measure.need_positive(args, "--batch", "--threads", "--rounds", "--runs")
    from pyharness import engine

    threads = measure.set_threads(args.threads)
    meta = {**measure.environment(engine.engine_info(), threads), "batch": args.batch, "rounds": args.rounds}
    rows = [row for name in args.models for row in measure_model(name, args.graph, args, threads)]
    print(markdown(results.write_table(args.out, KIND, meta, rows, StartRow, markdown)))
    return 0


if __name__ == "__main__":
    run_cli(main)

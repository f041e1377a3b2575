"""Table 1 of the seed paper: what each fused operation costs, in both of its graphs, and in the fused graph of ours.

Three views of each operation: the drop in latency when it is left out (the paper's measure), its time when it runs by
itself, and what the machine's measured ceilings would allow for the bytes and operations it needs (a roofline).
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyharness import gpu, measure, results
from pyharness.config import ENGINE_GRAPHS
from pyharness.distributed import need_one_process
from pyharness.errors import run_cli
from pyharness.pipeline import Inputs, Pipeline
from pyharness.reproduce_table2 import (
    CPU,
    DEFAULT_BATCH,
    add_device_option,
    add_file_options,
    add_weight_scales_option,
    names_that_run,
    weight_scales_of,
)
from pyharness.results import FUSED_GRAPH_OPS, Table1Row
from pyharness.training import report

if TYPE_CHECKING:
    from pyharness.engine import OpInfo, SwinInt8

DEFAULT_MODEL = "swin_tiny_patch4_window7_224"
DEFAULT_RUNS = {"cuda": 1000, "cpu": 30}
DIRECT_RUNS = {"cuda": 100, "cpu": 10}

WHOLE = "whole"
"""Key of the complete graph among the samples; the others are names of left-out ops."""


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do at most, measured: bytes read plus written, s8 GEMM and f32 operations per second."""

    copy_gb_s: float
    s8_gop_s: float
    f32_gflop_s: float

    @staticmethod
    def of(measured: Mapping[str, float]) -> Ceilings:
        """From `engine.measure_ceilings`; the GEMM's is the highest of its integer dot products."""
        integer = max(value for name, value in measured.items() if name.endswith("_gop_s"))
        return Ceilings(measured["copy_gb_s"], integer, measured["f32_gflop_s"])

    def highest(self, other: Ceilings) -> Ceilings:
        """The higher of both, figure by figure."""
        return Ceilings(*(max(pair) for pair in zip(astuple(self), astuple(other))))

    def bound_ms(self, op: OpInfo) -> tuple[float, str]:
        """The least milliseconds that `op` can take, and the ceiling ("copy", "s8" or "f32") that sets it."""
        integer = op.kind == "gemm" or op.name in FUSED_GRAPH_OPS
        arithmetic = ("s8", self.s8_gop_s) if integer else ("f32", self.f32_gflop_s)
        bounds = (
            ((op.bytes_read + op.bytes_written) / self.copy_gb_s / 1e6, "copy"),
            (op.operations / arithmetic[1] / 1e6, arithmetic[0]),
        )
        return max(bounds)


@torch.inference_mode()
def time_without(
    engine: SwinInt8, images: Tensor, ops: Sequence[str], runs: int, limit_s: float | None = None
) -> measure.Samples:
    """Rounds of the whole graph and of the graph without each of `ops`, in alternation; images f32 [B, C, H, W].

    On a GPU it is the device's own time (gpu.CudaTimer, queued): the whole graph replays a recording, the others are
    launched one operation after the other, and launching must not count.
    """
    calls = {WHOLE: functools.partial(engine, images)}
    calls |= {op: functools.partial(engine.forward_without, images, [op]) for op in ops}
    timing = gpu.timing_of(images.device, len(images), queued=True)
    return measure.time_alternating(calls, runs, limit_s=limit_s, **timing)


@dataclass(frozen=True)
class GraphTiming:
    """One graph's ops in order, the milliseconds of each by itself, and what `time_without` gave."""

    ops: Sequence[OpInfo]
    direct_ms: Sequence[float]
    samples: measure.Samples


def rows_of(timing: GraphTiming, ceilings: Ceilings, model: str, batch: int, graph: str) -> list[Table1Row]:
    """One row per operation name, its calls summed: fused ops in the order of the graph, then the others by time."""
    ops, direct_ms, samples = timing.ops, timing.direct_ms, timing.samples
    whole, direct_total = measure.summarize(samples[WHOLE]).median, sum(direct_ms)
    rows = []
    for name in dict.fromkeys(op.name for op in ops):
        calls = [(op, ms) for op, ms in zip(ops, direct_ms, strict=True) if op.name == name]
        direct = sum(ms for _, ms in calls)
        bounds = [ceilings.bound_ms(op) for op, _ in calls]
        drop = measure.paired_drop(samples, WHOLE, name) if name in samples else None
        rows.append(
            Table1Row(
                model=model,
                batch=batch,
                graph=graph,
                op=name,
                kind=calls[0][0].kind,
                calls=len(calls),
                drop_ms=drop and drop.median,
                drop_ms_quartiles=drop and (drop.q25, drop.q75),
                share=drop and drop.median / whole,
                direct_ms=direct,
                direct_share=direct / direct_total,
                bytes_read=sum(op.bytes_read for op, _ in calls),
                bytes_written=sum(op.bytes_written for op, _ in calls),
                operations=sum(op.operations for op, _ in calls),
                ceiling=max(bounds)[1],
                ceiling_share=sum(ms for ms, _ in bounds) / direct if direct > 0 else None,
            )
        )
    return sorted(rows, key=lambda row: (row.kind != "fused", 0.0 if row.kind == "fused" else -row.direct_ms))


def time_graph(
    pipeline: Pipeline,
    graph: str,
    batch: int,
    runs: int,
    direct_runs: int,
    device: torch.device = CPU,
    limit_s: float | None = None,
) -> GraphTiming:
    """Time one graph: whole, without each fused op, and each op by itself."""
    from pyharness.engine import SwinInt8

    engine = SwinInt8.from_engine_file(pipeline.engine_file(graph)).to(device)
    images = measure.random_images(pipeline.config, batch).to(device)
    ops = engine.ops(batch)
    fused = list(dict.fromkeys(op.name for op in ops if op.kind == "fused"))
    report(f"{graph}: leave out each of {len(fused)} fused operations in turn, {runs} rounds, batch {batch}")
    samples = time_without(engine, images, fused, runs, limit_s)
    return GraphTiming(ops, engine.time_ops(images, direct_runs), samples)


# --- The program ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latency_breakdown.py",
        description="Table 1: for each fused operation the latency drop when it is left out, its time by itself and "
        "its distance from the machine's ceilings, in the FT graph, the GELU-less one and the fused one.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="timm name, weights random (default: %(default)s)")
    add_device_option(parser)
    add_weight_scales_option(parser)
    parser.add_argument("--batch", type=int, metavar="N", help="images per call (default: 128 on a GPU, 1 on a CPU)")
    parser.add_argument(
        "--runs", type=int, metavar="N",
        help=f"timed rounds (default: {DEFAULT_RUNS['cuda']} on a GPU, {DEFAULT_RUNS['cpu']} on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=int, metavar="S", help="begin no round after S seconds of each graph (default: no limit)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add_file_options(parser, "table1.json, .csv, .md and .png")
    return parser


def measured_ceilings(threads: int, device: torch.device = CPU) -> Ceilings:
    """What the machine reaches now. A neighbour can only lower it, so the highest of several is the ceiling."""
    from pyharness.engine import measure_ceilings

    report("measure the machine's ceilings: copying, s8 GEMM, f32 arithmetic")
    found: Mapping[str, float] = measure_ceilings(threads) if device.type == "cpu" else gpu.measure_ceilings(device)
    return Ceilings.of(found)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    need_one_process()
    measure.need_positive(args, "--batch", "--runs", "--threads", "--seconds")
    device = gpu.use_device(args.device)
    threads, info = measure.set_threads(args.threads), gpu.engine_info_on(device)
    batch, runs = args.batch or DEFAULT_BATCH[device.type], args.runs or DEFAULT_RUNS[device.type]
    scales, direct_runs = weight_scales_of(args, info), DIRECT_RUNS[device.type]
    pipeline = Pipeline(Inputs(args.model, weight_scales=scales), args.work)
    ceilings = measured_ceilings(threads, device)
    timings: dict[str, GraphTiming] = {}

    def write(ceilings: Ceilings) -> dict[str, Any]:
        rows = [row for graph, timing in timings.items() for row in rows_of(timing, ceilings, args.model, batch, graph)]
        latency = {graph: measure.summarize(timing.samples[WHOLE]).to_dict() for graph, timing in timings.items()}
        meta = {**measure.environment(info, threads), "latency_ms": latency, "ceilings": asdict(ceilings)}
        meta["weight_scales"] = scales
        return results.write_table(args.out, "table1", meta | gpu.conditions_on(device, meta["device"]), rows)

    for graph in names_that_run(ENGINE_GRAPHS, device, pipeline.config.version):
        timings[graph] = time_graph(pipeline, graph, batch, runs, direct_runs, device, args.seconds)
        write(ceilings)  # who stops it keeps what it has
    document = write(ceilings.highest(measured_ceilings(threads, device)))
    from pyharness.plots import plot_breakdown

    plot_breakdown(document, args.out / "table1.png")
    print(f"\nTable 1\n\n{results.markdown_table1(document)}")
    print("Written:", ", ".join(str(path) for path in sorted(args.out.glob("table1.*"))))
    return 0


if __name__ == "__main__":
    run_cli(main)

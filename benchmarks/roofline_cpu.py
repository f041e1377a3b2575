"""How far each operation of the engine is from what this CPU can do at most, for each instruction set: a roofline.

The ceilings (integer dot products in registers, f32 arithmetic, copying) are measured in the same run, in alternation
with passes over a graph's operations, each timed by itself. An operation's bound is the larger of its bytes over the
copy bandwidth and its arithmetic over the ceiling of its kind.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python put this folder on the path in the place of the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pyharness import measure, results
from pyharness.config import ENGINE_GRAPHS, FUSED_GRAPH, WEIGHT_SCALES
from pyharness.errors import EngineError, run_cli
from pyharness.latency_breakdown import DEFAULT_MODEL, Ceilings
from pyharness.training import report

if TYPE_CHECKING:
    from pyharness.engine import OpInfo

KIND = "roofline_cpu"
DEFAULT_RUNS = 20
GEMM_KIND = "gemm"
FOR_AVX2 = {f"{FUSED_GRAPH}_{scales}": scales for scales in WEIGHT_SCALES if scales != "channel"}
"""Weight scales by the names of the fused graph with those that AVX2's GEMM gains by (docs/epilogues.md)."""


def is_gemm(kind: str, op: str) -> bool:
    """Whether an operation is a GEMM, alone or with what the fused graph does to its result."""
    return kind == GEMM_KIND or op in results.FUSED_GRAPH_OPS



@dataclass(frozen=True)
class RooflineRow:
    """One operation of one graph, its calls in a forward pass summed.

    `direct_ms`: timed by itself; `bound_ms`: the least time that the ceilings allow, `ceiling` the one that sets most
    of it ("copy", "s8" or "f32"), `ceiling_share` bound over time. `intensity`: operations per byte read or written;
    `attained_gop_s`: operations over time; a multiply-add counts as two.
    """

    model: str
    batch: int
    threads: int
    isa: str
    graph: str
    op: str
    kind: str
    calls: int
    bytes_read: int
    bytes_written: int
    operations: int
    direct_ms: float
    bound_ms: float
    ceiling: str
    ceiling_share: float | None
    intensity: float
    attained_gop_s: float | None


@dataclass(frozen=True)
class Conditions:
    """Of what rows are made: fields of the same name."""

    model: str
    batch: int
    threads: int
    isa: str
    graph: str


def rows_of(ops: Sequence[OpInfo], direct_ms: Sequence[float], ceilings: Ceilings, of: Conditions) -> list[RooflineRow]:
    """One row per operation name, the longest first."""
    rows = []
    for name in dict.fromkeys(op.name for op in ops):
        calls = [(op, ms) for op, ms in zip(ops, direct_ms, strict=True) if op.name == name]
        direct, bounds = sum(ms for _, ms in calls), [ceilings.bound_ms(op) for op, _ in calls]
        by_ceiling = {kind: sum(ms for ms, k in bounds if k == kind) for _, kind in bounds}
        operations = sum(op.operations for op, _ in calls)
        read, written = sum(op.bytes_read for op, _ in calls), sum(op.bytes_written for op, _ in calls)
        bound = sum(ms for ms, _ in bounds)
        rows.append(
            RooflineRow(
                **dataclasses.asdict(of),
                op=name,
                kind=calls[0][0].kind,
                calls=len(calls),
                bytes_read=read,
                bytes_written=written,
                operations=operations,
                direct_ms=direct,
                bound_ms=bound,
                ceiling=max(by_ceiling, key=lambda kind: by_ceiling[kind]),
                ceiling_share=bound / direct if direct > 0 else None,
                intensity=operations / max(1, read + written),
                attained_gop_s=operations / direct / 1e6 if direct > 0 else None,
            )
        )
    return sorted(rows, key=lambda row: -row.direct_ms)


@dataclass(frozen=True)
class Round:
    """Milliseconds of each operation in one pass, and the ceilings as they were then."""

    direct_ms: Sequence[float]
    ceilings: Mapping[str, float]


def time_rounds(
    time_ops: Callable[[], Sequence[float]], measure_ceilings: Callable[[], Mapping[str, float]], runs: int
) -> list[Round]:
    """`runs` passes over all operations, each between two measurements of the ceilings, whose mean is the round's: what
    a neighbour takes from the one it takes from the other."""
    rounds, before = [], measure_ceilings()
    for _ in range(runs):
        direct_ms, after = time_ops(), measure_ceilings()
        rounds.append(Round(direct_ms, {name: (value + after[name]) / 2 for name, value in before.items()}))
        before = after
    return rounds


def median_times(rounds: Sequence[Round]) -> list[float]:
    """Of each operation, over the rounds; milliseconds."""
    return [statistics.median(times) for times in zip(*(entry.direct_ms for entry in rounds), strict=True)]


def shares_of_ceilings(ops: Sequence[OpInfo], rounds: Sequence[Round]) -> dict[str, float]:
    """What all GEMMs together attain over each integer ceiling (names ending in `_gop_s`): the median of the rounds."""
    gemms = [i for i, op in enumerate(ops) if is_gemm(op.kind, op.name)]
    operations = sum(ops[i].operations for i in gemms)
    shares: dict[str, list[float]] = {}
    for entry in rounds:
        milliseconds = sum(entry.direct_ms[i] for i in gemms)
        for name, value in entry.ceilings.items():
            if name.endswith("_gop_s") and value > 0 and milliseconds > 0:
                shares.setdefault(name, []).append(operations / milliseconds / 1e6 / value)
    return {name: statistics.median(found) for name, found in shares.items()}


def gemm_summary(rows: Sequence[RooflineRow], of_ceiling: Mapping[str, float]) -> dict[str, Any]:
    """All GEMMs of one graph together: their milliseconds and share of all ops' time, the GOP/s they attain, their
    shares of the integer ceilings (shares_of_ceilings), and their bounds over their time. Zeros where there is none."""
    gemms = [row for row in rows if is_gemm(row.kind, row.op)]
    milliseconds, total = sum(row.direct_ms for row in gemms), sum(row.direct_ms for row in rows)
    attained = sum(row.operations for row in gemms) / milliseconds / 1e6 if milliseconds > 0 else 0.0
    return {
        "gemm_ms": milliseconds,
        "time_share": milliseconds / total if total > 0 else 0.0,
        "attained_gop_s": attained,
        "bound_share": sum(row.bound_ms for row in gemms) / milliseconds if milliseconds > 0 else 0.0,
        "of_ceiling": dict(of_ceiling),
    }


# --- the table -------------------------------------------------------------------------------------------------------


_PAIRED = (
    "The shares of them are medians of {} rounds, each over the ceilings measured right before and after it; beside "
    "them the highest of the run. "
)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def markdown(document: Mapping[str, Any]) -> str:
    """The summary of the GEMMs and the ceilings, then every operation."""
    meta, rows = document["meta"], document["rows"]
    lines = []
    for entry in meta["summary"]:
        ceilings, gemm = meta["ceilings"][entry["isa"]], entry["gemms"]
        exact = ", ".join(
            f"{name.removesuffix('_gop_s')} {_percent(share)} of {ceilings[name]:.0f}"
            for name, share in gemm["of_ceiling"].items()
        )
        lines.append(
            (
                entry["isa"], entry["graph"], str(entry["batch"]), f"{ceilings['copy_gb_s']:.1f}",
                f"{ceilings['f32_gflop_s']:.0f}", results.milliseconds(gemm["gemm_ms"]), _percent(gemm["time_share"]),
                f"{gemm['attained_gop_s']:.0f}", exact, _percent(gemm["bound_share"]),
            )
        )  # fmt: skip
    header = (
        "isa", "graph", "batch", "copy GB/s", "f32 GFLOP/s", "GEMMs ms", "of all ops", "GEMM GOP/s",
        "of the integer ceilings, GOP/s", "of the roofline",
    )  # fmt: skip
    text = results.markdown_table(header, lines, right=range(2, len(header)))
    text += (
        "\nGEMMs: all of a forward pass together, each timed by itself. Ceilings: the engine's own integer dot "
        "products in registers only, measured in the same run: s8, of any input; u8, of inputs within 0..127; "
        "grouped, AVX2's for weights that allow full groups (docs/epilogues.md), which is how a GEMM can pass the s8 "
        f"ceiling there. {_PAIRED.format(meta['rounds']) if 'rounds' in meta else ''}"
        "Of the roofline: the least time that the highest of them and the copy bandwidth allow, over the time taken.\n"
        f"\nMeasured: {meta['model']}; {results.conditions(meta)}.\n"
    )
    text += f"{results.REST_OF_FILE}operations\n"
    for isa, graph, batch in dict.fromkeys((row["isa"], row["graph"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["isa"], row["graph"], row["batch"]) == (isa, graph, batch)]
        table = results.markdown_table(
            ("op", "kind", "calls", "ms", "bound ms", "of bound", "set by", "op/byte", "GOP/s"),
            [
                (
                    row["op"], row["kind"], str(row["calls"]), results.milliseconds(row["direct_ms"]),
                    results.milliseconds(row["bound_ms"]), _percent(row["ceiling_share"]), row["ceiling"],
                    results.number(row["intensity"], 1), results.number(row["attained_gop_s"], 1),
                )
                for row in mine
            ],
            right=(2, 3, 4, 5, 7, 8),
        )  # fmt: skip
        text += f"\n`{graph}` on {isa}, batch {batch}:\n\n{table}"
    return f"{text}\nOver 100 % the data came from the caches, which are faster than a large copy.\n"


def write(folder: Path, meta: Mapping[str, Any], rows: Sequence[RooflineRow]) -> dict[str, Any]:
    """Write `<folder>/roofline_cpu.json`, `.csv` and `.md`; returns the validated document."""
    return results.write_table(folder, KIND, meta, rows, RooflineRow, markdown)


# --- the picture -----------------------------------------------------------------------------------------------------

KIND_STYLES = {
    "gemm": ("GEMM", "#0072B2", "o"),
    "fused": ("fused operation (attention: its GEMMs within)", "#D55E00", "s"),
    "float": ("other operation", "#009E73", "D"),
}
"""Label, colour and marker by kind, as Table 1 has it: attention is a fused operation here, though its GEMMs count
among the GEMMs of the summary."""
SAME_HEIGHT = 1.1
"""Ceilings no further apart share a label in the picture."""
LABELLED = 0.03
"""Operations with at least this share of the time have their name in the picture."""


COPY = "copy"
"""Marks the name of the copy bandwidth's line among the texts of a panel."""


def _area(row: Mapping[str, Any], whole: float) -> float:
    """Of an operation's marker, in square points, by its share of the time of all."""
    return 30 + 700 * row["direct_ms"] / whole


def ceiling_labels(ceilings: Mapping[str, float]) -> list[tuple[str, float]]:
    """A label for each ceiling and its height; one for those that would lie on each other, as AMX's s8 and u8 do."""
    groups: list[dict[str, float]] = []
    for name, value in sorted(ceilings.items(), key=lambda item: -item[1]):
        if not groups or max(groups[-1].values()) > SAME_HEIGHT * value:
            groups.append({})
        groups[-1][name.removesuffix("_gop_s").removesuffix("_gflop_s")] = value
    return [(f"{', '.join(group)} {max(group.values()):.0f} GOP/s", max(group.values())) for group in groups]


def _name_ceilings(axis: Any, labels: Sequence[tuple[str, float]], end: float, gap: float) -> None:
    """Names right of the lines' ends, in turn from the highest, at least `gap` decades apart."""
    y = math.inf
    for label, value in labels:
        y = min(y - gap, math.log10(value))
        axis.annotate(
            label, (end, value), xytext=(end * 1.6, 10**y), ha="left", va="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#666666", "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""


def free_place(
    point: tuple[float, float], radius: float, size: tuple[float, float], within: Box, discs: Any, strokes: Any,
    names: Any = (), leaders: Any = (),
) -> Box:  # fmt: skip
    """The box of a label of this `size` nearest to a disc that lies on none of the `discs` and other `names` (boxes
    [n, 4]) and on no point of `strokes` [n, 2], and whose line from the disc crosses no name, none of the other names'
    lines (`leaders` [n, 4]) and few discs; pixels. Where there is none, the one that does so least. The disc itself may
    be among `discs`."""
    import numpy as np

    turns = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    turn, gap = (axis.ravel() for axis in np.meshgrid(turns, np.arange(5.0, 160.0, 5.0)))
    half = np.array(size) / 2
    reach = (radius + gap)[:, None] + half
    middle = np.array(point) + reach * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    low, high = middle - half, middle + half
    outside = (low < within[:2]).any(1) | (high > within[2:]).any(1)

    boxes = np.concatenate([np.asarray(some, dtype=float).reshape(-1, 4) for some in (discs, names)])
    x0, y0, x1, y1 = boxes.T[:, None]
    covered = (low[:, :1] < x1) & (high[:, :1] > x0) & (low[:, 1:] < y1) & (high[:, 1:] > y0)
    stroke = np.asarray(strokes, dtype=float).reshape(1, -1, 2)
    struck = ((stroke > low[:, None] - 3) & (stroke < high[:, None] + 3)).all(2).any(1)
    # The line's first part is on the disc, where others may lie that share the place.
    along = np.linspace(0, 1, 24)[None, :, None] * (middle - point)[:, None] + np.array(point)
    there = np.hypot(*(along - point).transpose(2, 0, 1)) > radius + 2
    x, y = along[..., :1], along[..., 1:]
    inside = (x > x0) & (x < x1) & (y > y0) & (y < y1) & there[..., None]
    crossed = 4 * inside[..., : len(discs)].any(2).sum(1) + 80 * inside[..., len(discs) :].any((1, 2))

    def side(ax: Any, ay: Any, bx: Any, by: Any, cx: Any, cy: Any) -> Any:
        return (bx - ax) * (cy - ay) > (by - ay) * (cx - ax)

    lines = np.asarray(leaders, dtype=float).reshape(-1, 4)
    ends, p, (mx, my) = [lines[None, :, k] for k in range(4)], point, (middle[:, :1], middle[:, 1:])
    apart = side(*p, mx, my, *ends[:2]) != side(*p, mx, my, *ends[2:])
    over = (apart & (side(*ends, *p) != side(*ends, mx, my))).sum(1)

    worse = 1e4 * outside + 1000 * covered.sum(1) + 500 * struck + crossed + 40 * over
    best = np.argmin(worse + gap + 4 * (np.cos(turn) < 0))  # to the right where both are free
    return (*low[best], *high[best])


def _place_labels(axis: Any, rows: Sequence[Mapping[str, Any]], labelled: Sequence[Mapping[str, Any]]) -> None:
    """Names of `labelled` beside their points, clear of each other, of all points and of the lines. The figure must
    have been laid out."""
    import numpy as np

    per_point = axis.figure.dpi / 72
    frame = axis.get_window_extent()
    spots = {row["op"]: axis.transData.transform((row["intensity"], row["attained_gop_s"])) for row in rows}
    whole = sum(row["direct_ms"] for row in rows)
    radii = {row["op"]: math.sqrt(_area(row, whole)) / 2 * per_point for row in rows}
    discs = [(x - radii[op], y - radii[op], x + radii[op], y + radii[op]) for op, (x, y) in spots.items()]
    names = [text.get_window_extent().padded(2).extents for text in axis.texts if text.get_gid() == COPY]
    strokes = np.concatenate([axis.transData.transform(line.get_xydata()) for line in axis.lines])
    leaders: list[Box] = []
    for row in sorted(labelled, key=lambda row: -row["attained_gop_s"]):
        op = row["op"]
        label = axis.text(0, 0, op, fontsize=7.5)
        size = (label.get_window_extent().width + 3, label.get_window_extent().height + 2)
        label.remove()
        box = free_place(tuple(spots[op]), radii[op], size, frame.padded(-2).extents, discs, strokes, names, leaders)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        names.append((box[0] - 4, box[1] - 1, box[2] + 4, box[3] + 1))
        leaders.append((*spots[op], *middle))
        strokes = np.concatenate([strokes, np.linspace(spots[op], middle, 60)])  # later names keep clear of this line
        axis.annotate(
            op, (row["intensity"], row["attained_gop_s"]), xytext=axis.transData.inverted().transform(middle),
            fontsize=7.5, ha="center", va="center", in_layout=False,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#333333", "shrinkA": 0, "shrinkB": 0},
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.7}, zorder=4,
        )  # fmt: skip
        axis.plot(row["intensity"], row["attained_gop_s"], ".", color="#333333", markersize=2, zorder=4)


def plot(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw `roofline_cpu_b<batch>.png`: a panel for each graph and instruction set; returns the files drawn."""
    import numpy as np
    from matplotlib.lines import Line2D

    from pyharness import plots
    from pyharness.glance import device_title

    plt, meta, drawn = plots.pyplot(), document["meta"], []
    rows = [row for row in document["rows"] if row["attained_gop_s"] and row["operations"]]
    for batch in dict.fromkeys(row["batch"] for row in rows):
        of_batch = [row for row in rows if row["batch"] == batch]
        lowest_point = min(row["attained_gop_s"] for row in of_batch)
        highest = max(value for found in meta["ceilings"].values() for value in found.values())
        graphs, variants = (list(dict.fromkeys(row[name] for row in of_batch)) for name in ("graph", "isa"))
        figure, axes = plt.subplots(
            len(graphs), len(variants), figsize=(5.6 * len(variants), 4.3 * len(graphs) + 1.0), squeeze=False,
            sharex=True, sharey=True, layout="constrained",
        )  # fmt: skip
        panels, kinds = [], set()
        for (i, graph), (j, isa) in ((g, v) for g in enumerate(graphs) for v in enumerate(variants)):
            axis, ceilings = axes[i][j], meta["ceilings"][isa]
            mine = [row for row in of_batch if (row["graph"], row["isa"]) == (graph, isa)]
            axis.set_visible(bool(mine))
            whole = sum(row["direct_ms"] for row in mine)
            x = np.logspace(-1, 4.3, 200)
            arithmetic = {name: value for name, value in ceilings.items() if name != "copy_gb_s"}
            for name, value in arithmetic.items():
                dash = "--" if name == "f32_gflop_s" else "-"
                axis.plot(x, np.minimum(x * ceilings["copy_gb_s"], value), dash, color="#444444", linewidth=1.1)
            _name_ceilings(axis, ceiling_labels(arithmetic), x[-1], 0.05 * math.log10(highest / lowest_point))
            axis.annotate(
                f"copy {ceilings['copy_gb_s']:.1f} GB/s", (5, 5 * ceilings["copy_gb_s"]), xytext=(-6, 6),
                textcoords="offset points", ha="right", fontsize=8, gid=COPY,
            )  # fmt: skip
            for kind, (_, colour, marker) in KIND_STYLES.items():
                some = [row for row in mine if row["kind"] == kind]
                axis.scatter(
                    [r["intensity"] for r in some], [r["attained_gop_s"] for r in some], marker=marker, color=colour,
                    s=[_area(r, whole) for r in some], alpha=0.75, edgecolors="white", zorder=3,
                )  # fmt: skip
            kinds |= {row["kind"] for row in mine}
            panels.append((axis, mine, [row for row in mine if row["direct_ms"] >= LABELLED * whole]))
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(alpha=0.25, which="major")
            axis.set_title(f"{graph}, {isa}", fontsize=11)
            if j == 0:
                axis.set_ylabel("GOP/s attained")
        for j in range(len(variants)):
            lowest = [axes[i][j] for i in range(len(graphs)) if axes[i][j].get_visible()][-1]
            lowest.set_xlabel("operations per byte read or written")
            lowest.tick_params(labelbottom=True)
        entries = [Line2D([], [], linestyle="", marker=marker, color=colour, markeredgecolor="white", label=label)
                   for kind, (label, colour, marker) in KIND_STYLES.items() if kind in kinds]  # fmt: skip
        wide = len(entries) if len(variants) > 1 else 1
        figure.legend(handles=entries, loc="outside lower center", ncols=wide, frameon=False, fontsize=9)
        threads = meta["threads"]
        where = f"{device_title(folder, meta['device'])} (area: share of time)"
        figure.suptitle(
            f"{plots.short_model(meta['model'])}, batch {batch}, {threads} thread{'s' if threads > 1 else ''},"
            + (" " if len(variants) > 1 else "\n") + where, fontsize=11,
        )  # fmt: skip
        figure.draw_without_rendering()  # lays the figure out: only now it is known where points lie on paper
        for axis, mine, labelled in panels:
            _place_labels(axis, mine, labelled)
        path = folder / f"{KIND}_b{batch}.png"
        plots.save(figure, path)
        drawn.append(path)
    return drawn


# --- the program -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="roofline_cpu.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="timm name, weights random (default: %(default)s)")
    parser.add_argument(
        "--graphs", nargs="+", choices=ENGINE_GRAPHS, default=list(ENGINE_GRAPHS), metavar="GRAPH",
        help=f"which of {', '.join(ENGINE_GRAPHS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--isa", nargs="+", metavar="NAME",
        help="the engine's instruction sets (default: all that run here but portable)",
    )  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="images per call (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument(
        "--runs", type=int, default=DEFAULT_RUNS, metavar="N",
        help="rounds: each operation once, and the ceilings (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=results.ROOT / "results" / "local", metavar="DIR",
        help="folder of roofline_cpu.json, .csv, .md and the pictures (default: results/local)",
    )  # fmt: skip
    return parser


def chosen_variants(wanted: Sequence[str] | None) -> list[str]:
    """Instruction sets to measure, best first. EngineError for one that does not run here."""
    from pyharness.engine import cpu_variants

    known = cpu_variants()
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise EngineError(f"--isa: {', '.join(unknown)} not on this machine; the engine has {', '.join(known)} here")
    return list(wanted or [name for name in known if name != "portable"] or known)


def highest(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The highest of several measurements of the ceilings, figure by figure: a neighbour can only lower them."""
    return {name: max(ceilings[name] for ceilings in measured) for name in measured[0]}


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    measure.need_positive(args, "--threads", "--runs")
    for batch in args.batch:
        measure.need_positive(argparse.Namespace(batch=batch), "--batch")
    from pyharness import engine
    from pyharness.models import config_of, create_model
    from pyharness.random_engine import random_engine_file

    variants, threads = chosen_variants(args.isa), measure.set_threads(args.threads)
    meta = {**measure.environment(engine.engine_info(), threads), "model": args.model, "rounds": args.runs,
            "ceilings": {}, "summary": []}  # fmt: skip
    config = config_of(create_model(args.model), args.model)
    files = {graph: random_engine_file(config, graph) for graph in args.graphs}
    if FUSED_GRAPH in files:
        for name, scales in FOR_AVX2.items():
            files[name] = random_engine_file(config, FUSED_GRAPH, weight_scales=scales)
    engines = {name: engine.SwinInt8.from_engine_file(file) for name, file in files.items()}
    rows: list[RooflineRow] = []
    for isa in variants:
        before = engine.select_cpu_variant(isa)
        try:
            report(f"{isa}: measure the ceilings")
            measured = [engine.measure_ceilings(threads)]

            def measure_ceilings(measured: list[dict[str, float]] = measured) -> dict[str, float]:
                measured.append(engine.measure_ceilings(threads))
                return measured[-1]

            timed = []
            for (graph, model), batch in ((item, batch) for item in engines.items() for batch in args.batch):
                if graph in FOR_AVX2 and "grouped_gop_s" not in measured[0]:
                    continue  # the same integers in the same time
                report(f"{isa}: {graph}, batch {batch}: {args.runs} rounds of operations and ceilings")
                time_ops = functools.partial(model.time_ops, measure.random_images(config, batch), 1)
                with torch.inference_mode():
                    timed.append((graph, batch, model.ops(batch), time_rounds(time_ops, measure_ceilings, args.runs)))
        finally:
            engine.select_cpu_variant(before)
        ceilings = highest(measured)
        known = Ceilings.of(ceilings)
        meta["ceilings"][isa] = ceilings
        for graph, batch, ops, rounds in timed:
            new = rows_of(ops, median_times(rounds), known, Conditions(args.model, batch, threads, isa, graph))
            gemms = gemm_summary(new, shares_of_ceilings(ops, rounds))
            meta["summary"].append({"isa": isa, "graph": graph, "batch": batch, "gemms": gemms})
            rows += new
        document = write(args.out, meta, rows)
    drawn = plot(document, args.out)
    print(markdown(document).split(results.REST_OF_FILE)[0])
    print("Written:", ", ".join(str(path) for path in (*sorted(args.out.glob(f"{KIND}.*")), *drawn)))
    return 0


if __name__ == "__main__":
    run_cli(main)

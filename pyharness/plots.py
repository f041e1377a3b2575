"""The pictures of the result tables, drawn with matplotlib without a display.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; every series also has a marker or hatch of its
own and is named in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyharness.atomic import atomic_path
from pyharness.results import FUSED_GRAPH_OPS, FUSED_OPS, FUSED_OPS_V2

METHOD_STYLES = {
    "fp32": ("fp32 (timm)", "#555555", "o"),
    "fp16": ("fp16 (timm)", "#009E73", "P"),
    "ft_int8": ("FT INT8", "#0072B2", "s"),
    "geluless_int8": ("GELU-less INT8", "#D55E00", "^"),
    "geluless_int8_no_kd": ("GELU-less INT8, no distillation", "#CC79A7", "v"),
    "fused_int8_gelu": ("Fused INT8 with GELU", "#E69F00", "X"),
    "fused_int8": ("Fused INT8, GELU-less", "#56B4E9", "p"),
}
"""Label, colour and marker by method."""

OP_STYLES = dict(
    zip(
        (*FUSED_OPS, *FUSED_GRAPH_OPS),
        (
            ("#56B4E9", ""), ("#0072B2", "//"), ("#E69F00", ""), ("#F0E442", "\\\\"), ("#D55E00", "xx"),
            ("#009E73", ""), ("#CC79A7", ".."), ("#999999", "--"),
            ("#0072B2", "++"), ("#E69F00", "oo"), ("#F0E442", ".."), ("#D55E00", "\\\\"), ("#999999", "xx"),
        ),
    )
)  # fmt: skip
OP_STYLES |= {v2: OP_STYLES[v1] for v1, v2 in zip(FUSED_OPS, FUSED_OPS_V2)}
"""Colour and hatch by op whose drop is drawn. What takes an op's place in the fused graph has its colour."""


def pyplot() -> Any:
    """matplotlib's pyplot, without a display, in the style of all pictures here."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6})
    return plt


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, as a whole or not at all, and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot().close(figure)


def short_model(model: str) -> str:
    """`swin_tiny_patch4_window7_224` -> `Swin-T`, `swin_base_patch4_window12_384` -> `Swin-B 384`, and with an image
    size behind it, `...@800x1344`, `Swin-T 800x1344`; others stay."""
    model, at, size = model.partition("@")
    if at:
        return f"{short_model(model).removesuffix(' 384')} {size}"
    for word, letter in (("tiny", "T"), ("small", "S"), ("base", "B"), ("large", "L")):
        if model.startswith(f"swin_{word}_"):
            return f"Swin-{letter} 384" if model.endswith("_384") else f"Swin-{letter}"
    return {"swin_micro_digits": "Swin micro (digits)"}.get(model, model)


def _style(method: str) -> tuple[str, str, str]:
    return METHOD_STYLES.get(method, (method, "#999999", "D"))


SPREAD = 5.0
"""Latencies whose largest is more than so many times the smallest are drawn on a log scale."""


def plot_accuracy_latency(document: Mapping[str, Any], path: Path) -> bool:
    """Top-1 with its 95 % interval against median latency, one panel per model. False where no row has both."""
    rows = [row for row in document["rows"] if row["top1"] is not None and row["latency_ms"]]
    if not rows:
        return False
    plt = pyplot()
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        1, len(models), figsize=(6.4 * len(models), 4.6), squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes[0], models):
        mine = [row for row in rows if row["model"] == model]
        for row in mine:
            label, colour, marker = _style(row["method"])
            stats, (low, high) = row["latency_ms"], row["top1_interval95"] or (row["top1"], row["top1"])
            axis.errorbar(
                stats["median"],
                row["top1"],
                xerr=[[stats["median"] - stats["p10"]], [stats["p90"] - stats["median"]]],
                yerr=[[row["top1"] - low], [high - row["top1"]]],
                fmt="none",
                ecolor=colour,
                elinewidth=1.2,
            )
            # Apart from its bars, which would be in the legend too, and above those of other methods.
            axis.plot(
                stats["median"], row["top1"], marker, markersize=9, color=colour, markeredgecolor="white", label=label,
                zorder=3,
            )  # fmt: skip
        axis.set_title(f"{short_model(model)}, batch {rows[0]['batch']}")
        medians = [row["latency_ms"]["median"] for row in mine]
        log = max(medians) > SPREAD * min(medians)
        axis.set_xlabel(f"latency, ms{', log scale' if log else ''} (median; bar: 10th to 90th percentile)")
        axis.set_ylabel("top-1, % (bar: 95 % interval)")
        axis.grid(alpha=0.3)
        if log:
            _log_latencies(axis, medians)
        else:
            axis.set_xlim(left=0)
        axis.legend(loc="best", frameon=True, fontsize=9)
    save(figure, path)
    return True


def _log_latencies(axis: Any, medians: Sequence[float]) -> None:
    """A log scale with plain numbers, at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.set_xlim(min(medians) / 1.5, max(medians) * 1.5)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


TALLEST = 180.0
"""Percent of FT INT8's latency that plot_latency_bars draws."""


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plot_latency_bars(document: Mapping[str, Any], path: Path) -> bool:
    """Median latency of every method, grouped by model, in percent of FT INT8's; the bars carry the milliseconds, or
    microseconds of a model that needs less than one millisecond.

    Relative, because the models' latencies lie too far apart for one axis. Bars beyond TALLEST, fp32's, are cut there
    and carry their multiple of FT INT8. False where FT INT8 was not measured.
    """
    rows = [row for row in document["rows"] if row["latency_ms"] and row["vs_ft_int8"] is not None]
    if not rows:
        return False
    plt = pyplot()
    models = list(dict.fromkeys(row["model"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    size = (max(7.0, (0.5 * len(methods) + 0.1) * len(models) + 1.5), 4.8)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    width = 0.84 / len(methods)
    fastest = {model: min(r["latency_ms"]["median"] for r in rows if r["model"] == model) for model in models}
    units = {model: (1000, "µs") if ms < 1 else (1, "ms") for model, ms in fastest.items()}
    for index, method in enumerate(methods):
        label, colour, _ = _style(method)
        mine = [(models.index(r["model"]), r) for r in rows if r["method"] == method]
        centres = [place + (index - (len(methods) - 1) / 2) * width for place, _ in mine]
        bars = axis.bar(
            centres, [min(100 * r["vs_ft_int8"], TALLEST) for _, r in mine], width * 0.94, color=colour, label=label,
            hatch=("", "", "//", "..")[index % 4], edgecolor="white",
        )  # fmt: skip
        for bar, (_, row) in zip(bars, mine):
            words = _three_digits(row["latency_ms"]["median"] * units[row["model"]][0])
            cut = 100 * row["vs_ft_int8"] > TALLEST
            if cut:
                words += f"\n{row['vs_ft_int8']:.3g}x FT"
                ends = [bar.get_x(), bar.get_x() + bar.get_width()]
                axis.plot(ends, [0.88 * TALLEST, 0.92 * TALLEST], color="white", linewidth=3)
            inside = not cut and bar.get_height() > 0.1 * TALLEST  # where the line at 100 % cannot strike it
            axis.annotate(
                words, (bar.get_x() + bar.get_width() / 2, bar.get_height()), xytext=(0, -5 if inside else 3),
                textcoords="offset points", ha="center", va="top" if inside else "bottom", fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
    axis.axhline(100, color="#0072B2", linewidth=0.8, linestyle="--", zorder=0)
    axis.set_xticks(range(len(models)), [f"{short_model(model)}, {units[model][1]}" for model in models])
    axis.set_ylabel("latency, % of FT INT8")
    axis.set_title(f"Median latency, batch {rows[0]['batch']} (lower is better)")
    axis.margins(y=0.18)
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False, fontsize=9)
    save(figure, path)
    return True


def plot_breakdown(document: Mapping[str, Any], path: Path) -> None:
    """Table 1 as one stacked bar per graph: the latency drop of each fused op, and what is left in grey. Values stand
    where there is room for them."""
    rows, latency = document["rows"], document["meta"]["latency_ms"]
    graphs = list(dict.fromkeys(row["graph"] for row in rows))
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(10.0, 1.5 * len(graphs) + 2.4), layout="constrained")
    bars: dict[str, Any] = {}
    values, below_zero, grey = [], False, None
    for place, graph in enumerate(graphs):
        left = 0.0
        drops = {row["op"]: row["drop_ms"] for row in rows if row["graph"] == graph and row["drop_ms"] is not None}
        for op in (op for op in drops if op in OP_STYLES):  # rows of fused ops stand in the graph's order
            below_zero = below_zero or drops[op] < 0
            drop = max(0.0, drops[op])
            colour, hatch = OP_STYLES[op]
            (bar,) = axis.barh(place, drop, left=left, height=0.62, color=colour, hatch=hatch, edgecolor="white")
            bars.setdefault(op, bar)
            value = axis.text(
                left + drop / 2, place, f"{drop:.2g}", ha="center", va="center", fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
            )  # fmt: skip
            values.append((value, bar))
            left += drop
        rest = latency[graph]["median"] - left
        if rest > 0:
            (grey,) = axis.barh(place, rest, left=left, height=0.62, color="#DDDDDD", edgecolor="white")
            axis.text(left + rest / 2, place, f"GEMMs and the rest: {rest:.1f}", ha="center", va="center", fontsize=9)
    axis.set_yticks(range(len(graphs)), [_style(graph)[0] for graph in graphs])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlabel(
        f"ms, batch {rows[0]['batch']}: drop in latency when the op is left out"
        + (" (drops below zero are not drawn)" if below_zero else "")
    )
    axis.set_title(f"Fused operations of {short_model(rows[0]['model'])}")
    if grey is not None:
        bars["GEMMs and the rest"] = grey
    figure.legend(bars.values(), bars.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.draw_without_rendering()  # lays the figure out: only now segments have a width on paper
    for value, bar in values:
        if value.get_bbox_patch().get_window_extent().width > bar.get_window_extent().width:
            value.remove()
    save(figure, path)


def plot_ablation(document: Mapping[str, Any], path: Path) -> None:
    """KL from the teacher (log scale) and top-1 of every variant of Algorithm 1: each seed a dot, the mean a bar."""
    plt = pyplot()
    summary, rows = document["summary"], document["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 0.42 * len(summary) + 1.9), sharey=True, layout="constrained")
    panels = (
        (axes[0], "divergence", "KL from the teacher, nats (log scale; less is better)"),
        (axes[1], "top1", "top-1 on 597 held-out digits, %"),
    )
    for axis, key, label in panels:
        for place, row in enumerate(summary):
            colour = "#0072B2" if place == 0 else "#D55E00"
            seeds = [r[key] for r in rows if (r["choice"], r["chosen"]) == (row["choice"], row["chosen"])]
            axis.plot(seeds, [place] * len(seeds), "o", color=colour, alpha=0.55, markersize=7, markeredgewidth=0)
            axis.plot([row[key]], [place], "|", color=colour, markersize=20, markeredgewidth=2.4)
        axis.axvline(summary[0][key], color="#0072B2", linewidth=0.8, linestyle="--", zorder=0)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_xscale("log")
    axes[1].axvline(document["teacher"]["top1"], color="#555555", linewidth=0.8, linestyle=":", zorder=0)
    axes[1].annotate(
        "teacher", (document["teacher"]["top1"], 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", ha="center", fontsize=9, color="#555555",
    )  # fmt: skip
    axes[0].set_yticks(range(len(summary)), [f"{row['choice']}: {row['chosen']}" for row in summary], fontsize=10)
    axes[0].invert_yaxis()
    figure.suptitle("Algorithm 1 with one choice changed at a time (dot: a seed, bar: the mean)", fontsize=12)
    save(figure, path)


def plot_layers(document: Mapping[str, Any], path: Path) -> None:
    """Of every quantizer the SQNR of its result, and what leaving it out gains: a row per kind, a column per block, the
    numbers in the fields. Light is good in the first, bad in the second. One below the other, where blocks are many."""
    from pyharness.layers import KINDS, place_name

    rows = document["quantizers"]
    places = [(unit["stage"], unit["block"]) for unit in document["units"]]
    names = [place_name(*place) for place in places]
    kinds = sorted({row["kind"] for row in rows}, key=KINDS.index)
    plt = pyplot()
    few = len(places) <= 8
    panel = (0.52 * len(places) + 3.2, 0.31 * len(kinds) + 1.2)
    size, shape = ((2 * panel[0], panel[1]), (1, 2)) if few else ((panel[0], 2 * panel[1]), (2, 1))
    figure, axes = plt.subplots(*shape, figsize=size, sharex=True, sharey=True, layout="constrained")
    panels = (("sqnr_db", "SQNR of its result, dB", 0, None), ("gain_db", "logits' gain without it, dB", 1, 0.0))
    for axis, (key, label, digits, least) in zip(axes, panels):
        grid = [[math.nan] * len(places) for _ in kinds]
        for row in rows:
            if row[key] is not None:
                grid[kinds.index(row["kind"])][places.index((row["stage"], row["block"]))] = row[key]
        known = [row[key] for row in rows if row[key] is not None]
        low = min(known, default=0.0) if least is None else least
        high = max([*known, low + 0.1])
        image = axis.imshow(grid, cmap="cividis", aspect="auto", vmin=low, vmax=high)
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if not math.isnan(value):
                    dark = value < low + 0.55 * (high - low)
                    words = f"{round(value, digits) + 0.0:.{digits}f}"  # no minus ahead of a zero
                    axis.text(x, y, words, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axis.set_yticks(range(len(kinds)), kinds, fontsize=9)
        axis.set_xticks(range(len(places)), names, rotation=0 if few else 90, fontsize=9)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(label, loc="left", fontsize=11)
        figure.colorbar(image, ax=axis, fraction=0.03, pad=0.015).ax.tick_params(labelsize=8)
    figure.supxlabel("block (stage.number), and patch merging behind a stage", fontsize=10)
    figure.suptitle(f"Quantizers of {short_model(document['model'])} as {document['graph']}", fontsize=12)
    save(figure, path)


def plot_table2(document: Mapping[str, Any], folder: Path) -> Sequence[Path]:
    """Draw `table2_accuracy.png` and `table2_latency.png` into `folder`; returns those that were drawn."""
    wanted = (
        (plot_accuracy_latency, folder / "table2_accuracy.png"),
        (plot_latency_bars, folder / "table2_latency.png"),
    )
    return [path for draw, path in wanted if draw(document, path)]

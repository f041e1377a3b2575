"""The pictures of peers_cpu.json: latency over that of the fastest peer, one panel per group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.methods import GELU
from benchmarks.peers.rows import BASELINE, OURS, group_of
from pyharness import plots, results
from pyharness.glance import device_title

COLOURS = {"fp32": "#999999", "bf16": "#56B4E9", "int8": "#0072B2"}
"""Of peers, by precision; this engine's bars are vermilion, and orange where it runs another model than they do."""
OUR_COLOUR, GELULESS_COLOUR = "#D55E00", "#E69F00"
HATCHES = {"bf16": "..", "int8": "//"}
GELULESS_HATCH = "xx"
COLUMNS = 3


def is_geluless(method: str) -> bool:
    """Whether a method of this engine runs the distilled model without GELU; the peers run the model with it."""
    return method != BASELINE and GELU not in method


def _look(row: Mapping[str, Any]) -> tuple[str, str]:
    """Colour and hatch of a row's bar."""
    if row["side"] == OURS:
        return (GELULESS_COLOUR, GELULESS_HATCH) if is_geluless(row["method"]) else (OUR_COLOUR, "")
    return COLOURS[row["precision"]], HATCHES.get(row["precision"], "")


def _panel(axis: Any, rows: list[Mapping[str, Any]], title: str) -> None:
    ordered = sorted((r for r in rows if r["latency_ms"]), key=lambda r: -r["latency_ms"]["median"])
    for place, row in enumerate(ordered):
        ratio, (colour, hatch) = row["ratio_to_best_peer"], _look(row)
        axis.barh(place, ratio, height=0.74, color=colour, hatch=hatch, edgecolor="white")
        axis.annotate(
            f"{results.milliseconds(row['latency_ms']['median'])} ms  ({ratio:.2f}x)", (ratio, place), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8.5, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    names = [row["method"] + (" (not forced)" if row["isa_forced"] == "no" else "") for row in ordered]
    axis.set_yticks(range(len(ordered)), names, fontsize=9)
    for label, row in zip(axis.get_yticklabels(), ordered):
        if row["side"] == OURS:
            label.set_fontweight("bold")
            label.set_color(OUR_COLOUR)
    # Up to the first bar that ends before it, whose figures it would strike.
    top = next((place for place, row in enumerate(ordered) if row["ratio_to_best_peer"] < 1), len(ordered)) - 0.5
    axis.plot([1, 1], [-0.5, top], color="#333333", linewidth=0.9, linestyle="--", zorder=3)
    axis.set_xlim(0, 1.42 * max(row["ratio_to_best_peer"] for row in ordered))
    axis.set_title(title, fontsize=11)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def plot(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw `peers_cpu_<isa>.png` for each instruction set of which a peer was timed; returns the files drawn."""
    drawn = []
    rows = [row for row in document["rows"] if row["ratio_to_best_peer"] is not None]
    for isa in dict.fromkeys(row["isa"] for row in rows):
        groups = list(dict.fromkeys(group_of(row) for row in rows if row["isa"] == isa))
        plt = plots.pyplot()
        from matplotlib.patches import Patch

        looks = {
            (OUR_COLOUR, ""): "this engine, int8, the peers' model",
            (GELULESS_COLOUR, GELULESS_HATCH): "this engine, int8, a GELU-less model",
            **{(colour, HATCHES.get(kind, "")): f"peers, {kind}" for kind, colour in COLOURS.items()},
        }
        shown = {_look(row) for row in rows if row["isa"] == isa}
        handles = [
            Patch(facecolor=look[0], hatch=look[1], edgecolor="white", label=words)
            for look, words in looks.items()
            if look in shown
        ]
        columns = 2 if len(groups) == 4 else min(COLUMNS, len(groups))
        lines = math.ceil(len(groups) / columns)
        wide = len(handles) if columns > 1 else 1  # entries of the legend beside each other
        most = max(sum(group_of(row) == group for row in rows) for group in groups)
        height = (0.31 * most + 1.0) * lines + 0.7 + 0.2 * len(handles) / wide
        figure, axes = plt.subplots(
            lines, columns, figsize=(6.0 * columns, height), squeeze=False, layout="constrained"
        )  # fmt: skip
        for axis in axes.flat[len(groups) :]:
            axis.set_visible(False)
        for axis, group in zip(axes.flat, groups):
            model, batch, threads, _ = group
            words = f"{plots.short_model(model)}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}"
            _panel(axis, [row for row in rows if group_of(row) == group], words)
        for column in range(columns):
            axes[sum(place % columns == column for place in range(len(groups))) - 1][column].set_xlabel(
                "latency over that of the fastest peer", fontsize=10
            )
        name = "every library as it chooses" if isa == "native" else f"instruction set {isa}"
        figure.suptitle(f"{device_title(folder, document['meta']['device'])}: {name}", fontsize=12)
        figure.legend(handles=handles, loc="outside lower center", ncols=wide, frameon=False, fontsize=10)
        path = folder / f"peers_cpu_{isa}.png"
        plots.save(figure, path)
        drawn.append(path)
    return drawn

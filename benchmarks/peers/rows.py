"""The rows of peers_cpu.json: what each holds, how the rounds of a group become rows, and the tables in Markdown.

A group is what was timed in one alternation: a model, a batch, a number of threads and an instruction set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyharness import measure, results
from pyharness.config import FUSED_GRAPH
from pyharness.errors import HarnessError
from pyharness.plots import short_model
from pyharness.results import Table2Row

KIND = "peers_cpu"
OURS, PEER = "ours", "peer"
FUSED = FUSED_GRAPH
BASELINE = "ft_int8"

Group = tuple[str, int, int, str]
"""model, batch, threads, isa."""


@dataclass(frozen=True)
class PeerRow(Table2Row):
    """One method in one group, as Table2Row, and:

    `side`: "ours" or "peer"; `precision`: "fp32", "bf16" or "int8". `isa_forced`: whether the forced instruction set
    holds: "yes", "no", "partly" (in GEMMs, not elsewhere) or "unknown"; null where none is forced.
    `ratio_to_best_peer`: median over rounds of this latency over that of the group's fastest peer (below 1 is faster);
    `ratio_to_best_forced_peer` over that of the fastest one which keeps to the forced instruction set, at least in its
    GEMMs, null where none is forced; `ratio_to_fused` over fused_int8. `check`: `sqnr_db` and `max_abs` of the logits
    against timm's fp32 ones on the same weights and images (a GELU-less graph's: of the model with ReLU and without FC1
    bias), and what else the method says of itself. In files older than that null for this engine, which ran random int8
    weights. `peak_memory_mb`: 10^6 bytes, see peers.memory; `model_mb`: of the file,
    or of the parameters in memory. `reason`: why there is no latency.
    """

    threads: int = 0
    isa: str = "native"
    side: str = PEER
    precision: str = "fp32"
    isa_forced: str | None = None
    ratio_to_best_peer: float | None = None
    ratio_to_best_peer_quartiles: tuple[float, float] | None = None
    ratio_to_best_forced_peer: float | None = None
    ratio_to_fused: float | None = None
    version: str | None = None
    model_mb: float | None = None
    peak_memory_mb: float | None = None
    check: dict[str, object] | None = None
    reason: str | None = None


def group_of(row: Mapping[str, Any]) -> Group:
    return row["model"], row["batch"], row["threads"], row["isa"]


def best_peer(samples: measure.Samples, peers: Iterable[str]) -> str | None:
    """The peer with the lowest median latency; None where no peer was timed."""
    timed = [name for name in peers if samples.get(name)]
    return min(timed, key=lambda name: measure.quantile(samples[name], 0.5), default=None)


def timed_rows(untimed: Sequence[PeerRow], samples: measure.Samples) -> list[PeerRow]:
    """`untimed` with latencies and ratios from `samples`; those of whom there are none stay as they are."""
    peers = [row for row in untimed if row.side == PEER]
    best = best_peer(samples, [row.method for row in peers])
    forced = best_peer(samples, [row.method for row in peers if row.isa_forced in ("yes", "partly")])

    def ratio(name: str, over: str | None) -> measure.Spread | None:
        return measure.paired_ratio(samples, name, over) if over is not None and samples.get(over) else None

    rows = []
    for row in untimed:
        if not samples.get(row.method):
            rows.append(row)
            continue
        stats = measure.summarize(samples[row.method])
        to_ft, to_best, to_forced, to_fused = (ratio(row.method, over) for over in (BASELINE, best, forced, FUSED))
        rows.append(
            dataclasses.replace(
                row,
                latency_ms=stats.to_dict(),
                images_per_s=row.batch * 1000 / stats.median,
                vs_ft_int8=to_ft and to_ft.median,
                vs_ft_int8_quartiles=to_ft and (to_ft.q25, to_ft.q75),
                ratio_to_best_peer=to_best and to_best.median,
                ratio_to_best_peer_quartiles=to_best and (to_best.q25, to_best.q75),
                ratio_to_best_forced_peer=to_forced and to_forced.median,
                ratio_to_fused=to_fused and to_fused.median,
            )
        )
    return rows


# --- the file --------------------------------------------------------------------------------------------------------

SAME = ("device", "commit", "torch", "timm", "versions")
"""Fields of meta in which all rows of a file agree; the engine's version, compiler and backend besides."""


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, in what `before` and `now` differ that one file cannot hold both; empty if in nothing."""

    def conditions(meta: Mapping[str, Any]) -> dict[str, Any]:
        engine = {k: v for k, v in (meta.get("engine") or {}).items() if k != "isa"}
        return {**{name: meta.get(name) for name in SAME}, "engine": engine}

    old, new = conditions(before), conditions(now)
    return "; ".join(f"{name} {old[name]} then, {new[name]} now" for name in new if old[name] != new[name])


def load(folder: Path) -> dict[str, Any] | None:
    """The document of an earlier run in `folder`, None where there is none. FormatError where it is no such table."""
    if not (folder / f"{KIND}.json").is_file():
        return None
    import json

    try:
        document = json.loads((folder / f"{KIND}.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise HarnessError(f"{folder / KIND}.json is not JSON ({error}); give --fresh to begin anew") from None
    results.validate(KIND, document, PeerRow)
    return document


def resumed(folder: Path, meta: Mapping[str, Any], fresh: bool) -> list[dict[str, Any]]:
    """Rows of an earlier run that this one goes on from. HarnessError where they were measured on other conditions."""
    document = None if fresh else load(folder)
    if document is None:
        return []
    if differs := difference(document["meta"], meta):
        raise HarnessError(
            f"{folder / KIND}.json was measured on other conditions ({differs}); give another --out, or --fresh to "
            "begin anew"
        )
    return document["rows"]


def is_done(rows: Iterable[Mapping[str, Any]], group: Group, methods: Iterable[str]) -> bool:
    """Whether `rows` hold all of `methods` in `group`."""
    return set(methods) <= {row["method"] for row in rows if group_of(row) == group}


def merged(rows: Sequence[Mapping[str, Any]], group: Group, new: Sequence[PeerRow]) -> list[dict[str, Any]]:
    """`rows` with those of `group` replaced by `new`."""
    return [*(dict(row) for row in rows if group_of(row) != group), *(dataclasses.asdict(row) for row in new)]


def write(folder: Path, meta: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write `<folder>/peers_cpu.json`, `.csv`, `.md`; returns the validated document."""
    document = results.document_of(meta, [PeerRow(**row) for row in rows])
    results.validate(KIND, document, PeerRow)
    results.write_json(folder / f"{KIND}.json", document)
    results.write_csv(folder / f"{KIND}.csv", document["rows"])
    results.write_text(folder / f"{KIND}.md", markdown(document))
    return document


# --- Markdown --------------------------------------------------------------------------------------------------------


def _fastest(rows: Iterable[Mapping[str, Any]], side: str) -> Mapping[str, Any] | None:
    timed = [row for row in rows if row["side"] == side and row["latency_ms"]]
    return min(timed, key=lambda row: row["latency_ms"]["median"], default=None)


def _cell(row: Mapping[str, Any] | None, best: Mapping[str, Any] | None) -> str:
    if row is None or row["latency_ms"] is None:
        return "-"
    text = results.milliseconds(row["latency_ms"]["median"])
    return f"**{text}**" if best is not None and row["method"] == best["method"] else text


def _matrix(rows: Sequence[Mapping[str, Any]]) -> str:
    """Median milliseconds of one instruction set: methods down, groups across, the fastest peer of each in bold."""
    groups = sorted(dict.fromkeys(map(group_of, rows)), key=lambda group: (group[1], group[2]))
    groups.sort(key=lambda group: [group_of(row)[0] for row in rows].index(group[0]))
    by_group = {group: [row for row in rows if group_of(row) == group] for group in groups}
    best = {group: _fastest(members, PEER) for group, members in by_group.items()}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [next((r for r in by_group[group] if r["method"] == method), None) for group in groups]
        free = any(row is not None and row["isa_forced"] == "no" for row in cells)
        name = f"{method} (not forced)" if free else method
        lines.append((name, *(_cell(row, best[group]) for row, group in zip(cells, groups))))
    against = {"ratio_to_best_peer": "vs best peer"}
    if any(row["ratio_to_best_forced_peer"] is not None for row in rows) and any(
        row["side"] == PEER and row["isa_forced"] == "no" for row in rows
    ):
        against["ratio_to_best_forced_peer"] = f"vs best peer that keeps to {rows[0]['isa']}"
    for ratio, words in against.items():
        for method in dict.fromkeys(row["method"] for row in rows if row["side"] == OURS):
            cells = [next((r for r in by_group[group] if r["method"] == method), None) for group in groups]
            changes = ["-" if not row or row[ratio] is None else results.percent_change(row[ratio]) for row in cells]
            lines.append((f"{method} {words}", *changes))
    header = [
        f"{short_model(model)}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}"
        for model, batch, threads, _ in groups
    ]
    return results.markdown_table(("ms", *header), lines, right=range(1, len(header) + 1))


def _all_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    def check(row: Mapping[str, Any], name: str, digits: int) -> str:
        value = (row["check"] or {}).get(name)
        return "-" if value is None else f"{value:.{digits}g}" if name == "max_abs" else results.number(value, digits)

    def line(row: Mapping[str, Any]) -> tuple[str, ...]:
        stats, ratio, fused = row["latency_ms"], row["ratio_to_best_peer"], row["ratio_to_fused"]
        low, high = (results.milliseconds(stats and stats[name]) for name in ("p10", "p90"))
        latency, rounds = (f"{_cell(row, None)} ({low} to {high})", str(stats["runs"])) if stats else ("-", "-")
        return (
            short_model(row["model"]), str(row["batch"]), str(row["threads"]), row["isa"], row["isa_forced"] or "-",
            row["method"], latency, rounds,
            results.number(ratio), results.number(fused), check(row, "sqnr_db", 1), check(row, "max_abs", 2),
            results.number(row["peak_memory_mb"], 0), results.number(row["model_mb"], 0), row["version"] or "-",
        )  # fmt: skip

    header = (
        "model", "batch", "threads", "isa", "forced", "method", "latency ms (p10 to p90)", "rounds", "over best peer",
        "over fused", "SQNR dB", "max abs", "peak MB", "model MB", "version",
    )  # fmt: skip
    ordered = sorted(rows, key=lambda r: r["latency_ms"]["median"] if r["latency_ms"] else float("inf"))
    groups = list(dict.fromkeys(map(group_of, rows)))
    ordered.sort(key=lambda row: groups.index(group_of(row)))
    return results.markdown_table(header, map(line, ordered), right=(1, 2, 7, 8, 9, 10, 11, 12, 13))


def reasons(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each method and reason that was not measured, with the groups it is missing in."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["reason"]:
            where = f"{short_model(row['model'])} batch {row['batch']} on {row['threads']} ({row['isa']})"
            found.setdefault((row["method"], row["reason"]), []).append(where)
    return [f"`{method}` not measured: {reason} [{', '.join(where)}]" for (method, reason), where in found.items()]


NOTES = """\
Medians of whole forward passes, all methods of a column in alternation in one process, each call after untimed calls of
the same method. Bold: the fastest peer. `X vs best peer`: change of X's latency against it, median of the ratios within
each round. A dash was not measured. Peers run timm's GELU model on the same images; `ft_int8`{gelu} run a GELU
model{relu}.
"""

METHOD_NOTES = {
    f"{FUSED}_balanced": "`fused_int8_balanced` is `fused_int8` with weight steps that are no finer than AVX2 gains by "
    "(docs/fused.md).\n",
    f"{FUSED}_gelu_balanced": "`fused_int8_gelu_balanced` is `fused_int8_gelu` with weight steps chosen so.\n",
    f"{FUSED}_tensor": "`fused_int8_tensor` is `fused_int8` with one scale per weight tensor, which gains on AVX2 "
    "alone (docs/epilogues.md).\n",
    "openvino_int8_unsmoothed": "`openvino_int8` is NNCF's transformer preset, SmoothQuant included; "
    "`openvino_int8_unsmoothed` does without that.\n",
    "pt2e_int8_bf16": "`pt2e_int8_bf16` is `pt2e_int8` with bf16 in the place of fp32 for what is not int8.\n",
    "onnxruntime_int8_dynamic": "`onnxruntime_int8_dynamic` takes the ranges of activations in each call; "
    "`onnxruntime_int8` has them from calibration.\n",
}
"""What is said below the table of medians where a method is in it."""

SAME_WEIGHTS = """\
SQNR and largest difference: logits against timm's fp32 on the same random weights, those of GELU-less graphs against
the same model with ReLU and without FC1 bias. Int8 methods are calibrated on random images: their SQNR shows that they
compute the model and how coarsely, not what a trained one would lose.
"""
RANDOM_INT8 = """\
SQNR and largest difference: logits against timm's fp32 on the same random weights; int8 peers are calibrated on random
images, so that their SQNR only shows that they compute the model. This engine's weights here are random int8 of its
own; its numerics are proven by its tests.
"""
"""Of files older than the rows of this engine with `check`."""

DETAILS = """\
Peak MB: highest resident size of a process of its own that loads the method and runs it three times, with Python and
its libraries; what PyTorch compiles or quantizes while loading is in it. Forced: whether the instruction set named
holds in the method ("partly": in its GEMMs, not in other kernels; "no": GEMMs ran with all that the processor has, "not
forced" in the table of medians).
"""


def markdown(document: Mapping[str, Any]) -> str:
    """The tables of one document: one of medians for each instruction set, for pages; then every row in full."""
    rows, meta = document["rows"], document["meta"]
    text = ""
    for isa in dict.fromkeys(row["isa"] for row in rows):
        masked = [run.get("cpuid_masked") for run in meta.get("runs_of_this_file", ()) if run.get("isa") == isa]
        name = "Native: every library as it chooses" if isa == "native" else f"Instruction set `{isa}`"
        name += " (CPUID names no more to any library)" if masked and all(masked) else ""
        text += f"{name}, median ms:\n\n{_matrix([row for row in rows if row['isa'] == isa])}\n"
    methods = {row["method"] for row in rows}
    gelu = " and `fused_int8_gelu`" if "fused_int8_gelu" in methods else ""
    relu = " and ".join(f"`{name}`" for name in ("geluless_int8", FUSED) if name in methods)
    text += NOTES.format(gelu=gelu, relu=f", {relu} its GELU-less variant" if relu else "")
    text += "".join(note for method, note in METHOD_NOTES.items() if method in methods)
    text += "".join(f"\n- {line}" for line in reasons(rows)) + ("\n" if any(r["reason"] for r in rows) else "")
    versions = ", ".join(f"{name} {version}" for name, version in (meta.get("versions") or {}).items() if version)
    runs = meta.get("runs_of_this_file") or ({"engine_isa": meta["engine"]["isa"]},)
    isas = " and ".join(dict.fromkeys(run["engine_isa"] for run in runs))
    machine, _, rest = results.conditions({**meta, "engine": {**meta["engine"], "isa": isas}}).split("; ", 2)
    text += f"\nMeasured: {'; '.join(part for part in (machine, versions, rest) if part)}.\n"
    checked = any(row["side"] == OURS and row["check"] for row in rows)
    details = (SAME_WEIGHTS if checked else RANDOM_INT8) + DETAILS
    return f"{text}{results.REST_OF_FILE}methods in full\n\n{_all_rows(rows)}\n{details}"

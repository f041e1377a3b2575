"""Pages' first table: this engine beside the fastest other library, over machines, models and batches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyharness.errors import FormatError
from pyharness.plots import short_model
from pyharness.results import markdown_table, milliseconds, read_document

INSTRUCTIONS = {
    "amx_int8": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "avx2": "AVX2",
    "neon_i8mm": "NEON int8 matrix", "neon_dotprod": "NEON dot product", "portable": "none",
}  # fmt: skip
"""Of an engine's variant, for people."""


def at_a_glance(folders: Sequence[Path], model: str | None = None, root: str = "results/") -> str:
    """Markdown: one row for each group of `<folder>/peers_cpu.json` on the most threads the file has; of `model` alone
    (as tables call it, "Swin-T") where one is given. Folders are linked to as `root` and their name.

    Times as fast: 1 over the median of the ratios within each round, peers being those that keep to the instruction
    set where it was named to them. A dash was not measured. Of two folders that have the same model and batch on the
    same processor and instructions, the later one counts. A processor is what the folder's processor.txt says, where
    the machine's own name leaves generations open. FormatError where a folder has no such file.
    """
    newest: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {}
    for folder in folders:
        for date, line in _lines(folder, root):
            if model not in (None, line[2]):
                continue
            processor, *what = line[:4]
            key = (processor.split("](")[0], *what)
            if key not in newest or newest[key][0] < date:
                newest[key] = (date, line)  # in the place of the older one
    lines = [line for _, line in newest.values()]
    header = (
        "processor", "instructions", "model", "batch", "fastest other", "ms", "GELU: ms", "times as fast",
        "GELU-less: ms", "times as fast", "GELU-less over FT", "dB: other", "ours",
    )  # fmt: skip
    if model is not None and not lines:
        raise FormatError(f"no folder has measured {model}; tables call models as in Swin-T, Swin-B 384")
    return markdown_table(header, lines, right=(3, *range(5, len(header)))) + (
        "\nfastest other: of those measured, which run the GELU model. GELU: `fused_int8_gelu`, the fused graph of a "
        "checkpoint without retraining, and how many times as fast it is. GELU-less: the same of `fused_int8`, which "
        "needs a distilled model. `*`: on AVX2 both with balanced weight steps, where both were measured so. GELU-less "
        "over FT: the paper's subject, `geluless_int8` against `ft_int8`. dB: signal to noise of the logits against "
        "the fp32 model's, of the fastest other and of `fused_int8_gelu`; older files have random int8 weights in "
        "this engine, which have none. Medians of the ratios within rounds of alternating calls; every method and its "
        "spread: the folders' `peers_cpu.md`.\n"
    )


def _lines(folder: Path, root: str) -> Iterable[tuple[str, tuple[str, ...]]]:
    """(date, cells) of each group."""
    path, program = folder / "peers_cpu.json", "benchmarks/peers_cpu.py"
    document = read_document(path, program)
    if not isinstance(document, Mapping) or not document.get("rows") or "meta" not in document:
        raise FormatError(f"{path} holds no measured peers; {program} writes it anew")
    rows = document["rows"]
    threads = max(row["threads"] for row in rows)
    isas = {run["isa"]: run["engine_isa"] for run in document["meta"].get("runs_of_this_file", ())}
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["threads"] == threads and row["latency_ms"]:
            groups.setdefault((row["isa"], row["model"], row["batch"]), []).append(row)
    groups = {group: members for group, members in groups.items() if _peers(members)}
    models = list(dict.fromkeys(model for _, model, _ in groups))
    for isa, model, batch in sorted(groups, key=lambda g: (g[0] != "native", models.index(g[1]), g[2])):
        engine_isa = isas.get(isa) or document["meta"]["engine"]["isa"]
        name = processor_of(folder) or _short(document["meta"]["device"])
        processor = f"[{name}]({root}{folder.name})"
        instructions = INSTRUCTIONS[engine_isa] + (" alone" if isa != "native" else "")
        cells = _line(engine_isa, model, batch, groups[isa, model, batch])
        yield document["meta"]["date"], (processor, instructions, *cells)


def processor_of(folder: Path) -> str | None:
    """What the folder's processor.txt says; None where there is none."""
    said = folder / "processor.txt"
    return said.read_text(encoding="utf-8").strip() if said.exists() else None


def device_title(folder: Path, device: str) -> str:
    """A machine's name for a picture in `folder`: `device`, of which only the cores stay where processor.txt has the
    name."""
    name, (_, comma, cores) = processor_of(folder), device.rpartition(", ")
    return device if name is None else f"{name}{comma}{cores}" if comma else name


def _short(device: str) -> str:
    """A processor's name as `measure.cpu_name` gives it, without family, model and cores, which older files lack."""
    return re.sub(r"( \(family \d+ model \d+\))?,.*", "", device)


def _peers(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that keep to the instruction set."""
    return [row for row in rows if row["side"] == "peer" and row["isa_forced"] != "no"]


def _line(engine_isa: str, model: str, batch: int, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    ours = {row["method"]: row for row in rows if row["side"] == "ours"}
    kept = _peers(rows)
    ratio = "ratio_to_best_peer" if len(kept) + len(ours) == len(rows) else "ratio_to_best_forced_peer"
    best = min(kept, key=lambda row: row["latency_ms"]["median"])

    # Like beside like: balanced weight steps, of use on AVX2, for both or for neither.
    balanced = engine_isa == "avx2" and {"fused_int8_balanced", "fused_int8_gelu_balanced"} <= ours.keys()
    fused, gelu = (f"{method}{'_balanced' if balanced else ''}" for method in ("fused_int8", "fused_int8_gelu"))
    star = "*" if balanced else ""

    def quality(row: Mapping[str, Any] | None) -> str:
        value = ((row or {}).get("check") or {}).get("sqnr_db")
        return "-" if value is None else f"{value:.0f}"

    def ms(method: str) -> str:
        return milliseconds(ours[method]["latency_ms"]["median"]) + star if method in ours else "-"

    def times(method: str, ratio: str) -> str:
        value = ours.get(method, {}).get(ratio)
        return "-" if value is None else f"{1 / value:.2f}x"

    return (
        short_model(model),
        str(batch),
        best["method"],
        milliseconds(best["latency_ms"]["median"]),
        ms(gelu),
        times(gelu, ratio),
        ms(fused),
        times(fused, ratio),
        times("geluless_int8", "vs_ft_int8"),
        quality(best),
        quality(ours.get(gelu)),
    )

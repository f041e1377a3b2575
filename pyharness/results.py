"""The result tables: their schema, their files (JSON, CSV, Markdown), and the figures others published beside ours.

A result folder holds `table2.*` and `table1.*`, each JSON `{"meta": {...}, "rows": [...]}`. Units: milliseconds,
percent, bytes, operations (a multiply-add counts as two). What was not measured is null, never a guess.

Run as a program it prints the tables of a result folder, or puts them into README.md and results/README.md:

    python pyharness/results.py results/cpu-2core --readme
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import csv
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyharness.atomic import atomic_path
from pyharness.errors import FormatError, HarnessError, run_cli

_PARENT = Path(__file__).resolve().parent.parent
ROOT = _PARENT if (_PARENT / "pyproject.toml").is_file() else Path.cwd()
"""The checkout; for an installed wheel, which is in none, the current folder."""

METHODS = ("fp32", "ft_int8", "geluless_int8", "geluless_int8_no_kd", "fused_int8_gelu", "fused_int8")
"""The methods of our own, in the order of the rows. Peers stand under their own names behind them.

fused_int8 is the distilled GELU-less model in the fused graph, fused_int8_gelu the GELU teacher in it.
"""

FUSED_OPS = (
    "norm1_shift_partition",
    "qkv_bias",
    "softmax",
    "proj_bias_residual_norm2",
    "fc1_bias_gelu",
    "fc2_bias_residual",
    "patch_merge_norm",
    "reduction_dequantize",
)
"""The fused operations of the FT graph, in the order they run in; the GELU-less graph lacks fc1_bias_gelu."""

FUSED_OPS_V2 = (
    "shift_partition",
    "qkv_bias_normalize",
    "softmax",
    "proj_bias_norm1_residual",
    "fc1_bias_gelu",
    "fc2_bias_norm2_residual",
    "patch_merge",
    "reduction_norm",
)
"""Swin-V2's, each in the place of the one above."""

FUSED_GRAPH_OPS = ("qkv", "attention", "proj_norm", "mlp_norm", "reduction")
"""The operations that only the fused graph has. A GEMM is within each, so their arithmetic is nearly all int8."""

META_FIELDS = ("date", "commit", "dirty", "device", "driver", "cuda", "torch", "engine", "threads", "command")

MARKDOWN_BLOCKS = {
    "diff_baseline": "pyharness/diff_baseline.py",
    "peers_cpu": "benchmarks/peers_cpu.py",
    "roofline_cpu": "benchmarks/roofline_cpu.py",
}
"""What pages take from a Markdown file of a result folder as it is, and the program that writes the file."""

README_NEEDS = ("table2", "table1", "diff_baseline")
"""Blocks that README must have a place for."""

PAGES = ("README.md", "results/README.md")
"""What --readme writes tables into."""

REST_OF_FILE = "\n### All "
"""Where, in such a file, what is too long for a page begins."""

BLOCK_NAMES = {"table2": "Table 2", "table1": "Table 1", "diff_baseline": "The patch series"}


@dataclass(frozen=True)
class Table2Row:
    """One method on one model: accuracy in percent, latency in milliseconds for a whole batch.

    `vs_ft_int8` is the median over rounds of this latency over FT INT8's of the same round (below 1 is faster);
    `vs_ft_int8_quartiles` its 25th and 75th percentile.
    """

    model: str
    img_size: int
    batch: int
    device: str
    method: str
    top1: float | None = None
    top5: float | None = None
    top1_interval95: tuple[float, float] | None = None
    n_eval: int | None = None
    latency_ms: dict[str, float] | None = None
    images_per_s: float | None = None
    vs_ft_int8: float | None = None
    vs_ft_int8_quartiles: tuple[float, float] | None = None
    gemm_providers: dict[str, str] | None = None


@dataclass(frozen=True)
class Table1Row:
    """One operation of one graph, summed over all its calls in a forward pass.

    `drop_ms`: median over rounds of the latency with the op minus without it (null for GEMMs: without them the result
    is not defined); `share`: that drop over the whole latency. `direct_ms`: timed by itself; `direct_share`: that over
    the sum of all ops' direct times. `ceiling_share`: the least time that the machine's measured ceilings allow over
    the time by itself, and `ceiling` which of them sets it ("copy", "s8" or "f32").
    `gpu_ops_bytes`: device-memory traffic by the GPU's own counters; null on a CPU.
    """

    model: str
    batch: int
    graph: str
    op: str
    kind: str
    calls: int
    drop_ms: float | None
    drop_ms_quartiles: tuple[float, float] | None
    share: float | None
    direct_ms: float | None
    direct_share: float | None
    bytes_read: int
    bytes_written: int
    operations: int
    ceiling: str | None = None
    ceiling_share: float | None = None
    gpu_ops_bytes: int | None = None


ROW_TYPES: dict[str, type] = {"table2": Table2Row, "table1": Table1Row}


# --- what others published -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """Figures for one model that are not ours. `paper_drop`: percent by which the paper's GELU-less latency is below FT
    INT8's (RTX 4090, batch 128). The others are FasterTransformer's: ImageNet top-1 of floating point and of INT8 PTQ,
    latency in ms on an A100, batch 64, fp16 and INT8."""

    paper_drop: int
    ft_top1_float: float
    ft_top1_int8: float
    ft_ms_fp16: float
    ft_ms_int8: float


PUBLISHED = {
    "swin_tiny_patch4_window7_224": Published(12, 81.182, 80.748, 10.35, 8.17),
    "swin_small_patch4_window7_224": Published(11, 83.214, 82.904, 17.15, 13.22),
    "swin_base_patch4_window7_224": Published(11, 83.424, 83.116, 21.93, 16.39),
    "swin_large_patch4_window7_224": Published(13, 86.246, 85.892, 41.78, 29.29),
}
"""By timm name. Swin-L's INT8 top-1 is FasterTransformer's int8_mode 2."""

PUBLISHED_WEIGHTS = {"swin_large_patch4_window7_224": "ms_in22k_ft_in1k"}
"""timm's tag of the weights that those figures are of, where it is not ms_in1k."""


def published(model: str) -> Published | None:
    """The figures of a timm name, which may have a tag: None where it is of other weights, or there are none."""
    name, _, tag = model.partition(".")
    return PUBLISHED.get(name) if tag in ("", PUBLISHED_WEIGHTS.get(name, "ms_in1k")) else None


def paper_claim(model: str, method: str) -> str:
    """What the paper claims for this row, in words; empty where it says nothing. For a model that the paper did not
    measure, its claim for the ImageNet models stands in brackets."""
    known = published(model)
    if method == "geluless_int8":
        if known:
            return f"-{known.paper_drop} %, < 0.5 points top-1 lost"
        return "(ImageNet models: -11 to -13 %, < 0.5 points top-1 lost)"
    if method == "geluless_int8_no_kd":
        return "top-1 < 0.9 %" if known else "(ImageNet models: top-1 < 0.9 %)"
    return ""


def published_by_ft(model: str, method: str) -> str:
    """What FasterTransformer published for this row, in words; empty where it did not."""
    known = published(model)
    if known and method == "fp32":
        return f"{known.ft_top1_float:.2f} %; fp16 {known.ft_ms_fp16:.2f} ms"
    if known and method == "ft_int8":
        return f"{known.ft_top1_int8:.2f} %; {known.ft_ms_int8:.2f} ms"
    return ""


# --- files -----------------------------------------------------------------------------------------------------------


def _check_value(where: str, value: Any, annotation: str) -> None:
    optional = "None" in annotation
    if value is None:
        if not optional:
            raise FormatError(f"{where} is null; it needs a value ({annotation})")
        return
    base = annotation.split(" | ")[0]
    if base.startswith("tuple[float, float]"):
        ok = isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(v) for v in value)
    elif base.startswith("dict[str, float]"):
        ok = isinstance(value, dict) and all(_is_number(v) for v in value.values())
    elif base.startswith("dict"):
        ok = isinstance(value, dict)
    elif base == "int":
        ok = isinstance(value, int) and not isinstance(value, bool)
    elif base == "float":
        ok = _is_number(value)
    else:
        ok = isinstance(value, str)
    if not ok:
        raise FormatError(f"{where} is {value!r}; {annotation} is needed")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def validate(kind: str, document: Mapping[str, Any], row_type: type | None = None) -> None:
    """FormatError where `document` is not a `kind` ("table2" or "table1") table: a missing or unknown field, a wrong
    type, a number that is not finite, a share or accuracy out of range. The message names row and field. Another kind
    of table brings its own `row_type`."""
    row_type = row_type or ROW_TYPES[kind]
    if not isinstance(document, Mapping) or not isinstance(document.get("rows"), list):
        raise FormatError(f'{kind}: found no {{"meta": ..., "rows": [...]}}')
    missing = [name for name in META_FIELDS if name not in (document.get("meta") or {})]
    if missing:
        raise FormatError(f"{kind}: meta lacks {', '.join(missing)}")
    fields = {field.name: str(field.type) for field in dataclasses.fields(row_type)}
    for index, row in enumerate(document["rows"]):
        where = f"{kind} row {index}"
        wrong = set(row) ^ set(fields)
        if wrong:
            raise FormatError(f"{where}: missing or unknown fields: {', '.join(sorted(wrong))}")
        for name, annotation in fields.items():
            _check_value(f"{where}: {name}", row[name], annotation)
        for name in ("top1", "top5"):
            if row.get(name) is not None and not 0 <= row[name] <= 100:
                raise FormatError(f"{where}: {name} is {row[name]}; a percentage is needed")


def document_of(meta: Mapping[str, Any], rows: Sequence[Any]) -> dict[str, Any]:
    """The JSON document of a table: rows of dataclasses become dicts, tuples lists."""
    return json.loads(json.dumps({"meta": dict(meta), "rows": [dataclasses.asdict(row) for row in rows]}))


def _flatten(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows without nesting: `latency_ms` becomes `latency_ms_median`, ...; a null stays empty in each of its parts."""
    parts: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
            parts[name] = list(dict.fromkeys([*parts.get(name, []), *keys]))

    def cells(name: str, value: Any) -> dict[str, Any]:
        if not parts[name]:
            return {name: value}
        known = value if isinstance(value, dict) else dict(enumerate(value or ()))
        return {f"{name}_{key}": known.get(key) for key in parts[name]}

    return [{column: v for name, value in row.items() for column, v in cells(name, value).items()} for row in rows]


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as a whole or not at all."""
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` as indented JSON, as a whole or not at all. ValueError for NaN and infinity."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of a document as CSV, nested fields flattened, as a whole or not at all."""
    flat = _flatten(rows)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]) if flat else [])
        writer.writeheader()
        writer.writerows(flat)


def write_table(
    folder: str | Path,
    kind: str,
    meta: Mapping[str, Any],
    rows: Sequence[Any],
    row_type: type | None = None,
    render: Callable[[dict[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """Write `<folder>/<kind>.json`, `.csv` and `.md`; returns the validated document. A kind of table other than
    "table1" and "table2" brings its own `row_type`, and `render`, which makes Markdown of the document."""
    folder = Path(folder)
    document = document_of(meta, rows)
    validate(kind, document, row_type)
    write_json(folder / f"{kind}.json", document)
    write_csv(folder / f"{kind}.csv", document["rows"])
    write_text(folder / f"{kind}.md", render(document) if render else markdown(kind, document))
    return document


def read_document(path: Path, program: str) -> Any:
    """What the JSON file `path`, which `program` writes, holds. FormatError where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"cannot read {path} ({error.strerror}); {program} writes it") from None
    except ValueError as error:
        raise FormatError(f"{path} is not JSON ({error}); {program} writes it anew") from None


def load_table(folder: str | Path, kind: str) -> dict[str, Any]:
    """Read and validate `<folder>/<kind>.json`. FormatError where it is missing, not JSON, or not such a table."""
    document = read_document(Path(folder) / f"{kind}.json", "bash scripts/reproduce.sh")
    validate(kind, document)
    return document


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A Markdown table whose columns also line up as plain text. `right` lists the right-aligned columns."""
    cells = [list(header), *[list(row) for row in rows]]
    right = set(right)
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ":") if i in right else "-" * w for i, w in enumerate(widths)]
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *[line(row) for row in cells[1:]]]) + "\n"


def number(value: float | None, digits: int = 2) -> str:
    """`value` with `digits` decimals; a dash where it was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def milliseconds(value: float | None) -> str:
    """Milliseconds to three significant places, at most three decimals."""
    if value is None:
        return "-"
    return f"{value:.{3 if abs(value) < 1 else 2 if abs(value) < 10 else 1}f}"


def percent_change(ratio: float) -> str:
    """A ratio as a signed change: 0.88 -> `-12.0 %`."""
    return f"{100 * (ratio - 1):+.1f} %"


def _latency(row: Mapping[str, Any]) -> str:
    stats = row["latency_ms"]
    if stats is None:
        return "-"
    return f"{milliseconds(stats['median'])} ({milliseconds(stats['p10'])} to {milliseconds(stats['p90'])})"


def _accuracy(row: Mapping[str, Any]) -> str:
    if row["top1"] is None:
        return "-"
    low, high = row["top1_interval95"] or (None, None)
    return f"{row['top1']:.2f} ({number(low)} to {number(high)})"


def _versus_ft(row: Mapping[str, Any]) -> str:
    if row["vs_ft_int8"] is None:
        return "-"
    if row["method"] == "ft_int8":
        return "baseline"
    return percent_change(row["vs_ft_int8"])


def conditions(meta: Mapping[str, Any]) -> str:
    """One line on how a table was measured."""
    engine = meta.get("engine") or {}
    commit = (meta.get("commit") or "no git")[:12] + (" with local changes" if meta.get("dirty") else "")
    return (
        f"{meta['device']}; {meta['threads']} threads; engine {engine.get('backend', '-')} {engine.get('isa', '')}; "
        f"torch {meta['torch']}; {meta['date'][:10]}; commit {commit}"
    )


def _weight_scales_note(meta: Mapping[str, Any]) -> str:
    """A line where the fused graph's weights were not quantized with a scale for each channel, as in files that do not
    say."""
    scales = meta.get("weight_scales") or "channel"
    if scales == "channel":
        return ""
    return f"The fused graph's weights: `--weight-scales {scales}` (docs/fused.md).\n"


def markdown_table2(document: Mapping[str, Any]) -> str:
    """Table 2 with its notes. `document` as `write_table` returns it."""
    from pyharness.procedural import is_procedural

    header = (
        "model", "batch", "method", "top-1 % (95 % interval)", "images", "latency ms (p10 to p90)", "images/s",
        "vs FT INT8", "the paper claims", "FT published",
    )  # fmt: skip
    data = document["meta"].get("data")

    def elsewhere(figure: str) -> str:
        """A figure of ImageNet; in brackets where these images are certain to be others."""
        others = data is not None and is_procedural(data) and figure and not figure.startswith("(")
        return f"(ImageNet: {figure})" if others else figure

    rows = [
        (
            row["model"],
            str(row["batch"]),
            row["method"],
            _accuracy(row),
            "-" if row["n_eval"] is None else str(row["n_eval"]),
            _latency(row),
            number(row["images_per_s"], 1),
            _versus_ft(row),
            elsewhere(paper_claim(row["model"], row["method"])),
            elsewhere(published_by_ft(row["model"], row["method"])),
        )
        for row in document["rows"]
    ]
    whose = document["meta"].get("data_models")  # not in older files; other models are on the digits, or on none
    images = f"Images{' of ' * bool(whose)}{', '.join(whose or ())}: {data}. " if data else ""
    notes = (
        f"\nMeasured: {conditions(document['meta'])}.\n{images}{_weight_scales_note(document['meta'])}"
        "vs FT INT8: change of latency, median of the ratios within each round. A dash was not measured.\n"
        "The paper's claims: Tayaranian et al. 2024, RTX 4090, batch 128, ImageNet. "
        "FT published: NVIDIA's figures, top-1 on ImageNet and latency on an A100, batch 64.\n"
    )
    return markdown_table(header, rows, right=(1, 4, 6, 7)) + notes


def markdown_table1(document: Mapping[str, Any]) -> str:
    """Table 1 with its notes: one table per graph."""
    meta = document["meta"]
    text = ""
    for graph in dict.fromkeys(row["graph"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["graph"] == graph]
        whole = (meta.get("latency_ms") or {}).get(graph, {}).get("median")
        text += f"`{graph}`, {rows[0]['model']}, batch {rows[0]['batch']}: {milliseconds(whole)} ms in all.\n\n"
        text += _breakdown(rows) + "\n"
    ceilings = meta.get("ceilings") or {}
    text += (
        "drop: latency with the op minus latency without it, and that over the whole (the paper's measure). "
        "direct: timed by itself, all calls, and that over the sum of all ops.\n"
        "of ceiling: the least time that the machine's measured ceilings allow, over the time by itself. "
        "Ceilings here: "
        f"copying {number(ceilings.get('copy_gb_s'), 1)} GB/s, s8 GEMM {number(ceilings.get('s8_gop_s'), 0)} GOP/s, "
        f"f32 {number(ceilings.get('f32_gflop_s'), 0)} GFLOP/s. Above 100 % the data came from the caches.\n"
        "The paper claims (RTX 4090, batch 128) that Softmax and GELU are the two dearest fused operations.\n"
        f"Measured: {conditions(meta)}.\n{_weight_scales_note(meta)}"
    )
    return text


def _breakdown(rows: Sequence[Mapping[str, Any]]) -> str:
    header = (
        "op", "kind", "calls", "drop ms", "share", "direct ms", "share of direct", "MB moved", "Mop", "of ceiling",
    )  # fmt: skip

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    return markdown_table(
        header,
        [
            (
                row["op"],
                row["kind"],
                str(row["calls"]),
                milliseconds(row["drop_ms"]),
                percent(row["share"]),
                milliseconds(row["direct_ms"]),
                percent(row["direct_share"]),
                number((row["bytes_read"] + row["bytes_written"]) / 1e6, 1),
                number(row["operations"] / 1e6, 1),
                percent(row["ceiling_share"]),
            )
            for row in rows
        ],
        right=range(2, len(header)),
    )


def markdown(kind: str, document: Mapping[str, Any]) -> str:
    """The Markdown of a table of `kind`."""
    return markdown_table2(document) if kind == "table2" else markdown_table1(document)


# --- Pages -----------------------------------------------------------------------------------------------------------


def replace_block(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers `<!-- begin NAME -->` and `<!-- end NAME -->` replaced.

    FormatError where the pair of markers is not there exactly once.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise FormatError(f"found no single pair of `{begin}` and `{end}`; put both lines where the table belongs")
    head, tail = text.split(begin)[0], text.split(end)[1]
    return f"{head}{begin}\n{content.rstrip()}\n{end}{tail}"


def readme_with_tables(text: str, folder: Path, *, needed: Sequence[str] = README_NEEDS, root: str = "results/") -> str:
    """`text` of a page with the tables of result folder `folder` in their places.

    A block `NAME of OTHER` takes the Markdown file NAME of another machine: of the folder OTHER beside `folder`. A
    block `at_a_glance of SOME OTHERS` is made of the peers' tables in all those folders, `at_a_glance of SOME OTHERS
    for MODEL` of their rows of one model. From the page, result folders lie in `root`. FormatError where a block of
    `needed` has no place in the text, or what a block takes is not there.
    """
    from pyharness.glance import at_a_glance

    beside = folder.resolve().parent
    for others, model in re.findall(r"<!-- begin at_a_glance of ([\w. -]+?)(?: for ([\w.-]+))? -->", text):
        table = at_a_glance([beside / other for other in others.split()], model or None, root)
        text = replace_block(text, f"at_a_glance of {others}{f' for {model}' * bool(model)}", table)
    for kind in ROW_TYPES:
        if kind in needed or f"<!-- begin {kind} -->" in text:
            text = replace_block(text, kind, markdown(kind, load_table(folder, kind)))
    for name, program in MARKDOWN_BLOCKS.items():
        if name in needed or f"<!-- begin {name} -->" in text:
            text = replace_block(text, name, _short_markdown(folder / f"{name}.md", program))
    for name, other in re.findall(r"<!-- begin (?!at_a_glance)(\w+) of ([\w.-]+) -->", text):
        if name not in MARKDOWN_BLOCKS:
            raise FormatError(f"`<!-- begin {name} of {other} -->`: {name} is none of {', '.join(MARKDOWN_BLOCKS)}")
        content = _short_markdown(beside / other / f"{name}.md", MARKDOWN_BLOCKS[name])
        text = replace_block(text, f"{name} of {other}", content)
    return text


def with_tables(page: str, folder: Path) -> str:
    """The text of `page`, one of PAGES, with the tables of `folder`."""
    try:
        text = (ROOT / page).read_text(encoding="utf-8")
    except OSError as error:
        raise HarnessError(
            f"cannot read {ROOT / page} ({error.strerror}); --readme is for a checkout of the repository"
        ) from None
    if page == "README.md":
        return readme_with_tables(text, folder)
    return readme_with_tables(text, folder, needed=(), root="")


def _short_markdown(file: Path, program: str) -> str:
    """Of a Markdown file that `program` writes, what pages take."""
    try:
        return file.read_text(encoding="utf-8").split(REST_OF_FILE)[0]
    except OSError as error:
        raise FormatError(f"cannot read {file} ({error.strerror}); {program} writes it") from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="results.py",
        description=f"Print the tables of a result folder, or put them into {' and '.join(PAGES)}.",
    )
    parser.add_argument("folder", type=Path, help="result folder, e.g. results/local or results/cpu-2core")
    parser.add_argument("--readme", action="store_true", help="write the tables into the pages, between their markers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    if options.readme:
        pages = {path: with_tables(path, options.folder) for path in PAGES}  # all of them, before one is written
        for path, text in pages.items():
            write_text(ROOT / path, text)
        print(f"{' and '.join(PAGES)} now hold the tables of {options.folder}")
        return 0
    for kind in ROW_TYPES:
        print(f"{BLOCK_NAMES[kind]}\n\n{markdown(kind, load_table(options.folder, kind))}")
    return 0


if __name__ == "__main__":
    run_cli(main)

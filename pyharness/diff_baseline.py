"""What the patch series changes: its size, the two op sequences side by side, the logits, and the latency.

The logits are those of the default model, the micro Swin on the held-out digits: engine baseline, engine GELU-less, and
each one's fake-quantized PyTorch model, compared pair by pair.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import dataclasses
import difflib
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyharness import measure, results
from pyharness.compare import LogitDifference, compare_logits, markdown_differences
from pyharness.config import GRAPHS, MICRO_DIGITS
from pyharness.distributed import need_one_process
from pyharness.errors import FormatError, run_cli
from pyharness.pipeline import Inputs, Pipeline
from pyharness.reproduce_table2 import add_file_options
from pyharness.training import report

if TYPE_CHECKING:
    from pyharness.engine import OpInfo, SwinInt8

DEFAULT_LATENCY_MODEL = "swin_tiny_patch4_window7_224"
DEFAULT_RUNS = 40
EVAL_BATCH = 64


# --- The series -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileChange:
    """Lines that one patch adds to and removes from one file."""

    patch: str
    file: str
    added: int
    removed: int


def diffstat(folder: Path) -> list[FileChange]:
    """The changes of every patch that `folder`/series lists, in order. FormatError where one is missing or empty."""
    series = folder / "series"
    try:
        names = [line.split("#")[0].strip() for line in series.read_text(encoding="utf-8").splitlines()]
        found = [change for name in names if name for change in _changes(folder / name)]
    except OSError as error:
        raise FormatError(f"cannot read {error.filename} ({error.strerror}); the patch series is not whole") from None
    if not found:
        raise FormatError(f"{series} lists no patch")
    return found


def _changes(path: Path) -> list[FileChange]:
    counts: dict[str, list[int]] = {}
    removed_left = added_left = 0  # lines of the current hunk that are still to come, by the hunk's own header
    file = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if removed_left > 0 or added_left > 0:
            if line.startswith("+"):
                counts[file][0] += 1
                added_left -= 1
            elif line.startswith("-"):
                counts[file][1] += 1
                removed_left -= 1
            elif not line.startswith("\\"):
                added_left -= 1
                removed_left -= 1
        elif line.startswith("--- ") or line.startswith("+++ "):
            name = line[4:].split("\t")[0]
            if name != "/dev/null":
                file = name.split("/", 1)[1]
                counts.setdefault(file, [0, 0])
        elif line.startswith("@@ "):
            removed_left, added_left = (_hunk_length(word) for word in line.split()[1:3])
    if not counts:
        raise FormatError(f"{path} changes no file; write the series anew with scripts/patch_ft.sh refresh")
    return [FileChange(path.name, file, added, removed) for file, (added, removed) in counts.items()]


def _hunk_length(word: str) -> int:
    """`-12,7` -> 7; without a comma 1."""
    return int(word.split(",")[1]) if "," in word else 1


# --- The op sequences -------------------------------------------------------------------------------------------------


def first_block(ops: Iterable[OpInfo]) -> list[str]:
    """Names of the ops of the first block, in order: every block of a graph has the same."""
    return [op.name for op in ops if (op.stage, op.block) == (0, 0)]


def side_by_side(left: Sequence[str], right: Sequence[str]) -> list[tuple[str, str]]:
    """The two sequences aligned; an empty string stands where one has nothing."""
    rows: list[tuple[str, str]] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        first, second = list(left[a:b]), list(right[c:d])
        if tag == "replace":
            rows += [(name, "") for name in first] + [("", name) for name in second]
        else:
            height = max(len(first), len(second))
            rows += zip(first + [""] * (height - len(first)), second + [""] * (height - len(second)))
    return rows


# --- The logits -------------------------------------------------------------------------------------------------------


def collect_logits(pipeline: Pipeline) -> tuple[dict[str, Tensor], Tensor]:
    """Logits f32 [n, K] of every variant on the held-out images, by name, and the labels i64 [n]."""
    from pyharness.calibrated import load_calibrated
    from pyharness.data import make_loader
    from pyharness.engine import SwinInt8

    batches = list(make_loader(pipeline.dataset(train=False), EVAL_BATCH))
    models: dict[str, Any] = {"fp32": pipeline.teacher}
    for graph in GRAPHS:
        models[f"fake-quantized {graph}"] = load_calibrated(pipeline.calibrated_path(graph)).to_model().eval()
        models[f"engine {graph}"] = SwinInt8.from_engine_file(pipeline.engine_file(graph))
    logits = {}
    for name, model in models.items():
        report(f"{pipeline.inputs.model}: logits of {name}")
        with torch.inference_mode():
            logits[name] = torch.cat([model(images) for images, _ in batches])
    return logits, torch.cat([labels for _, labels in batches])


COMPARED = (
    ("fake-quantized ft_int8", "engine ft_int8"),
    ("fake-quantized geluless_int8", "engine geluless_int8"),
    ("engine ft_int8", "engine geluless_int8"),
    ("fp32", "fake-quantized ft_int8"),
    ("fp32", "engine ft_int8"),
    ("fp32", "engine geluless_int8"),
)
"""The pairs of the table: each engine against its own model, the two graphs, and all against fp32."""


# --- The program ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def latency_ratio(engines: dict[str, SwinInt8], images: Tensor, runs: int) -> dict[str, Any]:
    """Median latencies of both graphs in ms and the paired ratio GELU-less over FT."""
    calls = {graph: functools.partial(engine, images) for graph, engine in engines.items()}
    samples = measure.time_alternating(calls, runs)
    ratio = measure.paired_ratio(samples, "geluless_int8", "ft_int8")
    return {"latency_ms": {g: measure.summarize(s).to_dict() for g, s in samples.items()}, "ratio": ratio.to_dict()}


def markdown(document: dict[str, Any]) -> str:
    """The report as Markdown."""
    patches, ops, latency = document["patches"], document["ops"], document["latency"]
    added, removed = (sum(change[key] for change in patches) for key in ("added", "removed"))
    table = results.markdown_table
    text = f"The series changes {added + removed} lines: {added} added, {removed} removed.\n\n"
    text += table(
        ("patch", "file", "added", "removed"),
        [(c["patch"], c["file"], str(c["added"]), str(c["removed"])) for c in patches],
        right=(2, 3),
    )
    text += "\nOperations of one block, side by side (an empty place: the graph has no such operation):\n\n"
    text += table(
        ("#", "ft_int8", "geluless_int8"), [(str(i), a, b) for i, (a, b) in enumerate(ops, start=1)], right=(0,)
    )
    logits = document["logits"]
    accuracy = ", ".join(f"{name} {value:.2f} %" for name, value in logits["top1"].items())
    text += f"\nLogits of {logits['model']} on {logits['images']} held-out images. Top-1: {accuracy}.\n\n"
    text += markdown_differences(LogitDifference(**d) for d in logits["differences"])
    ft, ours = (latency["latency_ms"][graph]["median"] for graph in GRAPHS)
    ratio = latency["ratio"]
    low, high = (results.percent_change(ratio[key]) for key in ("q25", "q75"))
    text += (
        f"\nLatency of {latency['model']}, batch {latency['batch']}: FT INT8 {ft:.1f} ms, GELU-less {ours:.1f} ms, "
        f"{results.percent_change(ratio['median'])} (quartiles of the rounds {low} to {high}).\n"
        f"Measured: {results.conditions(document['meta'])}.\n"
    )
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diff_baseline.py",
        description="What the patch series changes against the FT baseline: lines, operations, logits, latency.",
    )
    parser.add_argument(
        "--latency-model", default=DEFAULT_LATENCY_MODEL, metavar="MODEL",
        help="timm name of the model that is timed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images per call (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=DEFAULT_RUNS, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add_file_options(parser, "diff_baseline.json and .md")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    need_one_process()
    measure.need_positive(args, "--batch", "--runs", "--threads")
    from pyharness.engine import SwinInt8, engine_info

    threads, info = measure.set_threads(args.threads), engine_info()
    patches = diffstat(results.ROOT / "patches")
    micro, timed = Pipeline(Inputs(MICRO_DIGITS.name), args.work), Pipeline(Inputs(args.latency_model), args.work)
    logits, labels = collect_logits(micro)
    engines = {graph: SwinInt8.from_engine_file(timed.engine_file(graph)) for graph in GRAPHS}
    images = measure.random_images(timed.config, args.batch)
    report(f"{args.latency_model}: time both graphs in turn, {args.runs} rounds, batch {args.batch}")
    document = {
        "meta": measure.environment(info, threads),
        "patches": [dataclasses.asdict(change) for change in patches],
        "ops": side_by_side(*(first_block(engines[graph].ops(args.batch)) for graph in GRAPHS)),
        "logits": {
            "model": micro.inputs.model,
            "images": len(labels),
            "top1": {n: 100 * (x.argmax(1) == labels).double().mean().item() for n, x in logits.items()},
            "differences": [dataclasses.asdict(compare_logits(a, logits[a], b, logits[b])) for a, b in COMPARED],
        },
        "latency": {
            "model": args.latency_model,
            "batch": args.batch,
            **latency_ratio(engines, images, args.runs),
        },
    }
    results.write_json(args.out / "diff_baseline.json", document)
    text = markdown(document)
    results.write_text(args.out / "diff_baseline.md", text)
    print(f"\nBaseline and patched graph\n\n{text}")
    print("Written:", ", ".join(str(path) for path in sorted(args.out.glob("diff_baseline.*"))))
    return 0


if __name__ == "__main__":
    run_cli(main)

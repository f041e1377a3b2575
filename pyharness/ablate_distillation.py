"""What each open choice of Algorithm 1 is worth: the micro Swin on the digits, one choice changed at a time.

Every variant distils the packaged teacher with the options of `BASE` but for its own change, once for each seed (of the
subset and the order of the images). Measured on the 597 held-out digits: the divergence from the teacher,
KL(teacher || student) in nats, and top-1. The teacher's top-1 leaves little room, so the divergence says more.

Each run is kept under --work; one that was killed goes on, and one that is finished is only read.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyharness import measure, results
from pyharness.config import MICRO_DIGITS
from pyharness.data import DigitsDataset, make_loader
from pyharness.distill import DistillOptions, distill
from pyharness.distributed import need_one_process
from pyharness.errors import HarnessError, run_cli
from pyharness.evaluate import accuracy
from pyharness.models import MICRO_TEACHER, create_model, load_model
from pyharness.pipeline import SOURCES, file_digest, package_versions
from pyharness.plots import plot_ablation
from pyharness.trainer import divergence
from pyharness.training import report, write_csv

BASE = DistillOptions(subset=0.25)
"""The paper's options, but for a greater share of so small a training set: 300 digits, 10 steps per block."""

DEFAULT_SEEDS = 3
DEFAULT_WORK = results.ROOT / "results" / "local" / "work" / "ablation"
DEFAULT_OUT = results.ROOT / "results" / "local" / "ablation"


@dataclass(frozen=True)
class Variant:
    """One row: which choice, what is chosen instead of the base's, and the change of options that says so."""

    choice: str
    chosen: str
    change: Mapping[str, Any]


VARIANTS = (
    Variant("as in the paper", "KL, T 1, first to last, gradual", {}),
    Variant("loss", "soft cross-entropy", {"loss": "soft_ce"}),
    Variant("loss", "temperature 2", {"temperature": 2.0}),
    Variant("loss", "temperature 4", {"temperature": 4.0}),
    Variant("loss", "half of it the labels", {"hard_weight": 0.5}),
    Variant("loss", "the labels alone", {"hard_weight": 1.0}),
    Variant("order", "last block first", {"order": "last_to_first"}),
    Variant("schedule", "all blocks at once", {"schedule": "at_once"}),
    Variant("epochs", "3 per block", {"epochs_per_block": 3}),
    Variant("bias", "FC1 bias kept (fp32 alone)", {"drop_bias": "none"}),
    Variant("optimizer", "carried from block to block", {"optimizer": "carry"}),
    Variant("average", "of the weights, decay 0.9", {"ema_decay": 0.9}),
    Variant("training", "none", {"distill": False}),
)


def run_variant(variant: Variant, seed: int, work: Path) -> dict[str, Any]:
    """Distil and measure, or read what was measured before: one row, accuracies in percent, divergence in nats."""
    options = replace(BASE, seed=seed, **variant.change)
    folder = run_folder(options, work)
    measured = folder / "measured.json"
    if measured.exists():
        return json.loads(measured.read_text(encoding="utf-8"))
    teacher = create_model(MICRO_DIGITS.name, weights="pretrained")
    heldout = DigitsDataset(train=False)
    summary = distill(teacher, MICRO_DIGITS.name, DigitsDataset(train=True), options, folder)
    student = load_model(summary.student_path)[0] if summary.average is None else summary.average
    row = {
        "choice": variant.choice,
        "chosen": variant.chosen,
        "seed": seed,
        "divergence": divergence(student, teacher, heldout),
        "top1": accuracy(student, make_loader(heldout, 128)).top1,
        "steps": summary.steps_per_block * len(summary.rows) if options.distill else 0,
    }
    results.write_json(measured, row)
    return row


def run_folder(options: DistillOptions, work: Path) -> Path:
    """Where a run is kept: its name holds a digest of all that the row depends on."""
    known = {
        "options": asdict(options),
        "teacher": file_digest(MICRO_TEACHER),
        "sources": [file_digest(Path(__file__).with_name(f"{name}.py")) for name in (*SOURCES, "evaluate")],
        "packages": package_versions(),
    }
    return work / hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant: mean, least and greatest over its seeds, and the mean divergence over the base's."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["choice"], row["chosen"]), []).append(row)
    summary = []
    for (choice, chosen), group in grouped.items():
        found = [row["divergence"] for row in group]
        summary.append(
            {
                "choice": choice,
                "chosen": chosen,
                "seeds": len(group),
                "steps": group[0]["steps"],
                "divergence": statistics.mean(found),
                "divergence_min": min(found),
                "divergence_max": max(found),
                "top1": statistics.mean(row["top1"] for row in group),
                "top1_min": min(row["top1"] for row in group),
                "top1_max": max(row["top1"] for row in group),
            }
        )
    base = summary[0]["divergence"]
    return [{**row, "divergence_vs_base": row["divergence"] / base} for row in summary]


def markdown(document: Mapping[str, Any]) -> str:
    """The summary as a table, with its notes."""
    both = "(least to greatest)"
    header = ("choice", "chosen", "steps", f"KL from the teacher {both}", "vs base", f"top-1 % {both}")
    lines = [
        (
            row["choice"],
            row["chosen"],
            str(row["steps"]),
            f"{row['divergence']:.4f} ({row['divergence_min']:.4f} to {row['divergence_max']:.4f})",
            f"{row['divergence_vs_base']:.2f} x",
            f"{row['top1']:.2f} ({row['top1_min']:.2f} to {row['top1_max']:.2f})",
        )
        for row in document["summary"]
    ]
    base, teacher = document["base"], document["teacher"]
    return (
        f"{results.markdown_table(header, lines, right=(2, 4))}\n"
        f"{MICRO_DIGITS.name}, fp32, on 597 held-out digits; mean over {document['summary'][0]['seeds']} seeds. KL in "
        f"nats at temperature 1. The teacher's top-1 is {teacher['top1']:.2f} %.\n"
        f"Base: learning rate {base['lr']:g}, momentum {base['momentum']:g}, batch {base['batch_size']}, "
        f"{100 * base['subset']:g} % of 1200 images, {base['epochs_per_block']} epoch per block; each row changes one "
        "choice.\n"
        f"Measured: {results.conditions(document['meta'])}.\n"
    )


def write_results(out: Path, meta: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], teacher_top1: float) -> None:
    """ablation.json, .csv (a row per run), .md and .png in `out`."""
    document = {
        "meta": meta,
        "base": asdict(BASE),
        "teacher": {"top1": teacher_top1},
        "summary": summarize(rows),
        "rows": list(rows),
    }
    results.write_json(out / "ablation.json", document)
    write_csv(out / "ablation.csv", list(rows[0]), rows)
    results.write_text(out / "ablation.md", markdown(document))
    plot_ablation(document, out / "ablation.png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ablate_distillation.py",
        description="Distil the micro Swin on the digits with one of Algorithm 1's choices changed at a time. "
        "About 5 minutes on one CPU core; started again, it goes on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="tables and figure go here")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, metavar="DIR", help="the runs are kept here")
    parser.add_argument("--seeds", type=int, default=DEFAULT_SEEDS, metavar="N", help="runs of each variant")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    need_one_process()
    if args.seeds < 1:
        raise HarnessError(f"--seeds must be at least 1, found {args.seeds}")
    torch.set_num_threads(1)  # the layers are too small for a second one
    meta = measure.environment(None, 1)
    rows: list[dict[str, Any]] = []
    total = len(VARIANTS) * args.seeds
    for variant in VARIANTS:
        for seed in range(args.seeds):
            row = run_variant(variant, seed, args.work)
            rows.append(row)
            report(
                f"{len(rows)}/{total} {row['choice']}: {row['chosen']}, seed {seed}: "
                f"KL {row['divergence']:.4f}, top-1 {row['top1']:.2f} %"
            )
    teacher = create_model(MICRO_DIGITS.name, weights="pretrained")
    write_results(args.out, meta, rows, accuracy(teacher, make_loader(DigitsDataset(train=False), 128)).top1)
    print((args.out / "ablation.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    run_cli(main)

"""How far models' results are from a reference's, on images without labels: the first thing to look at after PTQ.

    python pyharness/compare.py --data DIR FILE my.calibrated.safetensors my.engine.safetensors --graph fused_int8

The first file is the reference. Where the engine file is far from it and the calibrated checkpoint (fake-quantized in
PyTorch, as --graph) as well, calibration is the cause; where only the engine file is, the engine.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset

from pyharness import results
from pyharness.data import (
    CORRUPT,
    DATA_HELP,
    add_max_corrupt,
    check_images,
    evaluation_indices,
    get_dataset,
    make_loader,
    take_reading_options,
)
from pyharness.errors import DataError, HarnessError, run_cli
from pyharness.evaluate import Predictor, add_graph_arguments, check_graph_arguments, open_predictor
from pyharness.training import progress, report

IMAGES = 256


@dataclass(frozen=True)
class LogitDifference:
    """How far the logits `other` are from `reference`. SQNR in dB (null where they are equal), agreement in percent."""

    reference: str
    other: str
    max_abs: float
    mean_abs: float
    sqnr_db: float | None
    top1_agreement: float


def compare_logits(reference: str, a: Tensor, other: str, b: Tensor) -> LogitDifference:
    """Compare logits f32 [n, K]. SQNR = 10 log10(sum a^2 / sum (a - b)^2), in float64."""
    a, b = a.double(), b.double()
    error = (a - b).abs()
    noise = error.square().sum()
    return LogitDifference(
        reference=reference,
        other=other,
        max_abs=error.max().item(),
        mean_abs=error.mean().item(),
        sqnr_db=(10 * torch.log10(a.square().sum() / noise)).item() if noise > 0 else None,
        top1_agreement=100 * (a.argmax(1) == b.argmax(1)).double().mean().item(),
    )


def markdown_differences(differences: Iterable[LogitDifference]) -> str:
    """A table of them."""
    return results.markdown_table(
        ("logits of", "against", "max difference", "mean difference", "SQNR dB", "same top-1"),
        [
            (
                d.other, d.reference, f"{d.max_abs:.4f}", f"{d.mean_abs:.5f}",
                "equal" if d.sqnr_db is None else f"{d.sqnr_db:.1f}", f"{d.top1_agreement:.2f} %",
            )
            for d in differences
        ],
        right=(2, 3, 4, 5),
    )  # fmt: skip


@torch.inference_mode()
def logits_of(predictor: Predictor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Logits f32 [n, K] of `--images` images through the model's own transforms, and which of them, by their numbers
    i64 [n]: not those that cannot be read. DataError where these are too many, HarnessError for results that are not
    finite."""
    dataset = get_dataset(args.data, predictor.model_name, train=False, model=predictor.timm_model, labels=False)
    indices = evaluation_indices(len(dataset), args.images)
    loader = make_loader(Subset(dataset, indices.tolist()), args.batch, workers=args.workers)
    found, readable = [], []
    for images, labels in progress(loader, total=len(loader), initial=0, label=predictor.kind):
        kept = labels != CORRUPT
        readable.append(kept)
        if kept.any():
            found.append(predictor.predict(images[kept]).float())
    check_images(dataset, None, args.max_corrupt)
    if not found:
        raise DataError(f"none of the {len(indices)} images can be read")
    logits = torch.cat(found)
    if not (logits.isfinite().all() and logits.any()):  # neither has a distance in dB
        raise HarnessError(f"{predictor.model_name}, {predictor.kind}: its results are not finite, or zero throughout")
    return logits, indices[torch.cat(readable)]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="How far models' logits (or features) are from the first one's, on images whose labels are not "
        "looked at. FILE is a floating-point checkpoint, a calibrated checkpoint (fake-quantized in PyTorch) or an "
        "engine file.",
    )
    parser.add_argument("reference", metavar="REFERENCE", help="the file that the others are compared with")
    parser.add_argument("others", nargs="+", metavar="FILE")
    parser.add_argument("--model", help="timm name, for published checkpoints, which do not hold it")
    parser.add_argument(
        "--data", metavar="DATA",
        help=f"{DATA_HELP}; a folder of images at any depth does (default: the held-out digits)",
    )  # fmt: skip
    parser.add_argument(
        "--images", "--limit", type=int, default=IMAGES, metavar="N",
        help="one from each of N equal stretches of the set, always the same ones (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images per call (default: %(default)s)")
    add_graph_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write the table to as well")
    add_max_corrupt(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    take_reading_options(args, "--images")
    check_graph_arguments(args, (args.reference, *args.others))
    differences, reference, indices = [], None, None
    for path in (args.reference, *args.others):
        predictor = open_predictor(path, args.model, args.graph, args.weight_scales)
        report(f"{path}: {predictor.model_name}, {predictor.kind}")
        logits, seen = logits_of(predictor, args)
        if reference is None:
            reference, indices = logits, seen
            continue
        if logits.shape[1] != reference.shape[1]:
            raise HarnessError(
                f"{path}: has {logits.shape[1]} results per image, {args.reference} has {reference.shape[1]}; they "
                "cannot be compared"
            )
        if not torch.equal(seen, indices):
            raise HarnessError(f"{path}: other images could be read than for {args.reference}; mend the data set")
        differences.append(compare_logits(args.reference, reference, path, logits))
    print(f"{markdown_differences(differences)}\n{len(reference)} images of {args.data or 'the held-out digits'}.")
    if args.out:
        document = {
            "data": args.data or "digits", "images": len(reference),
            "differences": [dataclasses.asdict(d) for d in differences],
        }  # fmt: skip
        results.write_json(args.out, document)
    return 0


if __name__ == "__main__":
    run_cli(main)

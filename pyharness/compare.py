"""How far models' results are from a reference's, on images without labels: the first thing to look at after PTQ.

    python pyharness/compare.py --data DIR FILE my.calibrated.safetensors my.engine.safetensors --graph fused_int8

The first file is the reference. Where the engine file is far from it and the calibrated checkpoint (fake-quantized in
PyTorch, as --graph) as well, calibration is the cause, and --layers says where; where only the engine file is, the
engine.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from pyharness import results
from pyharness.atomic import make_writable_folder
from pyharness.config import FUSED_GRAPH
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
from pyharness.distributed import need_one_process
from pyharness.errors import DataError, HarnessError, run_cli
from pyharness.evaluate import Predictor, add_graph_arguments, check_graph_arguments, kind_of, open_predictor
from pyharness.training import progress, report

if TYPE_CHECKING:
    from pyharness.layers import LayerAnalysis

IMAGES = 256
LAYER_IMAGES = 32
"""With --layers, where each image is computed some hundred times."""
LINE_SECONDS = 10.0
"""Without a terminal, seconds between two lines of progress of --layers."""


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
    indices = evaluation_indices(len(dataset), args.images or IMAGES)
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
        "engine file. With --layers, what each quantizer of a calibrated checkpoint costs.",
    )
    parser.add_argument("reference", metavar="REFERENCE", help="the file that the others are compared with")
    parser.add_argument("others", nargs="+", metavar="FILE")
    parser.add_argument("--model", help="timm name, for published checkpoints, which do not hold it")
    parser.add_argument(
        "--data", metavar="DATA",
        help=f"{DATA_HELP}; a folder of images at any depth does (default: the held-out digits)",
    )  # fmt: skip
    parser.add_argument(
        "--images", "--limit", type=int, metavar="N",
        help="one from each of N equal stretches of the set, always the same ones "
        f"(default: {IMAGES}, with --layers {LAYER_IMAGES})",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images per call (default: %(default)s)")
    add_graph_arguments(parser)
    parser.add_argument(
        "--layers", action="store_true",
        help="REFERENCE is a floating-point checkpoint, FILE a calibrated one made of it: what each quantizer makes of "
        "its input, how much it clips, and what leaving it out gains. Takes some hundred passes over the images",
    )  # fmt: skip
    parser.add_argument(
        "--kinds", metavar="KINDS",
        help="with --layers, leave out only these, with commas: weights, activations, or names such as fc2_input "
        "(default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="JSON file to write the table to as well; with --layers, a folder for layers.json, .md and .png",
    )  # fmt: skip
    add_max_corrupt(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    return parser


def compare_layers(args: argparse.Namespace) -> int:
    """The program with --layers."""
    from pyharness import layers
    from pyharness.calibrated import load_calibrated
    from pyharness.fused_fakequant import model_in_graph
    from pyharness.models import model_from_config, note_data

    kinds = layers.chosen_kinds(args.kinds)
    found = [kind_of(path) for path in (args.reference, *args.others)]
    if found != ["fp32", "calibrated"]:
        raise HarnessError(
            "--layers takes two files, a floating-point checkpoint and the calibrated checkpoint made of it; these are "
            f"{', '.join(found)}"
        )
    path, args.images = args.others[0], args.images or LAYER_IMAGES
    checkpoint = load_calibrated(path, args.model)
    config, scales = checkpoint.config, args.weight_scales or "channel"
    analysis = layers.LayerAnalysis(model_in_graph(checkpoint, args.graph, scales, keep_weights=True), kinds)
    reference, indices = logits_of(open_predictor(args.reference, args.model), args)
    _need_same_results(path, config.num_classes or config.num_features, args.reference, reference.shape[1])
    timm_model = model_from_config(config)
    note_data(timm_model, checkpoint.meta)
    dataset = get_dataset(args.data, config.name, train=False, model=timm_model, labels=False)
    loader = make_loader(Subset(dataset, indices.tolist()), args.batch, workers=args.workers)
    started = time.monotonic()
    steps = _analysed(analysis, loader, reference, path)
    total = len(loader) * analysis.steps()
    for _ in progress(steps, total=total, initial=0, label="leaving out", unit="step", every=LINE_SECONDS):
        pass
    document = {
        "reference": args.reference, "file": path, "model": config.name, "graph": args.graph or checkpoint.graph,
        "weight_scales": scales if args.graph == FUSED_GRAPH else None, "data": args.data or "digits",
        "seconds": time.monotonic() - started, **dataclasses.asdict(analysis.result()),
    }  # fmt: skip
    print(f"{layers.markdown_layers(document, layers.TOP)}\n{layers.conditions(document)}")
    if args.out:
        layers.write_layers(args.out, document)
        report(f"wrote layers.json, layers.md and layers.png in {args.out}")
    return 0


def _analysed(analysis: LayerAnalysis, loader: DataLoader, reference: Tensor, path: str) -> Iterator[None]:
    """Run `analysis` on the images of `loader`, whose reference logits are `reference` [n, K]; yields after each step.
    After the first, two forward passes, it says how long the rest will take."""
    seen, begin = 0, time.monotonic()
    for images, labels in loader:
        if (labels == CORRUPT).any():
            raise HarnessError(f"{path}: other images could be read than for the reference; mend the data set")
        for step, _ in enumerate(analysis.run(images, reference[seen : seen + len(images)])):
            if seen == step == 0:
                minutes = (time.monotonic() - begin) / 120 * analysis.passes() * len(reference) / len(images)
                report(f"{path}: {analysis.described()}, {len(reference)} images: about {max(minutes, 0.1):.1f} min")
            yield
        seen += len(images)


def _need_same_results(path: str, found: int, reference: str, wanted: int) -> None:
    if found != wanted:
        raise HarnessError(f"{path}: has {found} results per image, {reference} has {wanted}; they cannot be compared")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    need_one_process()
    take_reading_options(args, "--images")
    check_graph_arguments(args, (args.reference, *args.others))
    if args.out:  # which would be a pity to find out behind all the images
        make_writable_folder(args.out / "layers.json" if args.layers else args.out)
    if args.layers:
        return compare_layers(args)
    if args.kinds:
        raise HarnessError("--kinds is for --layers")
    differences, reference, indices = [], None, None
    for path in (args.reference, *args.others):
        predictor = open_predictor(path, args.model, args.graph, args.weight_scales)
        report(f"{path}: {predictor.model_name}, {predictor.kind}")
        logits, seen = logits_of(predictor, args)
        if reference is None:
            reference, indices = logits, seen
            continue
        _need_same_results(path, logits.shape[1], args.reference, reference.shape[1])
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

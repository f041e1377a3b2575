"""Top-1 and top-5 accuracy of whatever gives logits: fp32 models, calibrated (fake-quantized) ones, engine files."""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyharness.errors import CheckpointError, DataError, HarnessError, run_cli

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class EvalResult:
    """Accuracies in percent over `n` images; `interval95` is the Wilson score interval of top1, in percent.

    `top5` is None for fewer than 6 classes, where it would say nothing.
    """

    top1: float
    top5: float | None
    n: int
    interval95: tuple[float, float]


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share, in percent; honest also near 0 and 100 %. ValueError unless n > 0."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} of {n} is not a share")
    p = correct / n
    centre = p + Z_95**2 / (2 * n)
    spread = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
    scale = 100.0 / (1 + Z_95**2 / n)
    return max(0.0, scale * (centre - spread)), min(100.0, scale * (centre + spread))


@torch.inference_mode()
def accuracy(
    predict: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]], limit: int | None = None
) -> EvalResult:
    """Accuracy of `predict` (images f32 [B, C, H, W] -> logits [B, K]) on the batches of `loader`, labels i64 [B].

    Stops after `limit` images. DataError where there is no image, or a label is no class of the model; HarnessError
    where a logit is not finite, which would otherwise count as a wrong answer.
    """
    n, top1, top5, classes = 0, 0, 0, 0
    for images, labels in loader:
        if limit is not None:
            images, labels = images[: limit - n], labels[: limit - n]
        if len(labels) == 0:
            break
        logits = predict(images).cpu().float()
        if not logits.isfinite().all():
            bad = int((~logits.isfinite().all(dim=1)).nonzero()[0])
            raise HarnessError(
                f"the logits of image {n + bad} are not finite; the model's weights or scales are broken"
            )
        classes = logits.shape[1]
        if int(labels.max()) >= classes:
            raise DataError(f"an image has label {int(labels.max())}, the model has {classes} classes; wrong data set?")
        hits = logits.topk(min(5, classes), dim=1).indices == labels[:, None].cpu()
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.any(dim=1).sum())
        n += len(labels)
    if n == 0:
        raise DataError("there is no image to evaluate on")
    return EvalResult(
        top1=100.0 * top1 / n, top5=100.0 * top5 / n if classes > 5 else None, n=n, interval95=wilson_interval(top1, n)
    )


# --- The program ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictor:
    """A model ready to evaluate: `kind` names what it is, `timm_model` owns the image transforms."""

    kind: str
    model_name: str
    predict: Callable[[Tensor], Tensor]
    timm_model: torch.nn.Module


def open_predictor(path: str | Path, name: str | None = None) -> Predictor:
    """The model in a file, whichever kind of file it is: engine file, calibrated checkpoint or fp32 checkpoint.

    `name` is the timm name for fp32 checkpoints that do not hold it. Raises what the file's own loader raises.
    """
    kind = _kind_of(Path(path))
    return {"engine": _open_engine, "calibrated": _open_calibrated, "fp32": _open_fp32}[kind](path, name)


def _kind_of(path: Path) -> str:
    from pyharness.checkpoint import load_checkpoint
    from pyharness.engine_file import MAGIC
    from pyharness.tensor_file import load_tensors

    if path.suffix == ".safetensors" and load_tensors(path, CheckpointError)[1].get("format") == MAGIC:
        return "engine"
    state, _ = load_checkpoint(path)
    return "calibrated" if any(key.endswith("_quantizer._amax") for key in state) else "fp32"


def _open_engine(path: str | Path, name: str | None) -> Predictor:
    from pyharness.engine import SwinInt8
    from pyharness.engine_file import load_engine_file
    from pyharness.models import model_from_config

    content = load_engine_file(path)
    _check_name(path, content.config.name, name)
    engine = SwinInt8.from_engine_file(content)
    return Predictor(f"engine, {content.graph}", content.config.name, engine, model_from_config(content.config))


def _open_calibrated(path: str | Path, name: str | None) -> Predictor:
    from pyharness.calibrated import load_calibrated
    from pyharness.models import model_from_config

    model = load_calibrated(path).to_model().eval()
    _check_name(path, model.config.name, name)
    return Predictor(f"fake-quantized, {model.graph}", model.config.name, model, model_from_config(model.config))


def _open_fp32(path: str | Path, name: str | None) -> Predictor:
    from pyharness.models import is_geluless, load_model

    model, meta = load_model(path, name)
    return Predictor("fp32, GELU-less" if is_geluless(model) else "fp32", meta["model"], model, model)


def _check_name(path: str | Path, found: str, wanted: str | None) -> None:
    if wanted not in (None, found):
        raise CheckpointError(f"{path}: is of {found}, not of {wanted}; leave --model out")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Accuracy on held-out images, of an fp32 checkpoint, a calibrated checkpoint (fake-quantized in "
        "PyTorch) or an engine file (run by the compiled INT8 engine). Which of them it is, the file says.",
    )
    parser.add_argument(
        "weights", nargs="+", metavar="FILE", help="one or more files, each evaluated on the same images"
    )
    parser.add_argument("--model", help="timm name, for published checkpoints, which do not hold it")
    parser.add_argument("--data", metavar="DIR", help="ImageNet-style folder with val/ (default: the held-out digits)")
    parser.add_argument("--batch", type=int, default=64, help="images per call (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate on the first N images only")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    from pyharness.data import get_dataset, make_loader

    args = build_parser().parse_args(argv)
    for flag, value in (("--batch", args.batch), ("--limit", args.limit), ("--threads", args.threads)):
        if value is not None and value < 1:
            raise HarnessError(f"{flag} must be at least 1, found {value}")
    if args.threads:
        torch.set_num_threads(args.threads)
    for path in args.weights:
        predictor = open_predictor(path, args.model)
        dataset = get_dataset(args.data, predictor.model_name, train=False, model=predictor.timm_model)
        result = accuracy(predictor.predict, make_loader(dataset, args.batch, workers=args.workers), args.limit)
        low, high = result.interval95
        top5 = "" if result.top5 is None else f", top-5 {result.top5:.2f} %"
        print(
            f"{path} ({predictor.model_name}, {predictor.kind}): top-1 {result.top1:.2f} % "
            f"[{low:.2f}, {high:.2f}]{top5}, {result.n} images",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    run_cli(main)

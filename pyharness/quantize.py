"""Post-training calibration: find the amax of every quantizer, and write the calibrated checkpoint.

FasterTransformer's defaults: per-tensor INT8, full range; activations by the 99.99 percentile of a histogram, weights
by their maximum; 10 batches of 8 images. Quantizers and calibrators are ModelOpt's (pyharness/fakequant.py).
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import importlib.metadata
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyharness.calibrated import CalibratedCheckpoint, checkpoint_of, save_calibrated
from pyharness.config import MICRO_DIGITS
from pyharness.data import (
    DATA_HELP,
    add_labels,
    add_max_corrupt,
    check_images,
    get_dataset,
    input_normalization,
    make_loader,
    read_labels,
    take_reading_options,
)
from pyharness.distributed import need_one_process
from pyharness.errors import CalibrationError, DataError, HarnessError, run_cli
from pyharness.fakequant import FakeQuantSwin, modelopt_quantization
from pyharness.model_card import sha256, write_card
from pyharness.models import is_known, known_classes, note_data
from pyharness.training import progress, report

if TYPE_CHECKING:
    from modelopt.torch.quantization.nn import TensorQuantizer
    from timm.models.swin_transformer import SwinTransformer

    from pyharness.config import SwinConfig

METHODS = ("percentile", "max", "mse", "entropy")
PERCENTILE = 99.99
BATCHES = 10
BATCH_SIZE = 8

MAX_BINS = 1 << 19
"""Where a later batch exceeds the range of a quantizer's first one, ModelOpt's histogram of 2048 bins grows by more of
the same width. 256 times the range is far beyond what images of one kind differ by, and some GB in the mse search."""

LINE_SECONDS = 10.0
"""Without a terminal, seconds between two lines of progress."""

CANDIDATES = 128
"""How many amax values the mse and entropy searches try. ModelOpt's entropy search is a Python loop over all bins for
each, too slow to try every bin."""


@torch.no_grad()
def calibrate(
    model: FakeQuantSwin, batches: Iterable[Tensor], method: str = "percentile", percentile: float = PERCENTILE
) -> int:
    """Set the amax of every quantizer of `model` from `batches` of images f32 [B, in_chans, H, W]; the images' number.

    Activations by `method`, weights by their maximum. Statistics are those of the floating-point model. Raises
    CalibrationError naming every quantizer that saw NaN, got no usable amax or met ranges too unequal for a histogram
    (`MAX_BINS`); DataError where there is no batch.
    """
    if method not in METHODS:
        raise HarnessError(f"calibration method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise HarnessError(f"percentile {percentile:g} is not in (0, 100]")
    quantizers = dict(model.quantizers())
    weights = {name: q for name, q in quantizers.items() if name.endswith("_weight_quantizer")}
    activations = {name: q for name, q in quantizers.items() if name not in weights}
    _calibrate_weights(model, weights)
    images = _collect(model, activations, batches, "max" if method == "max" else "histogram")
    chosen = progress(
        activations.values(), total=len(activations), initial=0, label="choosing ranges", unit="quantizer",
        every=LINE_SECONDS,
    )  # fmt: skip
    for quantizer in chosen:
        _set_amax(quantizer, method, percentile)
    CalibratedCheckpoint(model.config, model.graph, model.int8_mode, model.state_dict()).check("calibration")
    return images


def _calibrate_weights(model: FakeQuantSwin, quantizers: dict[str, TensorQuantizer]) -> None:
    for name, quantizer in quantizers.items():
        weight = model.get_parameter(name.replace("_weight_quantizer", "weight"))
        _require_finite(name, weight)
        calibrator = modelopt_quantization().calib.MaxCalibrator(num_bits=8, axis=None)
        calibrator.collect(weight)
        quantizer.amax = calibrator.compute_amax()


def _collect(
    model: FakeQuantSwin, quantizers: dict[str, TensorQuantizer], batches: Iterable[Tensor], calibrator: str
) -> int:
    """Run the floating-point model on `batches`, the calibrators watching; the number of images."""
    images = 0
    watched = [quantizer for _, quantizer in model.quantizers()]
    hooks = [q.register_forward_pre_hook(_checks(name)) for name, q in quantizers.items()]
    try:
        for quantizer in watched:
            quantizer.disable_quant()
        for quantizer in quantizers.values():
            quantizer.set_from_attribute_config({"calibrator": calibrator})
            quantizer.enable_calib()
        for batch in batches:
            model(batch)
            images += len(batch)
    finally:
        for quantizer in watched:
            quantizer.disable_calib()
            quantizer.enable_quant()
        for hook in hooks:
            hook.remove()
    if not images:
        raise DataError("there are no images to calibrate with; at least one batch is needed")
    return images


def _checks(name: str):
    """A hook with what is needed of a quantizer's input, ahead of its calibrator."""

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _require_finite(name, inputs[0])
        edges = getattr(module._calibrator, "_calib_bin_edges", None)
        if edges is not None:
            _require_room(name, inputs[0], edges)

    return hook


def _require_room(name: str, x: Tensor, edges: Tensor) -> None:
    """CalibrationError where the histogram with the bins `edges`, f32 [bins + 1], would grow past MAX_BINS."""
    found, width = float(x.abs().max()), float(edges[1] - edges[0])
    if found > float(edges[-1]) and found > MAX_BINS * width:
        raise CalibrationError(
            f"{name} saw values up to {float(edges[-1]):g} at first and up to {found:g} in a later batch, too far "
            "apart for one histogram; take --method max, larger batches (--batch) or other images (--seed, --data)"
        )


def _require_finite(name: str, x: Tensor) -> None:
    """NaN would give a histogram without it, and so a scale that looks sound."""
    if not x.isfinite().all():
        raise CalibrationError(f"{name} saw NaN or infinity; the weights or the images are damaged")


def _set_amax(quantizer: TensorQuantizer, method: str, percentile: float) -> None:
    """Compute the calibrator's amax. A tensor of zeros gives 0, which the caller reports."""
    calibrator = quantizer._calibrator
    if method == "max":
        quantizer.load_calib_amax()
    elif not calibrator._calib_bin_edges[-1] > 0:
        quantizer.amax = torch.tensor(0.0)
    elif method == "percentile":
        quantizer.load_calib_amax(method="percentile", percentile=percentile)
    elif method == "mse":
        quantizer.amax = mse_amax(calibrator._calib_hist, calibrator._calib_bin_edges)
    else:
        stride = max(1, len(calibrator._calib_hist) // CANDIDATES)
        quantizer.load_calib_amax(method="entropy", stride=stride)
    calibrator.reset()


def mse_amax(counts: Tensor, edges: Tensor) -> Tensor:
    """The amax, float32 scalar, of least squared quantization error on a histogram of absolute values.

    counts [bins], edges [bins + 1]. Candidates are bin centres, as in ModelOpt's search. That one is not called: in
    ModelOpt 0.47 it passes the bit width where the quantizer takes a bias, and for normal data finds a fifteenth of
    the right amax.
    """
    # NumPy, since PyTorch's threads cost more than they save on arrays this small.
    histogram, limits = counts.double().numpy(), edges.double().numpy()
    centres = (limits[1:] + limits[:-1]) / 2
    candidates = centres[len(centres) // 16 :: max(1, len(centres) // CANDIDATES)]
    steps = candidates[:, None] / 127
    error = (centres / steps).round().clip(max=127) * steps - centres
    return torch.tensor(candidates[(error**2 * histogram).sum(1).argmin()], dtype=torch.float32)


def quantize(
    model: SwinTransformer,
    config: SwinConfig,
    batches: Iterable[Tensor],
    *,
    int8_mode: int = 1,
    method: str = "percentile",
    percentile: float = PERCENTILE,
    meta: dict | None = None,
    data: str | None = None,
    normalization: dict | None = None,
) -> CalibratedCheckpoint:
    """Calibrate a timm model (GELU or GELU-less) and return the checkpoint.

    `data` names the images in its meta data, `normalization` tells there how they come in; None is how the model's file
    or timm's name say that its images do (`data.input_normalization`), and nothing of a model that neither knows. The
    names of the classes are those that the model's file has, or timm of its weights of ImageNet-1k.

    Errors as `calibrate`.
    """
    if normalization is None and is_known(model, config.name):
        normalization = input_normalization(None, config.name, model)
    fake = FakeQuantSwin.from_timm(model, config, int8_mode)
    images = calibrate(fake, batches, method, percentile)
    calibration = {"method": method, "images": images, "modelopt": importlib.metadata.version("nvidia-modelopt")}
    if method == "percentile":
        calibration["percentile"] = percentile
    if data is not None:
        calibration["data"] = data
    found = {"input": normalization, "classes": known_classes(model)}
    noted = {key: value for key, value in found.items() if value}
    return checkpoint_of(fake, {**(meta or {}), "calibration": calibration, **noted})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantize.py",
        description="Calibrate a Swin model for INT8 and write the calibrated checkpoint (FasterTransformer's names).",
        epilog="Next: python pyharness/convert.py to-engine OUT ENGINE_FILE",
    )
    parser.add_argument(
        "--model",
        help="timm name, or swin_micro_digits; read from the checkpoint where it says so (default, without --weights "
        "and --data: swin_micro_digits)",
    )
    parser.add_argument(
        "--weights",
        default="pretrained",
        help="checkpoint or Hugging Face folder, 'pretrained' (timm's hub; the micro model's is included) or 'random'",
    )
    parser.add_argument(
        "--activation",
        choices=("gelu", "relu"),
        help="of a checkpoint that does not say its own (all FC1 biases zero), and of random weights (default: gelu)",
    )
    parser.add_argument("--out", required=True, type=Path, help="calibrated checkpoint to write: .safetensors or .pth")
    parser.add_argument(
        "--data", metavar="DATA",
        help=f"{DATA_HELP}; labels are not looked at, so a folder of images at any depth does (default: the digits)",
    )  # fmt: skip
    parser.add_argument("--method", choices=METHODS, default="percentile", help="for activations (default: percentile)")
    parser.add_argument("--percentile", type=float, default=PERCENTILE, help=f"default: {PERCENTILE}")
    parser.add_argument("--int8-mode", type=int, choices=(1, 2), default=1, help="2: FC2 and reduction in s32 (Swin-L)")
    parser.add_argument(
        "--batches", type=int, default=BATCHES, metavar="N", help="to calibrate on (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="images each (default: %(default)s)"
    )
    add_labels(parser)
    add_max_corrupt(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images, and of random weights")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    need_one_process()
    take_reading_options(args, "--batches")
    if args.out.suffix not in (".safetensors", ".pth", ".pt"):
        raise HarnessError(f"--out {args.out}: the name must end in .safetensors, .pth or .pt")
    model, config, meta = _load_model(args)
    if args.labels:
        note_data(model, {"classes": read_labels(args.labels, config.num_classes)})
    from pyharness.models import weights_source

    dataset = get_dataset(args.data, config.name, train=True, model=model, labels=False)
    loader = make_loader(
        dataset, args.batch, shuffle=True, seed=args.seed, workers=args.workers, batches=args.batches
    )
    asked = args.batches * args.batch
    batches = progress(
        (images for images, _ in loader), total=len(loader), initial=0, label="calibrating", every=LINE_SECONDS
    )
    report(f"calibrating {config.name}: {min(asked, len(dataset))} images ...")
    data = args.data or "scikit-learn's digits, training images"
    started = time.perf_counter()
    checkpoint = quantize(
        model,
        config,
        batches,
        int8_mode=args.int8_mode,
        method=args.method,
        percentile=args.percentile,
        meta={**meta, "seed": args.seed},
        data=data,
        normalization=input_normalization(args.data, config.name, model),
    )
    check_images(dataset, None, args.max_corrupt)  # each is named already, and there is no folder for a list
    images = checkpoint.meta["calibration"]["images"]
    if images < asked:
        report(f"note: calibrated on {images} images; {asked} were asked for (--batches x --batch)")
    save_calibrated(args.out, checkpoint)
    write_card(
        args.out,
        "calibrated checkpoint",
        inputs={"weights": weights_source(config.name, args.weights)},
        data=data,
        argv=argv,
    )
    print(
        f"{args.out}: {config.name}, {checkpoint.graph}, int8_mode {checkpoint.int8_mode}, "
        f"{len(list(checkpoint.required()))} quantizers from {images} images "
        f"in {time.perf_counter() - started:.1f} s"
    )
    return 0


def _load_model(args: argparse.Namespace) -> tuple[SwinTransformer, SwinConfig, dict]:
    """Model, geometry, and where the weights are from: file, hash, how they were distilled, and their own meta data.

    The latter stands apart: an accuracy in it is that of the weights before calibration.
    """
    from pyharness.models import config_of, create_model, load_model, noted_weights, weights_source

    name = args.model or (MICRO_DIGITS.name if args.weights == "pretrained" and args.data is None else None)
    source = weights_source(name, args.weights)
    origin = {"weights": Path(source).name}
    if source in ("random", "pretrained"):
        if not name:
            raise HarnessError(f"--weights {args.weights} needs the model's name (--model)")
        model = create_model(name, weights=args.weights, seed=args.seed, activation=args.activation)
        return model, config_of(model, name), {**origin, **noted_weights(model)}
    model, meta = load_model(source, name, activation=args.activation)
    origin["weights_sha256"] = sha256(source)
    if "distillation" in meta:
        origin["distillation"] = meta["distillation"]
    elsewhere = ("model", "config", "activation", "distillation", "classes")
    rest = {key: value for key, value in meta.items() if key not in elsewhere}
    return model, config_of(model, meta["model"]), {**origin, "weights_meta": rest}


if __name__ == "__main__":
    run_cli(main)

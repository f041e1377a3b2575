"""What a model sees in photographs: the likeliest classes of each, and the images as the model takes them.

    python pyharness/predict.py my.engine.safetensors photos cat.jpg --labels imagenet.txt

Images are prepared as `evaluate.py` prepares those of a data set, by the same code, so that its accuracies hold here.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pyharness import distributed, results
from pyharness.atomic import atomic_path
from pyharness.data import CORRUPT, ImageSet, data_config, make_loader, read_labels
from pyharness.errors import DataError, HarnessError, run_cli
from pyharness.evaluate import Predictor, open_predictor
from pyharness.training import progress, report

UNREADABLE_STATUS = 1
"""How the program ends where it left something out; 2 is a mistake that leaves no result."""


# --- Images -----------------------------------------------------------------------------------------------------------


class ImageFiles:
    """Files by their paths, as a reader of timm's kind for `ImageSet`; nothing is known of their labels."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return open(self.paths[index], "rb"), 0

    def filename(self, index: int) -> str:
        return self.paths[index]


def find_images(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The images that `words` name, and those of `words` that are folders without one, which stderr is told.

    A file is taken whatever its name, since the user chose it; of a folder all images at any depth, in natural order.
    DataError where there is no image at all.
    """
    from pyharness.archives import FolderReader, types_text

    paths: list[str] = []
    empty: list[str] = []
    for word in words:
        if not os.path.isdir(word):
            paths.append(word)
        elif found := [path for path, _ in FolderReader(Path(word)).samples]:
            paths += found
        else:
            empty.append(word)
    if not paths:
        raise DataError(f"no image found in {', '.join(empty)} or below; {types_text()}")
    for word in empty:
        report(f"warning: no image found in {word} or below; {types_text()}")
    return paths, empty


def open_files(paths: Sequence[str], model: torch.nn.Module) -> ImageSet:
    """The images `paths` as `evaluate.py` prepares held-out ones for the timm `model`. Raises as `data_config`."""
    return ImageSet(ImageFiles(paths), data_config(model), is_training=False, substitute=False)


def preprocessing_of(model: torch.nn.Module) -> dict[str, Any]:
    """How images come into the timm `model`, for JSON: resized to the crop over `crop_pct`, cropped to `input_size`
    [C, H, W] as `crop_mode` says (`image_input`), divided by 255, then (x - mean) / std."""
    cfg = data_config(model)
    return {
        "input_size": list(cfg["input_size"]),
        "mean": [float(value) for value in cfg["mean"]],
        "std": [float(value) for value in cfg["std"]],
        "interpolation": str(cfg["interpolation"]),
        "crop_pct": float(cfg["crop_pct"]),
        "crop_mode": str(cfg["crop_mode"]),
    }


@contextmanager
def npy_writer(path: Path | None, shape: Sequence[int]) -> Iterator[Callable[[Tensor], None]]:
    """A function that adds images f32 [B, *shape] to the file `path`, which appears at the end as `numpy.save` would
    write them all. Nothing is kept in memory. Where `path` is None the function does nothing. Raises as `atomic_path`.
    """
    if path is None:
        yield lambda images: None
        return
    count = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:

        def header() -> None:
            fields = {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, fields)

        def write(images: Tensor) -> None:
            nonlocal count
            file.write(images.numpy().astype("<f4", copy=False).tobytes())
            count += len(images)

        header()
        yield write
        file.seek(0)  # how many could be read is known now; NumPy leaves room for the number of any size
        header()


# --- Classes ----------------------------------------------------------------------------------------------------------


def likeliest(logits: Tensor, top: int, labels: Sequence[str] | None) -> list[dict[str, Any]]:
    """The `top` classes of one image's logits [K], fewer where there are fewer, the likeliest first:
    `{"class", "probability", "label"}`, without the last where there are no `labels`."""
    probabilities = logits.double().softmax(dim=0)
    found = logits.topk(min(top, len(logits))).indices.tolist()  # of the logits, as `evaluate.count` ranks them
    guesses = [{"class": number, "probability": probabilities[number].item()} for number in found]
    return [guess | {"label": labels[guess["class"]]} for guess in guesses] if labels else guesses


def in_lines(path: str, guesses: Sequence[Mapping[str, Any]], classes: int) -> str:
    """An image's result to read: its path, and below it a line for each class, the name last since it may be long."""
    width = len(str(classes - 1))
    lines = [
        f"  {100 * guess['probability']:6.2f} %  {guess['class']:{width}} {guess.get('label', '')}".rstrip()
        for guess in guesses
    ]
    return "\n".join([path, *lines])


def show(text: str) -> None:
    """Print `text`; what stdout cannot encode, as in some file names, is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


# --- The program ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_files(
    predictor: Predictor, dataset: ImageSet, args: argparse.Namespace, labels: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Show the classes of every image that can be read, and write the images to --npy; returns the rows
    `{"image", "classes"}`. DataError where no image can be read, HarnessError for logits that are not finite."""
    rows: list[dict[str, Any]] = []
    loader = make_loader(dataset, args.batch)
    # On a terminal the results themselves show the progress; a bar would stand between them.
    batches = loader if sys.stdout.isatty() else progress(loader, total=len(loader), initial=0, label="predict")
    with npy_writer(args.npy, dataset.input_size) as write:
        first = 0
        for images, found in batches:
            numbers = [first + i for i in (found != CORRUPT).nonzero().flatten().tolist()]
            first += len(found)
            if not numbers:
                continue
            images = images[found != CORRUPT]
            write(images)
            for number, logits in zip(numbers, predictor.predict(images).float().cpu()):
                path = dataset.filename(number)
                if not logits.isfinite().all():
                    raise HarnessError(
                        f"{path}: its logits are not finite; the weights or scales of {args.weights} are broken"
                    )
                guesses = likeliest(logits, args.top, labels)
                show(in_lines(path, guesses, len(logits)))
                rows.append({"image": path, "classes": guesses})
        if not rows:
            raise DataError(f"none of the {len(dataset)} images can be read")
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="The likeliest classes of photographs. MODEL is an fp32 checkpoint, a calibrated checkpoint "
        "(fake-quantized in PyTorch) or an engine file (run by the compiled INT8 engine). Images are resized, cropped "
        "and normalized as evaluate.py does it for that model.",
        epilog="Ends with 1 where an image cannot be read, which is named and left out, and with 2 after an error.",
    )
    parser.add_argument("weights", metavar="MODEL")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a file, or a folder: all images in it, at any depth"
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to show (default: %(default)s)")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE",
        help="names of the classes: a text file, one a line, in their order (default: MODEL's own, where it has any)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images per call (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write the results to as well")
    parser.add_argument(
        "--npy", type=Path, metavar="FILE",
        help="file for the images as the model takes them, float32 [N, C, H, W], for swin_run and the C library; "
        "without those that cannot be read",
    )  # fmt: skip
    parser.add_argument("--model", help="timm name, for published checkpoints, which do not hold it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    from pyharness.measure import need_positive
    from pyharness.models import need_classes, noted_classes

    args = build_parser().parse_args(argv)
    distributed.need_one_process()
    need_positive(args, "--top", "--batch", "--threads")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = distributed.device_for(args.device)
    paths, empty = find_images(args.images)
    predictor = open_predictor(args.weights, args.model).on(device)
    need_classes(predictor.timm_model, predictor.model_name, "predictions are of classes")
    labels = noted_classes(predictor.timm_model)
    if args.labels:
        labels = read_labels(args.labels, predictor.timm_model.num_classes)
    dataset = open_files(paths, predictor.timm_model)
    report(f"{args.weights}: {predictor.model_name}, {predictor.kind}")
    rows = predict_files(predictor, dataset, args, labels)
    unreadable = [*empty, *(dataset.filename(number) for number in dataset.corrupt())]
    if args.json:
        document = {
            "file": args.weights,
            "model": predictor.model_name,
            "method": predictor.kind,
            "graph": getattr(predictor.model, "graph", None),  # null: a timm model
            "device": device.type,
            "preprocessing": preprocessing_of(predictor.timm_model),
            "images": rows,
            "unreadable": unreadable,
        }
        results.write_json(args.json, document)
    return UNREADABLE_STATUS if unreadable else 0


if __name__ == "__main__":
    run_cli(main)

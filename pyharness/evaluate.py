"""Top-1 and top-5 accuracy of whatever gives logits: timm models, calibrated (fake-quantized) ones, engine files.

Over many processes, as torchrun starts them, the images are shared out; the result is that of one process.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyharness import distributed
from pyharness.config import ENGINE_GRAPHS, FUSED_GRAPH, WEIGHT_SCALES
from pyharness.data import (
    CORRUPT,
    DATA_HELP,
    add_max_corrupt,
    check_corrupt,
    evaluation_indices,
    get_dataset,
    name_of,
    take_reading_options,
)
from pyharness.errors import CheckpointError, DataError, HarnessError, run_cli
from pyharness.tensor_file import writing
from pyharness.training import progress, report

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
SAVE_SECONDS = 20.0
"""Between two writings of the partial counts: what a killed run can lose."""
SHOW_SECONDS = 30.0
"""Between two lines of progress where there is no terminal."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EvalResult:
    """Accuracies in percent over `n` images; the intervals are Wilson score intervals, in percent.

    `top5` is None for fewer than 6 classes, where it would say nothing. `corrupt` counts images that could not be read;
    they are not among the `n`.
    """

    top1: float
    top5: float | None
    n: int
    interval95: tuple[float, float]
    top5_interval95: tuple[float, float] | None = None
    corrupt: int = 0


@dataclass(frozen=True)
class Counts:
    """What one or more batches add to a result: exact numbers of images, that can be added up in any order."""

    n: int = 0
    top1: int = 0
    top5: int = 0
    corrupt: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def result(self, classes: int) -> EvalResult:
        """DataError where there is no image."""
        if self.n == 0:
            unread = f"; {self.corrupt} cannot be read" if self.corrupt else ""
            raise DataError(f"there is no image to evaluate on{unread}")
        has_top5 = classes > 5
        return EvalResult(
            top1=100.0 * self.top1 / self.n,
            top5=100.0 * self.top5 / self.n if has_top5 else None,
            n=self.n,
            interval95=wilson_interval(self.top1, self.n),
            top5_interval95=wilson_interval(self.top5, self.n) if has_top5 else None,
            corrupt=self.corrupt,
        )


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share, in percent; honest also near 0 and 100 %. ValueError unless n > 0."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} of {n} is not a share")
    p = correct / n
    centre = p + Z_95**2 / (2 * n)
    spread = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
    scale = 100.0 / (1 + Z_95**2 / n)
    return max(0.0, scale * (centre - spread)), min(100.0, scale * (centre + spread))


def count(logits: Tensor, labels: Tensor, numbers: Sequence[int]) -> Counts:
    """How many of logits [B, K] rank their label, i64 [B], first, and how many among the first five.

    Images whose label is `CORRUPT` are counted as such alone. `numbers` are those of the images, for messages:
    DataError where a label is no class of the model, HarnessError where a logit is not finite.
    """
    logits, labels = logits.cpu().float(), labels.cpu()
    readable = labels != CORRUPT
    broken = readable & ~logits.isfinite().all(dim=1)
    if broken.any():
        raise HarnessError(
            f"the logits of image {numbers[int(broken.nonzero()[0])]} are not finite; the model's weights or scales "
            "are broken"
        )
    classes = logits.shape[1]
    if int(labels.max()) >= classes:
        raise DataError(f"an image has label {int(labels.max())}, the model has {classes} classes; wrong data set?")
    hits = (logits.topk(min(5, classes), dim=1).indices == labels[:, None])[readable]
    return Counts(int(readable.sum()), int(hits[:, 0].sum()), int(hits.any(dim=1).sum()), int((~readable).sum()))


def accuracy(
    predict: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]], limit: int | None = None
) -> EvalResult:
    """Accuracy of `predict` (images f32 [B, C, H, W] -> logits [B, K]) on the batches of `loader`, labels i64 [B].

    Stops after `limit` images. Errors as `count`; DataError where there is no image.
    """
    counts, classes = count_batches(predict, loader, limit)
    return counts.result(classes)


@torch.inference_mode()
def count_batches(
    predict: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]], limit: int | None = None
) -> tuple[Counts, int]:
    """What `accuracy` divides, and the number of classes (0 where there is no batch): for a share of the images, which
    may hold none that can be read. No graph is kept for a gradient."""
    total, seen, classes = Counts(), 0, 0
    for images, labels in loader:
        if limit is not None:
            images, labels = images[: limit - seen], labels[: limit - seen]
        if len(labels) == 0:
            break
        logits = predict(images)
        total += count(logits, labels, range(seen, seen + len(labels)))
        classes = logits.shape[1]
        seen += len(labels)
    return total, classes


# --- Many processes, many starts --------------------------------------------------------------------------------------


def images_of(size: int, limit: int | None) -> Sequence[int]:
    """The numbers of `limit` of `size` images, one from each of as many equal stretches, or of all."""
    if limit is None or limit >= size:
        return range(size)
    return evaluation_indices(size, limit).tolist()


class ShardedEvaluation:
    """Accuracy on `limit` images of `dataset` (`images_of`), over all processes that torchrun started.

    The images are cut into batches that do not depend on the number of processes; process r of W takes every W-th of
    those still to do. What each batch gave is kept under its number, so that no image counts twice, the result is the
    same for any number of processes, and a killed evaluation goes on, also with another number of them. A batch with an
    image that could not be read is not kept: the next run, by which the image may be mended, counts it again.

    `folder` None keeps nothing. `identity` is all that the counts depend on; files of another are not read.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        limit: int | None = None,
        workers: int = 0,
        folder: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        label: str = "evaluate",
    ) -> None:
        images = images_of(len(dataset), limit)
        self.dataset, self.workers, self.label = dataset, workers, label
        self.batches = [images[k : k + batch_size] for k in range(0, len(images), batch_size)]
        self.identity = {**(identity or {}), "images": len(dataset), "limit": len(images), "batch": batch_size}
        if len(images) < len(dataset):  # of all images, the batches are what they always were
            self.identity["drawn"] = hashlib.sha256(json.dumps(images).encode()).hexdigest()[:12]
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]
        self.pattern = f"{digest}-*.json"
        self.folder = folder
        self.path = None if folder is None else folder / f"{digest}-{distributed.rank()}.json"
        self.done: dict[int, list[Any]] = {}
        """By number of the batch: [n, top1, top5, corrupt, classes, [numbers of corrupt images]]."""

    @torch.inference_mode()
    def run(self, predict: Callable[[Tensor], Tensor]) -> tuple[EvalResult, list[str]]:
        """The result, and the names of the images that could not be read; the same on every process."""
        before = distributed.gather_objects(self._read() if distributed.is_main() else {})[0]
        self.done = self._read_own()
        remaining = [k for k in range(len(self.batches)) if k not in before]
        if before:
            report_on_main(f"{self.label}: {len(before)} of {len(self.batches)} batches are done; going on")
        mine = remaining[distributed.rank() :: distributed.world_size()]
        loader = DataLoader(self.dataset, batch_sampler=[list(self.batches[k]) for k in mine], num_workers=self.workers)
        saved = shown = time.monotonic()
        steps = zip(mine, loader)
        if distributed.is_main():
            steps = progress(steps, total=len(mine), initial=0, label=self.label)
        for position, (number, (images, labels)) in enumerate(steps):
            batch = self.batches[number]
            logits = predict(images)
            found = count(logits, labels, batch)
            corrupt = [batch[i] for i in (labels == CORRUPT).nonzero().flatten().tolist()]
            self.done[number] = [*astuple(found), logits.shape[1], corrupt]
            if time.monotonic() - saved >= SAVE_SECONDS:
                self._write()
                saved = time.monotonic()
            if time.monotonic() - shown >= SHOW_SECONDS:
                report_on_main(f"{self.label}: {position + 1} of {len(mine)} batches")
                shown = time.monotonic()
        if mine:
            self._write()
        return self._merge([before, *distributed.gather_objects(self.done)])

    def _merge(self, parts: Sequence[Mapping[int, list[Any]]]) -> tuple[EvalResult, list[str]]:
        merged: dict[int, list[Any]] = {}
        for part in parts:
            merged.update(part)
        assert sorted(merged) == list(range(len(self.batches))), "every batch is counted exactly once"
        total, classes, corrupt = Counts(), 0, []
        for number in sorted(merged):
            *counts, classes, numbers = merged[number]
            total += Counts(*counts)
            corrupt += numbers
        names = [name_of(self.dataset, number) for number in corrupt]
        return total.result(classes), names

    def _read(self) -> dict[int, list[Any]]:
        """What all processes of earlier runs have kept."""
        found: dict[int, list[Any]] = {}
        for path in sorted(self.folder.glob(self.pattern)) if self.folder else ():
            found.update(self._read_file(path))
        return found

    def _read_own(self) -> dict[int, list[Any]]:
        return self._read_file(self.path) if self.path and self.path.exists() else {}

    def _read_file(self, path: Path) -> dict[int, list[Any]]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["identity"] != self.identity:
                return {}
            return {int(k): v for k, v in content["done"].items() if _is_whole(v)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return {}

    def forget(self) -> None:
        """Remove what the processes of this evaluation have kept, and the folder where nothing else is in it."""
        if self.folder is None:
            return
        for pattern in (self.pattern, f".tmp-*-{self.pattern}"):  # the latter from a process that was killed writing
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another evaluation's counts are in it, or the user's files
            self.folder.rmdir()

    def _write(self) -> None:
        if self.path:
            kept = {number: found for number, found in self.done.items() if _is_whole(found)}
            with writing(self.path) as temporary:
                temporary.write_text(json.dumps({"identity": self.identity, "done": kept}), encoding="utf-8")


def _is_whole(found: Sequence[Any]) -> bool:
    """Whether every image of a batch could be read; `found` as in `ShardedEvaluation.done`."""
    return not found[3]


def report_on_main(line: str) -> None:
    """`report` on process 0."""
    if distributed.is_main():
        report(line)


# --- The program ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictor:
    """A model ready to evaluate: `kind` names what it is, `timm_model` owns the image transforms.

    `model` takes images of `dtype` on `device`; `predict` any f32 images.
    """

    kind: str
    model_name: str
    model: torch.nn.Module
    timm_model: torch.nn.Module
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    def predict(self, images: Tensor) -> Tensor:
        """Images f32 [B, C, H, W] -> logits [B, K]."""
        return self.model(images.to(self.device, self.dtype))

    @property
    def is_float(self) -> bool:
        """Whether this is a timm model, which computes in any of `DTYPES`."""
        return self.kind.startswith("fp32")

    def on(self, device: torch.device, dtype: str = "fp32") -> Predictor:
        """The same model on `device`, and, of a timm model, in another floating-point type."""
        if not self.is_float:
            return dataclasses.replace(self, model=self.model.to(device), device=device)
        model = copy.deepcopy(self.model).to(device, DTYPES[dtype])
        kind = self.kind.replace("fp32", dtype, 1)
        return dataclasses.replace(self, kind=kind, model=model, device=device, dtype=DTYPES[dtype])


def open_predictor(
    path: str | Path, name: str | None = None, graph: str | None = None, weight_scales: str | None = None
) -> Predictor:
    """The model in a file, whichever kind of file it is: engine file, calibrated checkpoint or fp32 checkpoint.

    `name` is the timm name, for files that do not hold it: published checkpoints and those of FasterTransformer's tool.
    `graph` is the one that a calibrated checkpoint is run as (default: its own), `weight_scales` of the fused graph
    (default: channel); neither matters to other files. Raises what the file's own loader raises, and HarnessError for a
    graph that is not the checkpoint's.
    """
    kind = kind_of(path)
    if kind == "calibrated":
        return _open_calibrated(path, name, graph, weight_scales or "channel")
    return {"engine": _open_engine, "fp32": _open_fp32}[kind](path, name)


def kind_of(path: str | Path) -> str:
    """What a file is: "engine", "calibrated" or "fp32"."""
    from pyharness.checkpoint import load_checkpoint
    from pyharness.engine_file import MAGIC
    from pyharness.tensor_file import load_header

    if Path(path).suffix == ".safetensors" and load_header(path, CheckpointError).get("format") == MAGIC:
        return "engine"
    state, _ = load_checkpoint(path)
    return "calibrated" if any(key.endswith("_quantizer._amax") for key in state) else "fp32"


def _open_engine(path: str | Path, name: str | None) -> Predictor:
    from pyharness.engine import SwinInt8
    from pyharness.engine_file import load_engine_file
    from pyharness.models import model_from_config, note_data

    content = load_engine_file(path)
    _check_name(path, content.config.name, name)
    engine = SwinInt8.from_engine_file(content)
    timm_model = model_from_config(content.config)
    note_data(timm_model, content.meta)
    return Predictor(f"engine, {content.graph}", content.config.name, engine, timm_model)


def _open_calibrated(path: str | Path, name: str | None, graph: str | None, weight_scales: str) -> Predictor:
    from pyharness.calibrated import load_calibrated
    from pyharness.fused_fakequant import model_in_graph
    from pyharness.models import model_from_config, note_data

    checkpoint = load_calibrated(path, name)
    model = model_in_graph(checkpoint, graph, weight_scales).eval()
    timm_model = model_from_config(model.config)
    note_data(timm_model, checkpoint.meta)
    kind = f"fake-quantized, {graph or model.graph}"
    if weight_scales != "channel":
        kind += f", {weight_scales} weight scales"
    return Predictor(kind, model.config.name, model, timm_model)


def _open_fp32(path: str | Path, name: str | None) -> Predictor:
    from pyharness.models import is_geluless, load_model

    model, meta = load_model(path, name)
    return Predictor("fp32, GELU-less" if is_geluless(model) else "fp32", meta["model"], model, model)


def _check_name(path: str | Path, found: str, wanted: str | None) -> None:
    from pyharness.checkpoint import same_model

    if wanted is not None and not same_model(wanted, found):
        raise CheckpointError(f"{path}: is of {found}, not of {wanted}; leave --model out")


def add_graph_arguments(parser: argparse.ArgumentParser) -> None:
    """--graph and --weight-scales, of calibrated checkpoints among a program's files."""
    parser.add_argument(
        "--graph", choices=ENGINE_GRAPHS,
        help="run calibrated checkpoints with the quantizers of this graph, of which convert.py --graph makes engine "
        "files (default: ft_int8 with GELU, geluless_int8 without)",
    )  # fmt: skip
    parser.add_argument(
        "--weight-scales", choices=WEIGHT_SCALES,
        help=f"the same of calibrated checkpoints' weights, with --graph {FUSED_GRAPH} (default: channel)",
    )  # fmt: skip


def check_graph_arguments(args: argparse.Namespace, paths: Iterable[str | Path]) -> None:
    """HarnessError where --graph or --weight-scales would say nothing about the files `paths`."""
    if args.weight_scales and args.graph != FUSED_GRAPH:
        raise HarnessError(f"--weight-scales is for --graph {FUSED_GRAPH}; FasterTransformer's are per tensor")
    if args.graph and not any(kind_of(path) == "calibrated" for path in paths):
        raise HarnessError(
            f"--graph {args.graph} is for calibrated checkpoints, and none was given; an engine file has its graph"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Accuracy on held-out images, of an fp32 checkpoint, a calibrated checkpoint (fake-quantized in "
        "PyTorch) or an engine file (run by the compiled INT8 engine). Which of them it is, the file says.",
        epilog="Over several processes: torchrun --nproc-per-node 4 pyharness/evaluate.py ... gives the same result.",
    )
    parser.add_argument(
        "weights", nargs="+", metavar="FILE", help="one or more files, each evaluated on the same images"
    )
    parser.add_argument("--model", help="timm name, for published checkpoints, which do not hold it")
    add_graph_arguments(parser)
    parser.add_argument("--data", metavar="DATA", help=f"{DATA_HELP} (default: the held-out digits)")
    parser.add_argument("--batch", type=int, default=64, help="images per call (default: %(default)s)")
    parser.add_argument(
        "--limit", "--images", type=int, metavar="N",
        help="evaluate on N images only, one from each of N equal stretches of the set, so that every class has its "
        "share; always the same ones",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["fp32"],
        help="floating-point types in which to evaluate fp32 checkpoints (default: fp32)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for evaluate.json and evaluate.md; a killed run that is started again goes on from there",
    )  # fmt: skip
    add_max_corrupt(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    take_reading_options(args, "--limit")
    check_graph_arguments(args, args.weights)
    with distributed.session():
        device = distributed.device_for(args.device)
        if args.out and distributed.is_main():
            with contextlib.suppress(OSError):  # of an earlier evaluation: images may have been mended since
                (args.out / "corrupt.txt").unlink()
        done = [
            evaluate_one(predictor, path, args)
            for path in args.weights
            for predictor in open_predictors(path, args.model, device, args.dtype, args.graph, args.weight_scales)
        ]
        if args.out and distributed.is_main():
            write_results(args.out, [row for row, _ in done], args)
            for _, evaluation in done:
                evaluation.forget()
    return 0


def open_predictors(
    path: str | Path,
    name: str | None,
    device: torch.device,
    dtypes: Sequence[str],
    graph: str | None = None,
    weight_scales: str | None = None,
) -> Iterable[Predictor]:
    """The model in a file (`open_predictor`) on `device`; of a timm model one for each of `dtypes`."""
    opened = open_predictor(path, name, graph, weight_scales)
    return (opened.on(device, dtype) for dtype in (dtypes if opened.is_float else dtypes[:1]))


def evaluate_one(
    predictor: Predictor, path: str, args: argparse.Namespace
) -> tuple[dict[str, Any], ShardedEvaluation]:
    """Evaluate one model as the command line says, print its line, and return its row, and what keeps its counts."""
    from pyharness.models import need_classes
    from pyharness.pipeline import file_digest

    need_classes(predictor.timm_model, predictor.model_name, "accuracy is of classes")
    dataset = get_dataset(args.data, predictor.model_name, train=False, model=predictor.timm_model)
    evaluation = ShardedEvaluation(
        dataset, args.batch, limit=args.limit, workers=args.workers, folder=args.out and args.out / "partial",
        identity=_identity(predictor, path, args.data, dataset), label=Path(path).name,
    )  # fmt: skip
    result, corrupt = evaluation.run(predictor.predict)
    if distributed.is_main():
        print(f"{path} ({predictor.model_name}, {predictor.kind}): {_in_words(result)}", flush=True)
    check_corrupt(
        corrupt,
        result.n + result.corrupt,
        args.out / "corrupt.txt" if args.out and distributed.is_main() else None,
        args.max_corrupt,
    )
    row = {
        "file": str(path),
        "model": predictor.model_name,
        "method": predictor.kind,
        "data": args.data or "digits",
        "top1": result.top1,
        "top1_interval95": result.interval95,
        "top5": result.top5,
        "top5_interval95": result.top5_interval95,
        "n_eval": result.n,
        "corrupt": corrupt,
        "device": predictor.device.type,
        "weights_sha256": file_digest(Path(path)),
    }
    return row, evaluation


def _identity(predictor: Predictor, path: str, data: str | None, dataset: Dataset) -> dict[str, Any]:
    """All that the counts of a model on `dataset`, which `data` names, depend on besides which images they are of. A
    file that does not say its model or its normalization is read as --model and the data ask."""
    from pyharness.data import input_normalization
    from pyharness.engine import library_path
    from pyharness.models import config_of
    from pyharness.pipeline import checkpoint_digest, code_digest, listing_digest

    name, model = predictor.model_name, predictor.timm_model
    known = {
        "weights": checkpoint_digest(Path(path)), "kind": predictor.kind, "model": name,
        "config": dataclasses.asdict(config_of(model, name)), "input": input_normalization(data, name, model),
        "data": str(data), "listing": listing_digest(dataset), "device": predictor.device.type,
        "code": code_digest(library_path()),
    }  # fmt: skip
    return json.loads(json.dumps(known))  # as it comes back from a file: tuples are lists there


def _in_words(result: EvalResult) -> str:
    low, high = result.interval95
    text = f"top-1 {result.top1:.2f} % [{low:.2f}, {high:.2f}]"
    if result.top5 is not None:
        text += f", top-5 {result.top5:.2f} %"
    unread = f", {result.corrupt} more cannot be read" if result.corrupt else ""
    return f"{text}, {result.n} images{unread}"


def write_results(folder: Path, rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """evaluate.json (`{"meta", "rows"}`) and evaluate.md in `folder`."""
    from pyharness.measure import environment

    meta = environment(None, torch.get_num_threads())
    meta |= {"batch": args.batch, "limit": args.limit, "processes": distributed.world_size()}
    with writing(folder / "evaluate.json") as temporary:
        temporary.write_text(json.dumps({"meta": meta, "rows": list(rows)}, indent=2) + "\n", encoding="utf-8")
    lines = [
        "| file | model | method | top-1 % (95 % interval) | top-5 % (95 % interval) | images | unreadable |",
        "| --- | --- | --- | --- | --- | ---: | ---: |",
    ]
    for row in rows:
        top1 = _with_interval(row["top1"], row["top1_interval95"])
        top5 = _with_interval(row["top5"], row["top5_interval95"])
        name = Path(row["file"]).name
        lines.append(
            f"| {name} | {row['model']} | {row['method']} | {top1} | {top5} | {row['n_eval']} | {len(row['corrupt'])} |"
        )
    lines += ["", f"Data: {args.data or 'digits'}. {meta['device']}; torch {meta['torch']}; {meta['date'][:10]}."]
    with writing(folder / "evaluate.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    return "-" if value is None else f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


if __name__ == "__main__":
    run_cli(main)

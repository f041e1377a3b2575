"""From a floating-point checkpoint to engine files, each step made once: distil, calibrate, convert.

What a step makes is kept in a folder of its own whose name holds a digest of what it depends on: options, input files,
the names and sizes of the images, the source files of the harness that compute it and the versions of the packages that
these call. So what was made of other inputs is not used, and a killed run goes on. An image that changed and kept its
name and size is not noticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyharness.atomic import atomic_path
from pyharness.config import FUSED_GRAPH, MICRO_DIGITS, SwinConfig
from pyharness.data import MAX_CORRUPT_SHARE, ImageSet, check_corrupt, check_images, need_share
from pyharness.errors import DataError, HarnessError
from pyharness.hf_format import read_with
from pyharness.results import ROOT
from pyharness.training import report

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer
    from torch.utils.data import Dataset

    from pyharness.engine_file import EngineFile

DEFAULT_WORK = ROOT / "results" / "local" / "work"

STEPS = ("calibrated", "convert", "data", "distill", "engine_file", "models", "pipeline", "quantize")
"""Modules that the steps call. What they import, and so on, are the sources of what is kept."""

SOURCES = (
    *STEPS, "archives", "attention_geometry", "checkpoint", "config", "detector_format", "distributed", "fakequant",
    "fakequant_v2", "ft_format", "fused_convert", "fused_format", "hf_format", "image_input", "model_geometry",
    "pad_first", "position_bias", "procedural", "swin_blocks", "tensor_file", "timm_format", "train_options", "trainer",
    "training", "weight_steps",
)  # fmt: skip
"""Modules that what is kept depends on; a test compares them with what is imported."""

NO_SOURCES = (
    "atomic", "errors", "evaluate", "export", "measure", "model_card", "random_engine", "results", "signals",
)  # fmt: skip
"""Imported by SOURCES, but no part of what is kept: how files are written, errors, measuring, other formats to export
to, random weights. Else every change of a table's layout would have the student distilled again."""

PACKAGES = ("numpy", "nvidia-modelopt", "pillow", "scikit-learn", "timm", "torch", "torchvision")
"""Packages whose versions what is kept depends on: models, images and their transforms, quantizers, the digits."""

DIGITS_DISTILLATION = {"subset": 1.0, "epochs_per_block": 3}
"""The paper's 10 % and one epoch are 4 steps per block on the 1200 digits; all of them, three times, are 114."""

DIGITS_THREADS = 1
"""The micro model's layers are too small for a second thread, and with one the student does not depend on the machine's
number of cores."""

GRAPH_OF_METHOD = {
    "ft_int8": "ft_int8",
    "geluless_int8": "geluless_int8",
    "geluless_int8_no_kd": "geluless_int8",
    "fused_int8_gelu": FUSED_GRAPH,
    "fused_int8": FUSED_GRAPH,
}
"""The engine graph that runs each INT8 method."""

IMAGES_FILE = "images.json"
"""Beside what a step made of images: how many it asked for, and which of them could not be read. A later run may allow
fewer than the one that made it."""

CALIBRATED_AS = {"fused_int8_gelu": "ft_int8", "fused_int8": "geluless_int8"}
"""The fused graph runs the calibrated checkpoint of another method: weights and scales are the same."""


@dataclass(frozen=True)
class Inputs:
    """What one model's rows are made from.

    `weights`: the fp32 GELU checkpoint, None for the packaged teacher of the micro model. `student`: a finished
    GELU-less checkpoint, None to distil one. `data`: what `data.DATA_HELP` tells, None for the digits. `weight_scales`:
    one of WEIGHT_SCALES, how the fused graph's weights are quantized.
    """

    model: str
    weights: Path | None = None
    student: Path | None = None
    data: str | Path | None = None
    int8_mode: int = 1
    weight_scales: str = "channel"

    @property
    def has_weights(self) -> bool:
        """Whether there are trained weights and images; else the model has latencies only."""
        return self.model == MICRO_DIGITS.name or self.weights is not None


@functools.cache
def file_digest(path: Path) -> str:
    """SHA-256 of a file; of a folder (Hugging Face's checkpoints), of its files' names and digests.

    HarnessError where it cannot be read.
    """
    try:
        if path.is_dir():
            parts = [f"{file.name} {file_digest(file)}" for file in sorted(path.iterdir()) if file.is_file()]
            return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        raise HarnessError(f"cannot read {path} ({error.strerror}); give an existing file") from None


def checkpoint_digest(path: Path) -> str:
    """`file_digest` of a checkpoint; of a file out of a Hugging Face folder, of all that is read with it. HarnessError
    where something cannot be read."""
    files = [path, *(read_with(path) if path.is_file() else ())]
    if len(files) == 1:
        return file_digest(path)
    parts = [f"{file.name} {file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def package_versions() -> dict[str, str | None]:
    """The versions of PACKAGES; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def code_digest(library: Path) -> str:
    """Of what accuracies depend on besides weights and images: the harness, the packages below it, the engine in the
    file `library`, where there is one."""
    known = {
        "sources": [file_digest(Path(__file__).with_name(f"{name}.py")) for name in (*SOURCES, "engine", "evaluate")],
        "packages": package_versions(),
        "engine": file_digest(library) if library.exists() else None,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def listing_digest(dataset: Dataset) -> str | None:
    """A digest of the names, sizes in bytes and class numbers of the images of `dataset`, in their order, and of what
    makes other numbers of these (`ImageSet.numbers`); no image is read. Of parquet files, the files' names and sizes.
    None of sets without files: their names say what they are.
    """
    if not isinstance(dataset, ImageSet):
        return None
    from pyharness.archives import ParquetReader, TarReader

    reader, digest = dataset.reader, hashlib.sha256()
    if isinstance(reader, TarReader):
        lines = ((reader.filename(i), sample.size, sample.label) for i, sample in enumerate(reader.samples))
    elif isinstance(reader, ParquetReader):
        lines = ((path.name, _size_of(path), None) for path in reader.paths)
    else:
        lines = ((reader.filename(i), _size_of(file), label) for i, (file, label) in enumerate(reader.samples))
    for line in lines:
        digest.update(f"{line}\n".encode())
    if dataset.numbers is not None:
        digest.update(f"{dataset.numbers}\n".encode())
    return digest.hexdigest()


def _size_of(file: str | Path) -> int | None:
    """Bytes; None where there is nothing to read, as behind a link that leads nowhere."""
    try:
        return os.stat(file).st_size
    except OSError:
        return None


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Inside, PyTorch uses `number` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def note_images(folder: Path, dataset: Dataset) -> None:
    """Write `folder`/IMAGES_FILE of all images that `dataset` was asked for; of sets without files it says none."""
    is_files = isinstance(dataset, ImageSet)
    unreadable = [dataset.filename(number) for number in dataset.corrupt()] if is_files else []
    with atomic_path(folder / IMAGES_FILE) as temporary:
        noted = {"asked": dataset.asked() if is_files else 0, "unreadable": unreadable}
        temporary.write_text(json.dumps(noted) + "\n", encoding="utf-8")


class Pipeline:
    """Makes, or finds again, everything that the rows of one model need. Nothing is made before it is asked for."""

    def __init__(
        self, inputs: Inputs, work: Path = DEFAULT_WORK, max_corrupt: float = MAX_CORRUPT_SHARE
    ) -> None:
        """`max_corrupt`: the share of unreadable images beyond which a step, made or found again, is refused."""
        need_share(max_corrupt)
        if inputs.weights is not None and inputs.data is None and inputs.model != MICRO_DIGITS.name:
            raise DataError(
                f"{inputs.model} has weights but no images to calibrate and evaluate on; "
                "give --data DIR with train/ and val/ folders, or leave --weights out to measure latency alone"
            )
        self.inputs = inputs
        self.work = Path(work) / inputs.model
        self.max_corrupt = max_corrupt

    # --- models and data

    @functools.cached_property
    def teacher(self) -> SwinTransformer:
        """The fp32 GELU model: trained where there are weights, else random. How its images come in is noted on it, for
        the student's file."""
        from pyharness.data import input_normalization
        from pyharness.models import create_model, load_model, note_data

        inputs = self.inputs
        if inputs.weights is not None:
            model = load_model(inputs.weights, inputs.model)[0]
        else:
            model = create_model(inputs.model, weights="pretrained" if inputs.has_weights else "random")
        note_data(model, {"input": input_normalization(inputs.data, inputs.model, model)})
        return model

    @property
    def config(self) -> SwinConfig:
        from pyharness.models import config_of

        return config_of(self.teacher, self.inputs.model)

    def dataset(self, train: bool, augment: bool = False) -> Dataset:
        """Training or held-out images. `augment`: the random crops of training."""
        from pyharness.data import get_dataset

        return get_dataset(self.inputs.data, self.inputs.model, train, model=self.teacher, augment=augment)

    # --- steps

    def student_path(self, distilled: bool) -> Path:
        """The GELU-less checkpoint: distilled by Algorithm 1, or with its blocks replaced and nothing trained.

        DataError where more of its training images than `max_corrupt` could not be read. CheckpointError where a given
        student's images come in otherwise than the teacher's, by whose transforms it is calibrated and evaluated.
        """
        from pyharness.distill import DistillOptions, distill

        if distilled and self.inputs.student is not None:
            return self._given_student
        is_digits = self.inputs.data is None
        options = DistillOptions(distill=distilled, **(DIGITS_DISTILLATION if is_digits else {}))
        folder = self._folder("student" if distilled else "student_no_kd", dataclasses.asdict(options))
        path = folder / "student.safetensors"
        if not self._is_made(path):
            how = "distil block after block" if distilled else "replace all blocks, no distillation"
            report(f"{self.inputs.model}: make the GELU-less student ({how})")
            images = self.dataset(train=True, augment=True)
            with threads(DIGITS_THREADS if is_digits else torch.get_num_threads()):
                distill(
                    self.teacher,
                    self.inputs.model,
                    images,
                    options,
                    folder,
                    eval_dataset=self.dataset(train=False) if is_digits else None,
                    device="cuda" if not is_digits and torch.cuda.is_available() else "cpu",
                    max_corrupt=self.max_corrupt,
                )
            note_images(folder, images)
        return path

    def calibrated_path(self, method: str) -> Path:
        """The calibrated checkpoint of an INT8 method, by FasterTransformer's defaults.

        DataError where more of its images than `max_corrupt` could not be read.
        """
        from pyharness.calibrated import save_calibrated
        from pyharness.data import input_normalization, make_loader
        from pyharness.models import config_of
        from pyharness.quantize import BATCH_SIZE, BATCHES, quantize

        method = CALIBRATED_AS.get(method, method)
        source = None if method == "ft_int8" else self.student_path(distilled=method == "geluless_int8")
        options = {"int8_mode": self.inputs.int8_mode, "batches": BATCHES, "batch_size": BATCH_SIZE}
        path = self._folder(f"calibrated_{method}", options, source) / "calibrated.safetensors"
        if not self._is_made(path):
            report(f"{self.inputs.model}: calibrate {method} on up to {BATCHES * BATCH_SIZE} images")
            model = self._model_of(source)
            dataset = self.dataset(train=True)
            loader = make_loader(dataset, BATCH_SIZE, shuffle=True)
            batches = (images for images, _ in itertools.islice(loader, BATCHES))
            config = config_of(model, self.inputs.model)
            normalization = input_normalization(self.inputs.data, self.inputs.model, self.teacher)  # as self.dataset's
            checkpoint = quantize(model, config, batches, int8_mode=self.inputs.int8_mode, normalization=normalization)
            check_images(dataset, None, self.max_corrupt)  # each is named already
            save_calibrated(path, checkpoint)
            note_images(path.parent, dataset)
        return path

    def engine_path(self, method: str) -> Path:
        """The engine file of an INT8 method."""
        from pyharness.calibrated import load_calibrated
        from pyharness.convert import to_engine_file
        from pyharness.engine_file import save_engine_file

        calibrated, graph = self.calibrated_path(method), GRAPH_OF_METHOD[method]
        if graph != FUSED_GRAPH:
            name, scales = "engine", "channel"
        else:
            scales = self.inputs.weight_scales
            name = f"engine_{graph}" + f"_{scales}" * (scales != "channel")
        path = calibrated.with_name(f"{name}.safetensors")
        if not path.exists():
            save_engine_file(path, to_engine_file(load_calibrated(calibrated), graph, scales))
        return path

    def engine_file(self, method: str) -> EngineFile:
        """The weights of an INT8 method: converted, or random with plausible scales where there are no weights."""
        from pyharness.convert import random_engine_file
        from pyharness.engine_file import load_engine_file

        if self.inputs.has_weights:
            return load_engine_file(self.engine_path(method))
        activation = "gelu" if method == "fused_int8_gelu" else "relu"
        graph, scales = GRAPH_OF_METHOD[method], self.inputs.weight_scales
        return random_engine_file(
            self.config, graph, self.inputs.int8_mode, activation=activation, weight_scales=scales
        )

    @functools.cached_property
    def _given_student(self) -> Path:
        from pyharness.checkpoint import load_checkpoint
        from pyharness.models import MICRO_TEACHER, need_same_input, noted_input

        inputs = self.inputs
        said = load_checkpoint(inputs.student)[1].get("input")
        need_same_input(inputs.student, said, inputs.weights or MICRO_TEACHER, noted_input(self.teacher))
        return inputs.student

    def _is_made(self, path: Path) -> bool:
        """Whether a step was finished. DataError where it was, with more unreadable images than are allowed now."""
        try:
            noted = json.loads(path.with_name(IMAGES_FILE).read_text(encoding="utf-8"))
            asked, unreadable = int(noted["asked"]), list(noted["unreadable"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        check_corrupt(unreadable, asked, None, self.max_corrupt)
        return path.exists()

    def _model_of(self, source: Path | None) -> SwinTransformer:
        from pyharness.models import load_model

        return self.teacher if source is None else load_model(source, self.inputs.model)[0]

    @functools.cached_property
    def _images_digest(self) -> str | None:
        """`listing_digest` of the training images, which alone the steps see."""
        return None if self.inputs.data is None else listing_digest(self.dataset(train=True))

    def _folder(self, step: str, options: Mapping[str, Any], *files: Path | None) -> Path:
        from pyharness.models import MICRO_TEACHER

        inputs = [self.inputs.weights or MICRO_TEACHER, *(file for file in files if file is not None)]
        known = {
            "options": dict(options),
            "data": str(self.inputs.data),
            "images": self._images_digest,
            "inputs": [checkpoint_digest(path) for path in inputs],
            "sources": [file_digest(Path(__file__).with_name(f"{name}.py")) for name in SOURCES],
            "packages": package_versions(),
        }
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        return self.work / f"{step}-{digest[:12]}"

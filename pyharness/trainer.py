"""The loop that distillation and quantization-aware training share: a student learns a teacher's soft labels.

A run is a number of phases of some epochs each (Algorithm 1: a phase per block). Everything follows from the options
and the seed: one subset of the training set, its order in every epoch, and the random crop of every image in every
epoch. How the work is spread (processes, accumulation, memory layout) changes the result by rounding alone.

With `torchrun`, each process takes every N-th image of a batch, whose size is that of all processes together. The
gradients are weighted by the images they come from, so that their sum is the gradient of the whole batch's mean also
where a batch does not divide; a process left without an image computes one with weight 0.

A run can be stopped or killed at any moment. It goes on from the last state it wrote, with any number of processes. The
state holds everything, and on a CPU the result is the same bit for bit with the same number of processes and threads.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Subset

from pyharness import distributed
from pyharness.checkpoint import load_pickle
from pyharness.config import SwinConfig
from pyharness.data import DigitsDataset, ImageSet, SeededImages, check_images, make_loader
from pyharness.errors import CheckpointError, DataError, HarnessError
from pyharness.evaluate import count_batches
from pyharness.models import config_of, noted_input
from pyharness.procedural import SCHEME, ProceduralDataset
from pyharness.signals import NotedSignals, SignalSafeLoader, StopNoted
from pyharness.tensor_file import save_torch
from pyharness.train_options import Machine, TrainOptions
from pyharness.training import StepLines, Stopwatch, derived_seed, progress, report, write_csv

STATE_VERSION = 2
CURVE_FIELDS = ("step", "phase", "loss", "train_accuracy")
EVALUATION_FACTOR = 4
"""Held-out images that a process evaluates at once, per image that it trains on at once: they leave no graph."""


@dataclass
class TrainState:
    """Where a run stands: the next step to take, and what the epoch and the curve have summed up so far.

    `begun`: whether the phase's change of the model is made. `steps` counts from the run's beginning.
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    begun: bool = False
    steps: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    window: list[float] = field(default_factory=lambda: [0.0, 0, 0])
    curve: list[dict[str, Any]] = field(default_factory=list)

    def start_phase(self, phase: int) -> None:
        self.phase, self.epoch, self.step, self.begun = phase, 0, 0, False
        self.loss_sum, self.correct, self.seen = 0.0, 0, 0


# --- The loss ---------------------------------------------------------------------------------------------------------


def soft_label_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch; logits f32 [B, K].

    The factor T^2 keeps the gradient's size when T changes (Hinton et al., 2015). Equal logits give 0.
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, options: TrainOptions) -> Tensor:
    """The loss that `options` describe, mean over the batch; logits f32 [B, K], labels i64 [B]."""
    temperature = options.temperature
    if options.loss == "kl":
        soft = soft_label_loss(student_logits, teacher_logits, temperature)
    else:
        targets = F.softmax(teacher_logits / temperature, dim=1)
        soft = F.cross_entropy(student_logits / temperature, targets) * temperature**2
    if not options.hard_weight:
        return soft
    return (1 - options.hard_weight) * soft + options.hard_weight * F.cross_entropy(student_logits, labels)


@torch.inference_mode()
def divergence(student: nn.Module, teacher: nn.Module, dataset: Dataset, batch_size: int = 128) -> float:
    """Mean over `dataset` of KL(teacher || student) at temperature 1, both in eval mode on the CPU, in nats."""
    total, modes = 0.0, [(model, model.training) for model in (student, teacher)]
    for model, _ in modes:
        model.eval()
    for images, labels in make_loader(dataset, batch_size):
        total += float(soft_label_loss(student(images), teacher(images))) * len(labels)
    for model, training in modes:
        model.train(training)
    return total / len(dataset)


# --- Which images, and in which order ---------------------------------------------------------------------------------


TRAINING_SET = "training set"
"""The entry of a run's identity that holds `data_identity`."""


def data_identity(dataset: Dataset) -> str | None:
    """What tells a training set from others, for a run's identity; None for kinds that nothing here knows.

    The digits by their name, procedural images by what they follow from. Images in files by a digest of the classes and
    of every file's name in its folder, with its label; in archives, of the archives' names and sizes as well and of
    every image's size, where an index holds it. Neither where the folder lies counts, nor what is in a file: a million
    of them are not read.
    """
    if isinstance(dataset, Subset):
        whole = data_identity(dataset.dataset)
        chosen = hashlib.sha256(repr([int(index) for index in dataset.indices]).encode()).hexdigest()
        return whole and f"{len(dataset)} images (sha256 {chosen[:16]}) of {whole}"
    if isinstance(dataset, DigitsDataset):
        return f"digits, {len(dataset)} images"
    if isinstance(dataset, ProceduralDataset):
        spec, count = dataset.spec, f"{dataset.split}={len(dataset)}"
        return f"{SCHEME}:classes={spec.classes},size={dataset.size},{count},seed={spec.seed}"
    return _files_identity(dataset) if isinstance(dataset, ImageSet) else None


def _files_identity(dataset: ImageSet) -> str:
    reader = dataset.reader
    classes = getattr(reader, "classes", None) or sorted(getattr(reader, "class_to_idx", None) or ())
    archives = getattr(reader, "paths", ())
    digest = hashlib.sha256(repr([list(classes), [(path.name, path.stat().st_size) for path in archives]]).encode())
    if dataset.numbers is not None:
        digest.update(repr(dataset.numbers).encode())
    samples = getattr(reader, "samples", None)
    if samples is None and not archives:
        samples = [(dataset.filename(index), None) for index in range(len(dataset))]
    prefix = f"{getattr(reader, 'root', '')}/"
    for sample in samples or ():
        if isinstance(sample, tuple):
            file, label = sample
            digest.update(repr((str(file).removeprefix(prefix), label)).encode())
        else:
            digest.update(repr((sample.name, sample.size, sample.label)).encode())
    return f"{len(dataset)} images in {len(classes) or 'unnamed'} classes, names' sha256 {digest.hexdigest()[:16]}"


def load_state(path: Path) -> Any:
    """What a run wrote to its state file `path`; None where there is none. CheckpointError where it is damaged."""
    if not path.exists():
        return None
    try:
        return load_pickle(path)
    except CheckpointError as error:
        cause = error.__context__  # load_pickle's advice is for a checkpoint that was fetched
        reason = f" ({cause.strerror})" if isinstance(cause, OSError) and cause.strerror else ""
        raise CheckpointError(
            f"{path}: cannot be read as the state of a run{reason}; it may be cut off, or another program's. Remove it "
            "to begin anew, or choose another output folder (--out)"
        ) from None


def subset_indices(size: int, options: TrainOptions) -> Tensor:
    """The images that training uses, drawn once without replacement: ceil(size * subset) indices."""
    generator = torch.Generator().manual_seed(derived_seed(options.seed, "subset"))
    return torch.randperm(size, generator=generator)[: math.ceil(size * options.subset)]


def epoch_batches(indices: Tensor, options: TrainOptions, phase: int, epoch: int) -> list[list[tuple[int, int]]]:
    """The batches of one epoch as (image index, seed of its random crop): a function of its arguments alone."""
    generator = torch.Generator().manual_seed(derived_seed(options.seed, "order", phase, epoch))
    order = indices[torch.randperm(len(indices), generator=generator)].tolist()
    items = [(i, derived_seed(options.seed, "image", phase, epoch, i)) for i in order]
    return [items[begin : begin + options.batch_size] for begin in range(0, len(items), options.batch_size)]


def share_of(batch: Sequence[Any], rank: int, processes: int) -> tuple[list[Any], int]:
    """The items of a batch that process `rank` computes, and how many of them count: 0 for a stand-in."""
    mine = list(batch[rank::processes])
    return (mine, len(mine)) if mine else ([batch[0]], 0)


# --- The loop ---------------------------------------------------------------------------------------------------------


class Trainer:
    """One run with everything that stays the same during it, and its state.

    Subclasses give `begin_phase`, which changes the models where a phase asks for it, and say what the log calls a
    phase (`UNIT`) and the run (`KIND`).
    """

    UNIT = "phase"
    KIND = "training"

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        dataset: Dataset,
        options: TrainOptions,
        out_dir: Path,
        machine: Machine,
        *,
        phases: int,
        epochs: int,
        identity: Mapping[str, Any],
        described: Mapping[str, Any],
        eval_dataset: Dataset | None,
    ) -> None:
        """Both models are copied. `identity` and `described` name what, besides `options`, must be the same for a run
        to go on; of the latter (`description`), what an old state does not hold is taken to be the same."""
        if len(dataset) == 0:
            raise HarnessError(f"the training set is empty; {self.KIND} needs images")
        self.rank, self.processes = distributed.rank(), distributed.world_size()
        if options.batch_size < self.processes:
            raise HarnessError(
                f"a batch of {options.batch_size} images cannot be spread over {self.processes} processes; "
                "the batch size is of all processes together: start fewer, or choose a larger batch"
            )
        self.options, self.out_dir, self.machine = options, out_dir, machine
        self.dataset, self.eval_dataset = dataset, eval_dataset
        self.phases, self.epochs = phases, epochs
        self.device = distributed.device_for(machine.device)
        self.layout = torch.channels_last if machine.channels_last else torch.contiguous_format
        self.teacher = self._placed(teacher).eval().requires_grad_(False)
        self.student = self._placed(student).requires_grad_(True)
        self.average = self._placed(student).eval().requires_grad_(False) if options.ema_decay else None
        self.indices = subset_indices(len(dataset), options)
        self.identity = {
            **asdict(options),
            **identity,
            **described,
            "training images": len(dataset),
            TRAINING_SET: data_identity(dataset),
        }
        self.described = frozenset(described)
        self.state = TrainState()
        self.parallel: nn.Module | None = None
        self.optimizer: torch.optim.SGD | None = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")
        self.watch = Stopwatch()
        self.writer: Any = None
        self.signals = NotedSignals()
        self.stop_signal: signal.Signals | None = None

    # What subclasses give

    def begin_phase(self, phase: int) -> bool:
        """Change `self.models()` as phase `phase` (from 0) asks; True where the optimizer has to start anew."""
        return False

    def phase_number(self, phase: int) -> int:
        """What the log calls phase `phase`."""
        return phase + 1

    def before_piece(self, images: int, batch: int) -> None:
        """Called ahead of each forward pass in training: of `images` images, out of a batch of `batch` ones over all
        pieces and processes."""

    def after_step(self) -> None:
        """Called after each step of the optimizer."""

    # For subclasses

    @property
    def state_path(self) -> Path:
        return self.out_dir / "state.pt"

    @property
    def log_fields(self) -> tuple[str, ...]:
        fields = (self.UNIT, "loss", "train_accuracy", "eval_accuracy", "seconds")
        return (*fields, "ema_eval_accuracy") if self.options.ema_decay else fields

    def models(self) -> list[nn.Module]:
        """The student, and the average of its weights where one is kept."""
        return [self.student] if self.average is None else [self.student, self.average]

    def train(self, stop_after_steps: int | None) -> bool:
        """All phases, from where the state stands; False where `stop_after_steps` ended it early.

        SIGTERM and SIGINT end it after the step they come in, with the state written, by a KeyboardInterrupt.
        """
        budget = math.inf if stop_after_steps is None else stop_after_steps
        with self.signals, self._tensorboard():
            while self.state.phase < self.phases:
                if not self.state.begun:
                    self._begin()
                self._wrap()
                lines = StepLines()
                while self.state.epoch < self.epochs:
                    for (images, labels), own, size in self._remaining_batches():
                        self._train_step(images, labels, own, size)
                        lines.count(size, self._steps_left(), self._where)
                        budget -= 1
                        if budget <= 0 or self.stop_signal or self.state.steps % self.machine.state_every == 0:
                            self.save_state()
                        if self.stop_signal:
                            self._stop()
                        if budget <= 0:
                            return False
                    self.state.epoch, self.state.step = self.state.epoch + 1, 0
                if self.eval_dataset is not None:
                    self.save_state()  # the evaluation can take longer than the phase did
                self._end_phase()
        return True

    def finished_models(self) -> list[nn.Module]:
        """`models()`, on the CPU, in eval mode and in the ordinary memory layout."""
        return [model.cpu().to(memory_format=torch.contiguous_format).eval() for model in self.models()]

    def check_images(self) -> None:
        """DataError, in every process, where too many of the images could not be read; corrupt.txt lists them.

        Before a result is written: the state keeps what was trained, for a run that allows a larger share.
        """
        if isinstance(self.dataset, ImageSet):
            self.dataset.remember(self._images_met())
            path = self.out_dir / "corrupt.txt" if distributed.is_main() else None
            check_images(self.dataset, path, self.machine.max_corrupt)

    def log_row(self, number: int, loss: float | None, train_accuracy: float | None) -> None:
        """Evaluate, and add a row to the log."""
        row = {
            self.UNIT: number,
            "loss": loss,
            "train_accuracy": train_accuracy,
            "eval_accuracy": self._evaluate(self.student),
            "seconds": round(self.watch.seconds(), 2),
        }
        if self.average is not None:
            row["ema_eval_accuracy"] = self._evaluate(self.average)
        self.state.rows.append(row)
        self.write_log()
        for name in ("eval_accuracy", "ema_eval_accuracy"):
            if self.writer and row.get(name) is not None:
                self.writer.add_scalar(name, row[name], self.state.steps)
        parts = [f"{self.UNIT} {number}/{self.phases}"]
        parts += [] if loss is None else [f"loss {loss:.4f}", f"train accuracy {train_accuracy:.2f} %"]
        parts += [] if row["eval_accuracy"] is None else [f"held-out accuracy {row['eval_accuracy']:.2f} %"]
        report(f"{', '.join(parts)}, {row['seconds']:.0f} s")

    def write_log(self) -> None:
        if distributed.is_main():
            write_csv(self.out_dir / "log.csv", self.log_fields, self.state.rows)

    # The steps

    def _placed(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(self.device, memory_format=self.layout)

    def _begin(self) -> None:
        if self.begin_phase(self.state.phase) or self.optimizer is None:
            self.optimizer = self._new_optimizer()
        else:
            self._forget_frozen()
        self.parallel, self.state.begun = None, True

    def _wrap(self) -> None:
        """DistributedDataParallel sees which parameters are free when it is made, so each phase makes one."""
        if self.parallel is None:
            self.parallel = self.student
            if self.processes > 1:
                on_gpu = {"device_ids": [self.device]} if self.device.type == "cuda" else {}
                # No buffer changes, so none is sent before each step. PyTorch 2.15 renamed the argument.
                names = inspect.signature(DistributedDataParallel).parameters
                sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
                self.parallel = DistributedDataParallel(self.student, **{sync: False}, **on_gpu)

    def _train_step(self, images: Tensor, labels: Tensor, own: int, size: int) -> None:
        """One step on this process's share of a batch of `size` images; `own` of them count (`share_of`)."""
        images = images.to(self.device, memory_format=self.layout, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        if self.processes > 1:  # dropout: a stream for each process and step, whatever ran before
            torch.manual_seed(derived_seed(self.options.seed, "step", self.state.steps, self.rank))
        piece = math.ceil(len(labels) / self.machine.accumulate)
        pieces = list(zip(images.split(piece), labels.split(piece)))
        sums = [0.0, 0, 0]
        self.optimizer.zero_grad()
        for index, (x, y) in enumerate(pieces):
            last = index + 1 == len(pieces)
            self.before_piece(len(y), size)
            with contextlib.nullcontext() if last or self.processes == 1 else self.parallel.no_sync():
                loss, logits = self._loss(x, y)
                count = len(y) if own else 0
                sums[0] += loss.item() * count
                sums[1] += int((logits.argmax(1) == y).sum()) if own else 0
                sums[2] += count
                if last:
                    sums = self._agree(sums)
                    self._check_finite(sums[0] / size)
                weight = count * self.processes / size  # DistributedDataParallel takes the processes' mean
                self.scaler.scale(loss if weight == 1 else loss * weight).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.after_step()
        self._update_average()
        self._count_step(*sums)

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over `images`, and the student's logits [B, K]; not in half precision."""
        precision = self.options.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=precision != "fp32"):
            with torch.no_grad():
                soft_labels = self.teacher(images)
            logits = self.parallel(images)
        if precision != "fp32":
            logits, soft_labels = logits.float(), soft_labels.float()
        return distillation_loss(logits, soft_labels, labels, self.options), logits

    def _agree(self, sums: list[float]) -> list[float]:
        """[loss, correct, images] over all processes; and whether a signal came to one, so that all stop together."""
        noted = self.signals.noted
        if self.processes == 1:
            self.stop_signal = noted
            return sums
        total = torch.tensor([*sums, noted is not None], dtype=torch.float64)
        loss, correct, seen, stop = distributed.all_reduce_sum(total).tolist()
        self.stop_signal = (noted or signal.SIGTERM) if stop else None
        return [loss, int(correct), int(seen)]

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise HarnessError(
                f"{self.UNIT} {self.phase_number(self.state.phase)}, step {self.state.step + 1}: the loss is {loss}; "
                f"the run has diverged. Choose a lower learning rate than {self.options.lr:g} and another output folder"
            )

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is not None:
            for mean, value in zip(self.average.parameters(), self.student.parameters()):
                mean.lerp_(value, 1 - self.options.ema_decay)

    def _count_step(self, loss_sum: float, correct: int, seen: int) -> None:
        state = self.state
        state.step, state.steps = state.step + 1, state.steps + 1
        state.loss_sum += loss_sum
        state.correct += correct
        state.seen += seen
        state.window = [a + b for a, b in zip(state.window, (loss_sum, correct, seen))]
        if state.steps % self.machine.log_every == 0:
            loss, right, images = state.window
            state.window = [0.0, 0, 0]
            row = (state.steps, self.phase_number(state.phase), loss / images, 100.0 * right / images)
            state.curve.append(dict(zip(CURVE_FIELDS, row)))
            if self.writer:
                self.writer.add_scalar("loss", row[2], state.steps)
                self.writer.add_scalar("train_accuracy", row[3], state.steps)

    def _steps_done(self) -> tuple[int, int]:
        """Steps of the phase: done, and in all."""
        per_epoch = math.ceil(len(self.indices) / self.options.batch_size)
        return self.state.epoch * per_epoch + self.state.step, self.epochs * per_epoch

    def _steps_left(self) -> int:
        """Steps to come, of this phase and the others."""
        done, steps = self._steps_done()
        return (self.phases - self.state.phase) * steps - done

    def _where(self) -> str:
        done, steps = self._steps_done()
        phase = f"{self.UNIT} {self.phase_number(self.state.phase)}/{self.phases}"
        return f"{phase}, step {done}/{steps}: loss {self.state.loss_sum / self.state.seen:.4f}"

    def _end_phase(self) -> None:
        state = self.state
        self.log_row(self.phase_number(state.phase), state.loss_sum / state.seen, 100.0 * state.correct / state.seen)
        state.start_phase(state.phase + 1)
        self.save_state()

    def _new_optimizer(self) -> torch.optim.SGD:
        free = [p for p in self.student.parameters() if p.requires_grad]
        return torch.optim.SGD(free, lr=self.options.lr, momentum=self.options.momentum)

    def _forget_frozen(self) -> None:
        """The optimizer goes on; what was frozen since leaves it."""
        for group in self.optimizer.param_groups:
            for parameter in (p for p in group["params"] if not p.requires_grad):
                self.optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if p.requires_grad]

    def _remaining_batches(self) -> Iterator[tuple[tuple[Tensor, Tensor], int, int]]:
        """((images, labels) of this process, how many of them count, images of the whole batch), from `state.step`."""
        batches = epoch_batches(self.indices, self.options, self.state.phase, self.state.epoch)
        remaining = batches[self.state.step :]
        shares = [share_of(batch, self.rank, self.processes) for batch in remaining]
        loader = SignalSafeLoader(
            SeededImages(self.dataset),
            batch_sampler=[items for items, _ in shares],
            num_workers=self.machine.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # not the global one, whose state is part of the result
        )
        label = f"{self.UNIT} {self.phase_number(self.state.phase)}/{self.phases}"
        self.student.train()
        shown = progress(loader, total=len(batches), initial=self.state.step, label=label)
        for pair, (_, own), batch in zip(shown, shares, remaining):
            yield pair, own, len(batch)

    def _evaluate(self, model: nn.Module) -> float | None:
        """Top-1 on the held-out images, in percent, never in half precision; each process takes every N-th.
        DataError, in every process, where none of them can be read."""
        if self.eval_dataset is None:
            return None
        model.eval()
        mine = range(self.rank, len(self.eval_dataset), self.processes)
        counts = torch.zeros(3, dtype=torch.float64)
        if mine or self.processes == 1:
            part = self.eval_dataset if self.processes == 1 else Subset(self.eval_dataset, mine)
            at_once = math.ceil(self.options.batch_size / self.processes / self.machine.accumulate)
            loader = make_loader(part, EVALUATION_FACTOR * at_once, workers=self.machine.workers)
            try:
                found, _ = count_batches(self.signals.giving_up(lambda images: self._predict(model, images)), loader)
                counts[0], counts[1] = found.top1, found.n
            except StopNoted:
                counts[2] = 1
        correct, seen, stop = distributed.all_reduce_sum(counts).tolist()
        if stop:
            self.stop_signal = self.signals.noted or signal.SIGTERM
            self._stop()
        if not seen:
            raise DataError(f"none of the {len(self.eval_dataset)} held-out images can be read")
        return 100.0 * correct / seen

    def _predict(self, model: nn.Module, images: Tensor) -> Tensor:
        return model(images.to(self.device, memory_format=self.layout))

    # Signals

    def _stop(self) -> None:
        """Leave a run whose state is written."""
        distributed.barrier()  # torchrun ends all when one has ended; the state is whole by now
        report(f"stopped by {self.stop_signal.name}; {self.state_path} holds the run: the same command goes on")
        raise KeyboardInterrupt

    # TensorBoard

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[None]:
        """Inside, `writer` writes to `out_dir`/tensorboard where that is wanted and the package is there."""
        if self.machine.tensorboard and distributed.is_main() and self.state.phase < self.phases:
            self.writer = _summary_writer(self.out_dir / "tensorboard", self.state.steps)
        try:
            yield
        finally:
            if self.writer:
                self.writer.close()
            self.writer = None

    # State

    def save_state(self) -> None:
        """Write state.pt, atomically: all that `resume` needs. All processes call it together, the first one writes."""
        self.state.seconds = self.watch.seconds()
        met = self._images_met()
        if not distributed.is_main():
            return
        content = {
            "version": STATE_VERSION,
            "kind": self.KIND,
            "identity": self.identity,
            "state": asdict(self.state),
            "student": self.student.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "met": met,
        }
        save_torch(self.state_path, content)
        if self.state.curve:
            write_csv(self.out_dir / "curve.csv", CURVE_FIELDS, self.state.curve)

    def _images_met(self) -> Tensor | None:
        """`ImageSet.met` over all processes, which call this together; None where the images are no files."""
        return distributed.all_reduce_max(self.dataset.met.clone()) if isinstance(self.dataset, ImageSet) else None

    def resume(self) -> None:
        """Take over state.pt where there is one.

        CheckpointError where it is damaged, belongs to another run, or where the processes do not all see the same one.
        What a state of before states named their training set, or described their models, does not say is taken to be
        as it is now.
        """
        content = load_state(self.state_path)
        if content is not None:
            self._check_identity(content)
            self.state = TrainState(**content["state"])
        seen = distributed.gather_objects(None if content is None else self.state.steps)
        if len(set(seen)) > 1:
            raise CheckpointError(
                f"{self.state_path}: the processes find different states of the run, after {seen} steps; "
                "--out must be a folder that all machines share"
            )
        if content is None:
            return
        self.watch = Stopwatch(self.state.seconds)
        for phase in range(min(self.phases, self.state.phase + self.state.begun)):
            self.begin_phase(phase)
        self.student.load_state_dict(content["student"])
        if self.average is not None:
            self.average.load_state_dict(content["average"])
        if content["optimizer"] is not None:
            self.optimizer = self._new_optimizer()
            self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"])
        if isinstance(self.dataset, ImageSet):
            self.dataset.remember(content.get("met"))
        if self.state.phase < self.phases:
            where = f"{self.UNIT} {self.phase_number(self.state.phase)}/{self.phases}, step {self.state.step}"
            report(f"resuming {self.state_path} at {where}")
        else:
            report(f"{self.state_path} is of a finished run; taking its result")

    def _check_identity(self, content: Any) -> None:
        advice = f"remove {self.out_dir} to begin anew, or choose another output folder"
        mine = {"version": STATE_VERSION, "kind": self.KIND}
        if not isinstance(content, dict) or any(content.get(key) != value for key, value in mine.items()):
            raise CheckpointError(f"{self.state_path}: not a {self.KIND} state of version {STATE_VERSION}; {advice}")
        before = content["identity"]
        if TRAINING_SET not in before:
            report(f"note: {self.state_path} is old and does not say its training set; it is taken to be this one")
            before = {**before, TRAINING_SET: self.identity[TRAINING_SET]}
        if missing := self.described - before.keys():
            report(
                f"note: {self.state_path} is old and does not say its models' geometry and how their images come in; "
                "both are taken to be as they are now"
            )
            before = {**before, **{key: self.identity[key] for key in missing}}
        changed = [
            f"{key.replace('_', ' ')} was {before.get(key)}, now {value}"
            for key, value in self.identity.items()
            if before.get(key) != value
        ]
        if changed:
            raise CheckpointError(
                f"{self.state_path}: belongs to a run with other options: {'; '.join(changed)}. {advice}"
            )


def _summary_writer(folder: Path, steps: int) -> Any:
    """A TensorBoard writer that goes on after `steps`; None, and a note, where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        report("note: there is no tensorboard package, only CSV files are written; `pip install tensorboard` adds it")
        return None
    return SummaryWriter(str(folder), purge_step=steps + 1)


def description(model: nn.Module, name: str, role: str) -> dict[str, Any]:
    """What the weights of a timm model, called `name`, do not show, for a run's identity: its geometry, and how its
    images come in, where that is noted on it. The entries' names begin with the `role` of the model."""
    return {**geometry(config_of(model, name), role), f"{role}'s input": noted_input(model) or None}


def geometry(config: SwinConfig, role: str) -> dict[str, Any]:
    """The entries of `description` that tell a model's geometry."""
    found = json.loads(config.to_json())
    return {f"{role}'s {key.replace('_', ' ')}": value for key, value in found.items() if key != "name"}


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights, names included."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

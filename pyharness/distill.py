"""Algorithm 1 of the seed paper: make a Swin GELU-less, block after block, by knowledge distillation.

    student = clone(teacher)
    for block in student.blocks:                    # from the input to the output
        block.activation = ReLU;  block.fc1.bias = 0, frozen
        one epoch of SGD on KL(teacher's soft labels || student's), all other parameters of the student free

The program's defaults are the paper's: learning rate 1e-2 held constant, momentum 0.9, batch 32, 10 % of the training
set (one subset, drawn once), one epoch per block. The optimizer starts anew with each block.

A run can be killed at any moment. It resumes from the last state it wrote, to the same result bit for bit on a CPU
with the same number of threads: the state holds student, optimizer, random generator and position, and the order of
the images, like the random crop of each image, follows from the seed, block and epoch alone.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import copy
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from pyharness.atomic import atomic_path
from pyharness.checkpoint import load_pickle
from pyharness.config import MICRO_DIGITS
from pyharness.data import get_dataset, make_loader
from pyharness.errors import CheckpointError, HarnessError, run_cli
from pyharness.evaluate import EvalResult, accuracy
from pyharness.model_card import write_card
from pyharness.models import (
    blocks_of,
    checkpoint_meta,
    config_of,
    create_model,
    is_geluless,
    load_model,
    make_geluless,
    make_geluless_block,
    save_checkpoint,
    weights_source,
)
from pyharness.training import Stopwatch, progress, repeatable, report, write_csv

LOG_FIELDS = ("block", "loss", "train_accuracy", "eval_accuracy", "seconds")
STATE_VERSION = 1


@dataclass(frozen=True)
class DistillOptions:
    """Everything the student depends on besides teacher and data set. The defaults are the paper's.

    `temperature` softens both distributions (the paper names none: 1); `distill` False replaces all blocks without any
    training (the paper's ablation).
    """

    lr: float = 1e-2
    momentum: float = 0.9
    batch_size: int = 32
    subset: float = 0.1
    epochs_per_block: int = 1
    temperature: float = 1.0
    seed: int = 0
    distill: bool = True

    def __post_init__(self) -> None:
        for ok, message in (
            (self.lr > 0, f"the learning rate must be greater than 0, found {self.lr}"),
            (0 <= self.momentum < 1, f"the momentum must be at least 0 and below 1, found {self.momentum}"),
            (self.batch_size > 0, f"the batch size must be at least 1, found {self.batch_size}"),
            (0 < self.subset <= 1, f"the subset must be a share above 0 and at most 1, found {self.subset}"),
            (self.epochs_per_block > 0, f"at least one epoch per block is needed, found {self.epochs_per_block}"),
            (self.temperature > 0, f"the temperature must be greater than 0, found {self.temperature}"),
        ):
            if not ok:
                raise HarnessError(message)


@dataclass
class DistillState:
    """Where a run stands: the next step to take, and what the epoch has summed up so far."""

    block: int = 0
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def start_block(self, block: int) -> None:
        self.block, self.epoch, self.step = block, 0, 0
        self.loss_sum, self.correct, self.seen = 0.0, 0, 0


@dataclass(frozen=True)
class DistillSummary:
    """What a finished run gave. Accuracies are in percent; `rows` is the log (`LOG_FIELDS`)."""

    student: SwinTransformer
    student_path: Path
    rows: list[dict[str, Any]]
    images: int
    steps_per_block: int
    seconds: float


def soft_label_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch; logits f32 [B, K].

    The factor T^2 keeps the gradient's size when T changes (Hinton et al., 2015). Equal logits give 0.
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


# --- The order of the images ------------------------------------------------------------------------------------------


def subset_indices(size: int, options: DistillOptions) -> Tensor:
    """The images that distillation uses, drawn once without replacement: ceil(size * subset) indices."""
    generator = torch.Generator().manual_seed(_derived_seed(options.seed, "subset"))
    return torch.randperm(size, generator=generator)[: math.ceil(size * options.subset)]


def epoch_batches(indices: Tensor, options: DistillOptions, block: int, epoch: int) -> list[list[tuple[int, int]]]:
    """The batches of one epoch as (image index, seed of its random crop): a function of its arguments alone."""
    generator = torch.Generator().manual_seed(_derived_seed(options.seed, "order", block, epoch))
    order = indices[torch.randperm(len(indices), generator=generator)].tolist()
    items = [(i, _derived_seed(options.seed, "image", block, epoch, i)) for i in order]
    return [items[begin : begin + options.batch_size] for begin in range(0, len(items), options.batch_size)]


def _derived_seed(*parts: int | str) -> int:
    """A seed for one purpose; neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "little")


class _SeededImages(Dataset):
    """A data set asked by (index, seed): an image's random crop depends on its seed alone, not on what came before."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            torch.manual_seed(seed)
            try:
                return self.dataset[index]
            finally:
                random.setstate(state)


# --- The run ----------------------------------------------------------------------------------------------------------


def distill(
    teacher: SwinTransformer,
    name: str,
    dataset: Dataset,
    options: DistillOptions,
    out_dir: str | Path,
    *,
    eval_dataset: Dataset | None = None,
    state_every: int = 200,
    workers: int = 0,
    device: str = "cpu",
    stop_after_steps: int | None = None,
) -> DistillSummary | None:
    """Make `teacher` (a timm Swin with GELU, called `name`) GELU-less; images f32 [B, C, H, W], labels i64 [B].

    Writes `out_dir`/student.safetensors, log.csv (one row per block) and state.pt (after every block and every
    `state_every` steps). Where state.pt is already there the run goes on from it; a finished one is only read.
    `eval_dataset` is evaluated after every block, for the log alone. `stop_after_steps` ends early, returning None,
    with the state written.

    CheckpointError where state.pt belongs to other options, another teacher or another data set. HarnessError where
    the teacher is not a GELU model, the data set is empty, or the loss is no longer finite.
    """
    run = _Run(teacher, name, dataset, options, Path(out_dir), eval_dataset, state_every, workers, device)
    with repeatable(options.seed):
        run.resume()
        if not options.distill:
            run.replace_all()
        elif not run.train_blocks(stop_after_steps):
            return None
        return run.finish()


class _Run:
    """One distillation with everything that stays the same during it, and its state."""

    def __init__(
        self,
        teacher: SwinTransformer,
        name: str,
        dataset: Dataset,
        options: DistillOptions,
        out_dir: Path,
        eval_dataset: Dataset | None,
        state_every: int,
        workers: int,
        device: str,
    ) -> None:
        if any(isinstance(block.mlp.act, nn.ReLU) for block in blocks_of(teacher)):
            raise HarnessError(f"{name}: the teacher has ReLU blocks already; a model with GELU throughout is needed")
        if len(dataset) == 0:
            raise HarnessError("the training set is empty; distillation needs images")
        config_of(teacher, name)
        self.name, self.options, self.out_dir = name, options, out_dir
        self.dataset, self.eval_dataset = dataset, eval_dataset
        self.state_every, self.workers, self.device = state_every, workers, torch.device(device)
        self.teacher = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)
        self.student = copy.deepcopy(teacher).to(self.device).requires_grad_(True)
        self.blocks = blocks_of(self.student)
        self.indices = subset_indices(len(dataset), options)
        self.identity = {
            **asdict(options),
            "model": name,
            "teacher": _digest(teacher),
            "training images": len(dataset),
        }
        self.state = DistillState()
        self.optimizer: torch.optim.SGD | None = None
        self.watch = Stopwatch()

    @property
    def state_path(self) -> Path:
        return self.out_dir / "state.pt"

    # Algorithm 1

    def train_blocks(self, stop_after_steps: int | None) -> bool:
        """Lines 2 to 8, from where the state stands; False where `stop_after_steps` ended it early."""
        budget = math.inf if stop_after_steps is None else stop_after_steps
        while self.state.block < len(self.blocks):
            if self.optimizer is None:
                make_geluless_block(self.blocks[self.state.block])
                self.optimizer = self._new_optimizer()
            while self.state.epoch < self.options.epochs_per_block:
                for images, labels in self._remaining_batches():
                    self._train_step(images, labels)
                    budget -= 1
                    if budget <= 0 or self.state.step % self.state_every == 0:
                        self.save_state()
                    if budget <= 0:
                        return False
                self.state.epoch, self.state.step = self.state.epoch + 1, 0
            self._end_block()
        return True

    def replace_all(self) -> None:
        """The paper's ablation: every block becomes GELU-less, and nothing is trained."""
        make_geluless(self.student)
        if not self.state.rows:
            self.state.block = len(self.blocks)
            self._log_row(len(self.blocks), None, None)
            self.save_state()

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        images, labels = images.to(self.device), labels.to(self.device)
        with torch.no_grad():
            soft_labels = self.teacher(images)
        logits = self.student(images)
        loss = soft_label_loss(logits, soft_labels, self.options.temperature)
        if not loss.isfinite():
            raise HarnessError(
                f"block {self.state.block + 1}, step {self.state.step + 1}: the loss is {loss.item()}; the run has "
                f"diverged. Choose a lower learning rate than {self.options.lr:g} and another output folder"
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.state.step += 1
        self.state.loss_sum += loss.item() * len(labels)
        self.state.correct += int((logits.argmax(1) == labels).sum())
        self.state.seen += len(labels)

    def _end_block(self) -> None:
        state = self.state
        self._log_row(state.block + 1, state.loss_sum / state.seen, 100.0 * state.correct / state.seen)
        state.start_block(state.block + 1)
        self.optimizer = None
        self.save_state()

    def _new_optimizer(self) -> torch.optim.SGD:
        free = [p for p in self.student.parameters() if p.requires_grad]
        return torch.optim.SGD(free, lr=self.options.lr, momentum=self.options.momentum)

    def _remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = epoch_batches(self.indices, self.options, self.state.block, self.state.epoch)
        loader = DataLoader(
            _SeededImages(self.dataset),
            batch_sampler=batches[self.state.step :],
            num_workers=self.workers,
            generator=torch.Generator(),  # not the global one, whose state is part of the result
        )
        label = f"block {self.state.block + 1}/{len(self.blocks)}"
        self.student.train()
        yield from progress(loader, total=len(batches), initial=self.state.step, label=label)

    # Log and state

    def _log_row(self, block: int, loss: float | None, train_accuracy: float | None) -> None:
        row = {
            "block": block,
            "loss": loss,
            "train_accuracy": train_accuracy,
            "eval_accuracy": None if self.eval_dataset is None else self._evaluate().top1,
            "seconds": round(self.watch.seconds(), 2),
        }
        self.state.rows.append(row)
        write_csv(self.out_dir / "log.csv", LOG_FIELDS, self.state.rows)
        parts = [f"block {block}/{len(self.blocks)}"]
        parts += [] if loss is None else [f"loss {loss:.4f}", f"train accuracy {train_accuracy:.2f} %"]
        parts += [] if row["eval_accuracy"] is None else [f"held-out accuracy {row['eval_accuracy']:.2f} %"]
        report(f"{', '.join(parts)}, {row['seconds']:.0f} s")

    def _evaluate(self) -> EvalResult:
        self.student.eval()
        loader = make_loader(self.eval_dataset, self.options.batch_size * 4, workers=self.workers)
        return accuracy(lambda images: self.student(images.to(self.device)), loader)

    def save_state(self) -> None:
        """Write state.pt, atomically: all that `resume` needs."""
        self.state.seconds = self.watch.seconds()
        content = {
            "version": STATE_VERSION,
            "identity": self.identity,
            "state": asdict(self.state),
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "random": torch.get_rng_state(),
        }
        with atomic_path(self.state_path) as temporary:
            torch.save(content, temporary)

    def resume(self) -> None:
        """Take over state.pt where there is one."""
        if not self.state_path.exists():
            return
        content = load_pickle(self.state_path)
        self._check_identity(content)
        self.state = DistillState(**content["state"])
        self.watch = Stopwatch(self.state.seconds)
        in_block = content["optimizer"] is not None
        for block in self.blocks[: self.state.block + in_block]:
            make_geluless_block(block)
        self.student.load_state_dict(content["student"])
        if in_block:
            self.optimizer = self._new_optimizer()
            self.optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"])
        if self.state.block < len(self.blocks):
            report(
                f"resuming {self.state_path} at block {self.state.block + 1}/{len(self.blocks)}, step {self.state.step}"
            )
        else:
            report(f"{self.state_path} is of a finished run; taking its result")

    def _check_identity(self, content: Any) -> None:
        advice = f"remove {self.out_dir} to begin anew, or choose another output folder"
        if not isinstance(content, dict) or content.get("version") != STATE_VERSION:
            raise CheckpointError(f"{self.state_path}: not a distillation state of version {STATE_VERSION}; {advice}")
        before = content["identity"]
        changed = [
            f"{key.replace('_', ' ')} was {before.get(key)}, now {value}"
            for key, value in self.identity.items()
            if before.get(key) != value
        ]
        if changed:
            raise CheckpointError(
                f"{self.state_path}: belongs to a run with other options: {'; '.join(changed)}. {advice}"
            )

    def finish(self) -> DistillSummary:
        """Write the student, and sum up."""
        student = self.student.cpu().eval()
        assert is_geluless(student)
        path = self.out_dir / "student.safetensors"
        origin = {"teacher_sha256": self.identity["teacher"], **asdict(self.options)}
        save_checkpoint(path, student, checkpoint_meta(student, self.name, distillation=origin))
        write_csv(self.out_dir / "log.csv", LOG_FIELDS, self.state.rows)
        images = len(self.indices) if self.options.distill else 0
        return DistillSummary(
            student=student,
            student_path=path,
            rows=self.state.rows,
            images=images,
            steps_per_block=math.ceil(images / self.options.batch_size) * self.options.epochs_per_block,
            seconds=self.state.seconds,
        )


def _digest(model: nn.Module) -> str:
    """SHA-256 of all weights, names included."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- The program ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    default = DistillOptions()
    parser = argparse.ArgumentParser(
        prog="distill.py",
        description="Replace GELU by ReLU block after block, distilling the GELU model's soft labels (Algorithm 1 of "
        "the seed paper). The defaults are the paper's, made for ImageNet.",
        epilog="Run again with the same options after an interruption: it goes on where it was. The digits are few, "
        "10 %% of them are 4 steps per block: `--subset 1 --epochs-per-block 3` takes about a minute on them and gets "
        "closer to the teacher.",
    )
    where = parser.add_argument_group("model and data")
    where.add_argument("--model", default=MICRO_DIGITS.name, help="timm name of the teacher (default: %(default)s)")
    where.add_argument(
        "--weights",
        default="pretrained",
        metavar="FILE",
        help="teacher's checkpoint; default: timm's hub, for the micro model the teacher in the package",
    )
    where.add_argument("--data", metavar="DIR", help="ImageNet-style folder with train/ and val/ (default: the digits)")
    where.add_argument("--out", type=Path, required=True, metavar="DIR", help="student, log and state go here")
    how = parser.add_argument_group("distillation")
    how.add_argument(
        "--lr", type=float, default=default.lr, help="constant learning rate of SGD (default: %(default)s)"
    )
    how.add_argument("--momentum", type=float, default=default.momentum, help="momentum of SGD (default: %(default)s)")
    how.add_argument("--batch", type=int, default=default.batch_size, help="images per step (default: %(default)s)")
    how.add_argument(
        "--subset",
        type=float,
        default=default.subset,
        metavar="SHARE",
        help="share of the training set that is used, drawn once (default: %(default)s)",
    )
    how.add_argument(
        "--epochs-per-block",
        type=int,
        default=default.epochs_per_block,
        metavar="N",
        help="passes over the subset after each block's replacement (default: %(default)s)",
    )
    how.add_argument(
        "--temperature", type=float, default=default.temperature, help="softens the labels (default: %(default)s)"
    )
    how.add_argument("--seed", type=int, default=default.seed, help="of subset, order and crops (default: %(default)s)")
    how.add_argument(
        "--no-distill", action="store_true", help="the paper's ablation: replace all blocks, train nothing"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--state-every",
        type=int,
        default=200,
        metavar="N",
        help="steps between two writings of the state, which also follows every block (default: %(default)s)",
    )
    machine.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="only cpu repeats bit for bit (default: cpu)"
    )
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    machine.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    return parser


def options_from(args: argparse.Namespace) -> DistillOptions:
    """The options that the command line gives."""
    return DistillOptions(
        lr=args.lr,
        momentum=args.momentum,
        batch_size=args.batch,
        subset=args.subset,
        epochs_per_block=args.epochs_per_block,
        temperature=args.temperature,
        seed=args.seed,
        distill=not args.no_distill,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    options = options_from(args)
    for flag, value in (("--state-every", args.state_every), ("--threads", args.threads)):
        if value is not None and value < 1:
            raise HarnessError(f"{flag} must be at least 1, found {value}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise HarnessError("--device cuda: PyTorch finds no GPU; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.weights == "pretrained":
        teacher = create_model(args.model, weights="pretrained")
    else:
        teacher, _ = load_model(args.weights, args.model)
    summary = distill(
        teacher,
        args.model,
        get_dataset(args.data, args.model, train=True, model=teacher, augment=True),
        options,
        args.out,
        eval_dataset=get_dataset(args.data, args.model, train=False, model=teacher),
        state_every=args.state_every,
        workers=args.workers,
        device=args.device,
    )
    write_card(
        summary.student_path,
        "GELU-less student",
        inputs={"teacher": weights_source(args.model, args.weights)},
        data=args.data or "scikit-learn's digits, training images",
        accuracy={"top1 on the held-out images": round(summary.rows[-1]["eval_accuracy"], 3)},
        argv=argv,
    )
    print(
        f"{summary.student_path}: GELU-less, held-out accuracy {summary.rows[-1]['eval_accuracy']:.2f} %, "
        f"{summary.images} images, {summary.steps_per_block} steps per block, {summary.seconds:.0f} s"
    )
    return 0


if __name__ == "__main__":
    run_cli(main)

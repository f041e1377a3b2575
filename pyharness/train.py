"""Train any Swin on any data set, from random weights or a checkpoint, in steps of minutes if need be.

    python pyharness/train.py --model swin_tiny_patch4_window7_224 --data procedural --init identity --lr 3e-4 \\
        --batch 256 --device cuda --max-minutes 9 --out tiny

writes model.safetensors, log.csv and train.json to the folder. With --max-minutes a run stops in time, with status 3
until it is done; started again, it goes on, to the same result bit for bit on a CPU with the same number of threads.
Procedural images are made on the device that trains. AdamW, warm-up and half a cosine, label smoothing.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from pyharness.atomic import atomic_path, make_writable_folder
from pyharness.config import MICRO_DIGITS, SwinConfig
from pyharness.data import (
    DATA_HELP,
    MAX_CORRUPT_SHARE,
    ImageSet,
    SeededImages,
    add_max_corrupt,
    check_images,
    class_names,
    evaluation_indices,
    get_dataset,
    input_normalization,
    make_loader,
    need_share,
    number_as,
    number_of_classes,
)
from pyharness.distributed import need_one_process
from pyharness.errors import CheckpointError, ClassesError, HarnessError, run_cli
from pyharness.evaluate import EvalResult, accuracy
from pyharness.models import (
    blocks_of,
    checkpoint_meta,
    config_of,
    create_model,
    model_from_config,
    need_classes,
    note_data,
    noted_classes,
    noted_input,
    own_name,
    save_checkpoint,
    weights_source,
)
from pyharness.procedural import ProceduralDataset, ProceduralSpec, is_procedural
from pyharness.signals import NotedSignals, SignalSafeLoader, StopNoted
from pyharness.tensor_file import save_torch
from pyharness.train_teacher import learning_rate, parameter_groups, spread_initial_weights
from pyharness.trainer import TRAINING_SET, data_identity, load_state, weights_digest
from pyharness.training import StepLines, Stopwatch, derived_seed, progress, repeatable, report, write_csv

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer

LOG_FIELDS = (
    "step", "epoch", "lr", "loss", "train_accuracy", "eval_accuracy", "eval_images", "images_per_s", "seconds",
)  # fmt: skip
STATE_VERSION = 1
STARTING_WEIGHTS = "starting weights"
"""The entry of a run's identity that tells from which weights it began."""
INPUT = "input"
"""The entry that tells how the images come in, where that is noted on the model (`models.note_data`)."""
UNFINISHED = 3
"""Exit status of a run that --max-minutes ended."""
NARROW = 64
"""Up to this many channels timm's initial weights hand on too little signal (see `spread_initial_weights`)."""
CONTINUING_LR = 2e-4
"""The default learning rate where training begins with --weights: the one with which scripts/swin_tiny_procedural.sh
goes on from trained weights at 224 x 224. That of `TrainingOptions` is for random ones."""
INITS = ("auto", "timm", "spread", "identity")
_AMP = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingOptions:
    """Everything the weights depend on besides the model and the data set."""

    epochs: float = 30
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.1
    max_norm: float = 5.0
    precision: str = "fp32"
    seed: int = 0
    init: str = "auto"

    def __post_init__(self) -> None:
        for ok, message in (
            (0 < self.epochs < math.inf, f"--epochs must be a number greater than 0, found {self.epochs:g}"),
            (self.batch_size > 0, f"--batch must be at least 1, found {self.batch_size}"),
            (0 < self.lr < math.inf, f"--lr must be a number greater than 0, found {self.lr:g}"),
            (
                0 <= self.weight_decay < math.inf,
                f"--weight-decay must be a number of at least 0, found {self.weight_decay:g}",
            ),
            (
                0 <= self.warmup_epochs < self.epochs,
                f"--warmup-epochs must be at least 0 and below --epochs, found {self.warmup_epochs:g}",
            ),
            (0 <= self.label_smoothing < 1, f"--label-smoothing must be in [0, 1), found {self.label_smoothing:g}"),
        ):
            if not ok:
                raise HarnessError(message)


# --- The images -------------------------------------------------------------------------------------------------------


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch, i64 [size]: a function of its arguments alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(derived_seed(seed, "order", epoch)))


def training_batches(
    dataset: Dataset,
    options: TrainingOptions,
    epoch: int,
    skip: int,
    workers: int,
    device: torch.device,
    end: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images f32 [B, C, H, W], labels i64 [B]) on `device`: batches `skip` to `end` - 1 of an epoch, all of them full.
    Of the others no image is read."""
    order = epoch_order(len(dataset), options.seed, epoch).split(options.batch_size)
    batches = [batch for batch in order if len(batch) == options.batch_size][skip:end]
    if isinstance(dataset, ProceduralDataset):
        for batch in batches:
            yield dataset.batch(batch, device)
        return
    items = [[(i, derived_seed(options.seed, "image", epoch, i)) for i in batch.tolist()] for batch in batches]
    loader = SignalSafeLoader(
        SeededImages(dataset), batch_sampler=items, num_workers=workers, generator=torch.Generator(),
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def evaluation_batches(
    dataset: Dataset, batch_size: int, limit: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of `evaluation_indices`, on `device`."""
    indices = evaluation_indices(len(dataset), limit)
    if isinstance(dataset, ProceduralDataset):
        for batch in indices.split(batch_size):
            yield dataset.batch(batch, device)
        return
    for images, labels in make_loader(Subset(dataset, indices.tolist()), batch_size, workers=workers):
        yield images.to(device), labels


# --- The run ----------------------------------------------------------------------------------------------------------


class Training:
    """A training run with its state: what `run` does until the time is up, and what it leaves in `out_dir`."""

    def __init__(
        self,
        model: SwinTransformer,
        name: str,
        train: Dataset,
        heldout: Dataset,
        options: TrainingOptions,
        out_dir: Path,
        *,
        data: str = "",
        weights: str = "random",
        device: torch.device | str = "cpu",
        workers: int = 0,
        eval_every: int = 500,
        eval_images: int = 2000,
        state_seconds: float = 120.0,
        max_corrupt: float = MAX_CORRUPT_SHARE,
    ) -> None:
        need_classes(model, name, "training is on classes")
        self.name, self.options, self.out_dir, self.device = name, options, Path(out_dir), torch.device(device)
        self.train, self.heldout, self.workers = train, heldout, workers
        self.eval_every, self.eval_images, self.state_seconds = eval_every, eval_images, state_seconds
        self.max_corrupt = max_corrupt
        self.steps_per_epoch = len(train) // options.batch_size
        if self.steps_per_epoch == 0:
            raise HarnessError(
                f"--batch {options.batch_size} is more than the {len(train)} training images; choose a smaller batch"
            )
        self.total = max(1, round(options.epochs * self.steps_per_epoch))
        config = asdict(config_of(model, name))
        self.data = data
        training_set = data_identity(train) or data
        self.identity = {
            **asdict(options), TRAINING_SET: training_set, "training images": len(train), "model": config,
            STARTING_WEIGHTS: "random" if weights == "random" else weights_digest(model),
            INPUT: noted_input(model) or None,
        }  # fmt: skip
        self.model = model.to(self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, options.weight_decay))
        self.step, self.rows, self.watch = 0, [], Stopwatch()
        self.signals = NotedSignals()
        self._reset_sums()

    @property
    def state_path(self) -> Path:
        return self.out_dir / "state.pt"

    def run(self, max_seconds: float | None = None) -> bool:
        """Train from where the state in `out_dir` stands; False where the time was up first.

        The time is looked at after every step, ahead of an evaluation that is due, which the next start makes up for;
        one that has begun is finished. The last evaluation begins with the state written. SIGTERM and SIGINT end the
        run after the step they come in, or in an evaluation, with the state written, by a KeyboardInterrupt.
        CheckpointError where that state is of another run; HarnessError where the loss is no longer finite, and ahead
        of the first step where `out_dir` cannot be written to.
        """
        make_writable_folder(self.state_path)
        # Operations with a fixed order of additions are slow on a GPU, and there do not make all of it repeat.
        fixed = repeatable(self.options.seed) if self.device.type == "cpu" else contextlib.nullcontext()
        with fixed, self.signals:
            self._resume()
            return self._train(None if max_seconds is None else time.monotonic() + max_seconds)

    def _train(self, deadline: float | None) -> bool:
        saved, lines = time.monotonic(), StepLines()
        self._log_row_if_due()  # the evaluation that a signal, or the end of the time, took the place of
        while self.step < self.total:
            epoch, within = divmod(self.step, self.steps_per_epoch)
            end = self.total - epoch * self.steps_per_epoch  # inside the epoch where that is the last, and a part
            batches = training_batches(self.train, self.options, epoch, within, self.workers, self.device, end)
            bar = progress(batches, total=self.steps_per_epoch, initial=within, label=f"epoch {epoch + 1}")
            self.model.train()
            for images, labels in bar:
                self._train_step(images, labels)
                lines.count(len(labels), self.total - self.step, self._where)
                now = time.monotonic()
                if self.signals.noted:
                    self._stop()
                late = deadline is not None and now >= deadline
                if late or self.step == self.total or now - saved >= self.state_seconds:
                    self._save_state()  # ahead of the last evaluation, which can take long
                    saved = time.monotonic()
                if late:
                    return False
                if self._log_row_if_due():
                    lines.restart()
        self._save_state()
        return True

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        lr = learning_rate(self.options, (self.step + 1) / self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        amp = _AMP[self.options.precision]
        with torch.autocast(self.device.type, amp, enabled=amp is not torch.float32):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.options.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_norm)
        self.optimizer.step()
        self.step += 1
        # Kept on the device: reading them each step would make a GPU wait.
        self.sums += torch.stack([loss.detach().double(), (logits.argmax(1) == labels).double().mean()])
        self.summed += 1

    def _reset_sums(self) -> None:
        self.sums, self.summed = torch.zeros(2, dtype=torch.float64, device=self.device), 0
        self.timed_from = self.step, time.monotonic()

    def _means(self) -> tuple[float, float]:
        """Mean loss and training accuracy in percent since the last row; HarnessError where they are not finite."""
        loss, right = (self.sums / max(self.summed, 1)).tolist()
        if not torch.isfinite(self.sums).all():
            raise HarnessError(
                f"step {self.step}: the loss is not finite, the run has diverged; choose a lower learning rate than "
                f"{self.options.lr:g} and another output folder"
            )
        return loss, 100.0 * right

    def evaluate(self, limit: int) -> EvalResult:
        """Accuracy on the held-out images of `evaluation_indices`, in the precision of the training."""
        self.model.eval()
        amp = _AMP[self.options.precision]
        batches = evaluation_batches(self.heldout, self.options.batch_size, limit, self.workers, self.device)
        with torch.autocast(self.device.type, amp, enabled=amp is not torch.float32):
            result = accuracy(self.signals.giving_up(self.model), batches, limit)
        self.model.train()
        return result

    def _where(self) -> str:
        epoch = self.step / self.steps_per_epoch
        return f"epoch {epoch:.2f}, step {self.step}/{self.total}: loss {(self.sums[0] / self.summed).item():.4f}"

    def _log_row_if_due(self) -> bool:
        """Evaluate and add a row to the log where that is due; whether it was."""
        due = self.step == self.total or (self.step > 0 and self.step % self.eval_every == 0)
        if not due or (self.rows and self.rows[-1]["step"] == self.step):
            return False
        try:
            self._log_row()
        except StopNoted:
            self._stop()
        return True

    def _stop(self) -> None:
        self._save_state()
        report(f"stopped by {self.signals.noted.name}; {self.state_path} holds the run: the same command goes on")
        raise KeyboardInterrupt

    def _log_row(self) -> None:
        loss, right = self._means()
        step, since = self.timed_from
        images = (self.step - step) * self.options.batch_size
        speed = images / (time.monotonic() - since) if images else None  # no step since a start: nothing was timed
        last = self.step == self.total
        result = self.evaluate(len(self.heldout) if last else self.eval_images)
        row = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 3),
            "lr": round(self.optimizer.param_groups[0]["lr"], 8),
            "loss": round(loss, 5),
            "train_accuracy": round(right, 3),
            "eval_accuracy": round(result.top1, 3),
            "eval_images": result.n,
            "images_per_s": None if speed is None else round(speed, 1),
            "seconds": round(self.watch.seconds(), 1),
        }
        self.rows.append(row)
        write_csv(self.out_dir / "log.csv", LOG_FIELDS, self.rows)
        timed = "" if speed is None else f", {speed:.0f} images/s"
        report(
            f"step {self.step}/{self.total}: loss {loss:.4f}, train accuracy {right:.2f} %, held-out accuracy "
            f"{result.top1:.2f} % of {result.n}{timed}, {row['seconds']:.0f} s"
        )
        self._reset_sums()

    # State

    def _save_state(self) -> None:
        self._means()  # a state that has diverged is no use
        content = {
            "version": STATE_VERSION,
            "identity": self.identity,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows,
            "sums": self.sums.cpu(),
            "summed": self.summed,
            "seconds": self.watch.seconds(),
            "met": self.train.met.clone() if isinstance(self.train, ImageSet) else None,
        }
        save_torch(self.state_path, content)

    def _resume(self) -> None:
        content = load_state(self.state_path)
        if content is None:
            return
        advice = f"remove {self.out_dir} to begin anew, or choose another output folder"
        if not isinstance(content, dict) or content.get("version") != STATE_VERSION:
            raise CheckpointError(f"{self.state_path}: not a training state of version {STATE_VERSION}; {advice}")
        mine = dict(self.identity)
        older = {"init": "auto", **{key: mine[key] for key in (STARTING_WEIGHTS, INPUT)}}  # what older states leave out
        before = {**older, **content["identity"]}
        if TRAINING_SET not in before:  # an old state, which holds what --data said instead
            del mine[TRAINING_SET]
            mine["data"] = self.data
        if changed := [
            f"{key} was {before.get(key)}, now {value}"
            for key, value in json.loads(json.dumps(mine)).items()
            if json.loads(json.dumps(before.get(key))) != value
        ]:
            continued = mine[STARTING_WEIGHTS] != "random"
            if continued and (before.get("lr"), self.options.lr) == (TrainingOptions.lr, CONTINUING_LR):
                advice = f"--lr {TrainingOptions.lr:g}, once the default with --weights too, is what it had; {advice}"
            raise CheckpointError(f"{self.state_path}: is of another run: {'; '.join(changed)}. {advice}")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.rows = content["step"], content["rows"]
        self.watch = Stopwatch(content["seconds"])
        self._reset_sums()
        self.sums += content["sums"].to(self.device)
        self.summed = content["summed"]
        if isinstance(self.train, ImageSet):
            self.train.remember(content.get("met"))
        report(f"resuming {self.state_path} at step {self.step}/{self.total}")

    def finish(self) -> tuple[Path, dict[str, Any]]:
        """Write the trained model, and a record beside it; the accuracy is that of the last row: of all held-out
        images, in the precision of the training. DataError, and no model, where too many training images could not be
        read."""
        check_images(self.train, self.out_dir / "corrupt.txt", self.max_corrupt)
        path = self.out_dir / "model.safetensors"
        last = self.rows[-1]
        result = {"heldout_accuracy": last["eval_accuracy"], "heldout_images": last["eval_images"]}
        model = self.model.eval()
        save_checkpoint(path, model, checkpoint_meta(model, self.name, training=asdict(self.options), **result))
        record = {"options": asdict(self.options), "data": self.data, "steps": self.total, **result}
        record |= {"seconds": last["seconds"], "device": self.device.type, "torch": torch.__version__}
        with atomic_path(self.out_dir / "train.json") as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return path, result


# --- The program ------------------------------------------------------------------------------------------------------


def build_model(
    name: str,
    *,
    classes: int | None,
    weights: str,
    changes: dict[str, Any],
    new_name: str | None,
    seed: int,
    init: str = "auto",
) -> tuple[SwinTransformer, str]:
    """The model to train, and its name. `changes` replace fields of the geometry of the model `name`; what they make
    has random weights and a name of its own. `init` (`INITS`) says what random weights are."""
    if not changes:
        if new_name is not None:
            raise HarnessError("--name is for a model of --set; another one keeps the name of --model")
        model = _with_classes(name, classes, weights, seed)
        final = name
    else:
        if weights != "random":
            raise HarnessError("--set makes a new geometry, which no checkpoint fits; leave --weights out")
        base = config_of(create_model(name), name)
        if classes is not None:
            changes = {"num_classes": classes, **changes}
        final = new_name or f"{name}_custom"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_from_config(dataclasses.replace(base, **changes, name=final))
    if weights == "random":
        set_initial_weights(model, config_of(model, final), init, seed)
    elif init != "auto":
        raise HarnessError(f"--init {init} is for random weights, and --weights names others; leave one of them out")
    return model, final


def _with_classes(name: str, classes: int | None, weights: str, seed: int) -> SwinTransformer:
    """The model `name` with `weights`; where a checkpoint has another number of classes than are asked for, with a
    random head in the place of its own."""
    if classes is None or weights_source(name, weights) in ("random", "pretrained"):
        return create_model(name, num_classes=classes, weights=weights, seed=seed)
    model = create_model(name, weights=weights, seed=seed)
    if model.num_classes != classes:
        head = f"its head of {model.num_classes} classes gives way to" if model.num_classes else "has no head, and gets"
        report(f"{weights}: {head} a random one of {classes}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.reset_classifier(classes)
            nn.init.trunc_normal_(model.head.fc.weight, std=0.02)
            nn.init.zeros_(model.head.fc.bias)
    return model


def set_initial_weights(model: SwinTransformer, config: SwinConfig, init: str, seed: int) -> None:
    """Change the fresh weights of a timm `model` as `init` says (one of `INITS`).

    "timm" leaves them; "spread" is `spread_initial_weights`; "auto" is that for narrow models alone. "identity" makes
    every block begin as the identity: spread weights, but zero ones in the two layers that write to the residual stream
    (attn.proj, mlp.fc2), and timm's in the head; Swin-V2's blocks do so anyway, by their last norms. The idea is
    that of zero-initialized residual branches (Goyal et al. 2017, section 5.1).
    """
    if init == "timm" or (init == "auto" and config.embed_dim > NARROW):
        return
    head = model.head.fc.weight.detach().clone()
    spread_initial_weights(model, seed)
    if init == "identity":
        with torch.no_grad():
            model.head.fc.weight.copy_(head)
            for block in blocks_of(model) if config.version == 1 else ():
                block.attn.proj.weight.zero_()
                block.mlp.fc2.weight.zero_()


def parse_changes(words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words as fields of a `SwinConfig`: img_size=56, embed_dim=32, depths=2,2, num_heads=1,2, ..."""
    lists = ("depths", "num_heads", "window_size")
    numbers = ("patch_size", "in_chans", "num_classes", "embed_dim")
    found: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            if key == "img_size":
                found[key] = (int(value), int(value))
            elif key == "mlp_ratio":
                found[key] = float(value)
            elif key in lists:
                found[key] = tuple(int(v) for v in value.split(","))
            elif key in numbers:
                found[key] = int(value)
                if found[key] < 1 and key == "num_classes":
                    raise HarnessError(f"--set {word}: training is on classes; left out, they are the data set's")
            else:
                raise ValueError
        except ValueError:
            raise HarnessError(
                f"--set {word!r} is not understood; give KEY=NUMBER, or KEY=N,N,... with one number per stage, of "
                f"img_size, mlp_ratio, {', '.join((*numbers, *lists))}"
            ) from None
    return found


def classes_of(data: str | None, classes: int | None) -> int | None:
    """How many classes to train: as the command line says, else as the data set's name does."""
    if classes is None and data is not None and is_procedural(data):
        return ProceduralSpec.parse(data).classes
    return classes


def learning_rate_of(weights: str, asked: float | None) -> float:
    """The highest learning rate: as asked for, else the default for random weights or for others."""
    return asked if asked is not None else TrainingOptions.lr if weights == "random" else CONTINUING_LR


def warmup_of(epochs: float, asked: float | None) -> float:
    """The epochs of warm-up: as asked for, else the default where the run is longer than that, else a tenth of it."""
    default = TrainingOptions.warmup_epochs
    return asked if asked is not None else default if epochs > default else epochs / 10


def build_parser() -> argparse.ArgumentParser:
    default = TrainingOptions()
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train any Swin (GELU, fp32 weights) on any data set: a teacher for distill.py.",
        epilog=f"Exit status {UNFINISHED}: --max-minutes ended the run; start it again with the same options.",
    )
    what = parser.add_argument_group("model and data")
    what.add_argument("--model", help=f"timm name (default: as the file of --weights says, else {MICRO_DIGITS.name})")
    what.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes",
        help="another geometry than the model's, as in: img_size=56 embed_dim=32 depths=2,2 num_heads=1,2 "
        "window_size=7,7 in_chans=3",
    )  # fmt: skip
    what.add_argument("--name", help="what to call a model of --set (default: the model's name and _custom)")
    what.add_argument(
        "--classes", type=int, metavar="N",
        help="default: the data set's number where weights are random or have no head, or it is procedural, else the "
        "model's",
    )  # fmt: skip
    what.add_argument("--weights", default="random", metavar="FILE", help="where to start (default: random)")
    what.add_argument("--data", metavar="DATA", help=f"{DATA_HELP} (default: the digits)")
    what.add_argument("--out", type=Path, required=True, metavar="DIR", help="model, log and state go here")
    how = parser.add_argument_group("training")
    how.add_argument("--epochs", type=float, default=default.epochs, help="default: %(default)s")
    how.add_argument("--batch", type=int, default=default.batch_size, help="images per step (default: %(default)s)")
    how.add_argument(
        "--lr", type=float, help=f"highest learning rate (default: {default.lr:g}, with --weights {CONTINUING_LR:g})"
    )
    how.add_argument("--weight-decay", type=float, default=default.weight_decay, help="default: %(default)s")
    how.add_argument(
        "--warmup-epochs", type=float,
        help=f"default: {default.warmup_epochs:g}, or where --epochs is no more than that a tenth of it",
    )  # fmt: skip
    how.add_argument("--label-smoothing", type=float, default=default.label_smoothing, help="default: %(default)s")
    how.add_argument("--seed", type=int, default=default.seed, help="of weights, order, crops (default: %(default)s)")
    how.add_argument(
        "--init", choices=INITS, default=default.init,
        help="random weights: timm's; spread, Xavier's, for narrow models; identity, where blocks begin as identities, "
        "which deep models with little data begin to learn from sooner (default: auto, spread for at most "
        f"{NARROW} channels, else timm)",
    )  # fmt: skip
    how.add_argument(
        "--precision", choices=_AMP, help="bf16 is mixed: fp32 weights and sums (default: bf16 on a GPU, else fp32)"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="only cpu repeats bit for bit")
    machine.add_argument("--max-minutes", type=float, metavar="M", help="stop in time, with the state written")
    machine.add_argument(
        "--eval-every", type=int, default=500, metavar="N", help="steps between two rows of the log (default: 500)"
    )
    machine.add_argument(
        "--eval-images", type=int, default=2000, metavar="N",
        help="held-out images for a row of the log, drawn evenly from all and the same for each row; all of them for "
        "the last (default: %(default)s)",
    )  # fmt: skip
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    machine.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    add_max_corrupt(machine)
    return parser


def _model_and_images(
    args: argparse.Namespace, start: str, changes: dict[str, Any], classes: int | None
) -> tuple[SwinTransformer, str, Dataset]:
    """The model to train, its name, and the training images for it. ClassesError where these have other classes."""
    model, name = build_model(
        start, classes=classes, weights=args.weights, changes=changes, new_name=args.name, seed=args.seed,
        init=args.init,
    )  # fmt: skip
    began = noted_classes(model)
    model.class_names = []  # the file follows --data
    note_data(model, {"input": input_normalization(args.data, name, model)})
    dataset = get_dataset(args.data, name, train=True, model=model, augment=True)
    number_as(dataset, began, str(args.data))  # of the same classes, the head that training begins with knows them so
    note_data(model, {"classes": class_names(dataset)})
    return model, name, dataset


def _fitting_model_and_images(
    args: argparse.Namespace, start: str, changes: dict[str, Any], classes: int | None
) -> tuple[SwinTransformer, str, Dataset]:
    """`_model_and_images`; where neither the command line nor the head of --weights says how many classes, with as many
    as the images have."""
    said = classes is not None or "num_classes" in changes
    try:
        model, name, dataset = _model_and_images(args, start, changes, classes)
        said = said or (args.weights != "random" and model.num_classes > 0)
        found = number_of_classes(dataset)
        if said or found in (None, model.num_classes):
            return model, name, dataset
    except ClassesError as error:
        if said or args.weights != "random":
            raise
        found = error.classes
    report(f"{found} classes, of {args.data or 'the digits'}")
    return _model_and_images(args, start, changes, found)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    need_one_process()
    for flag, value in (
        ("--threads", args.threads), ("--eval-every", args.eval_every), ("--eval-images", args.eval_images),
        ("--classes", args.classes),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise HarnessError(f"{flag} must be at least 1, found {value}")
    if args.workers < 0:
        raise HarnessError(f"--workers must be at least 0, found {args.workers}")
    need_share(args.max_corrupt)
    if args.max_minutes is not None and not args.max_minutes > 0:
        raise HarnessError(f"--max-minutes must be greater than 0, found {args.max_minutes:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise HarnessError("--device cuda: PyTorch finds no GPU; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    options = TrainingOptions(
        epochs=args.epochs, batch_size=args.batch, lr=learning_rate_of(args.weights, args.lr),
        weight_decay=args.weight_decay, warmup_epochs=warmup_of(args.epochs, args.warmup_epochs),
        label_smoothing=args.label_smoothing, seed=args.seed, init=args.init,
        precision=args.precision or ("bf16" if args.device == "cuda" else "fp32"),
    )  # fmt: skip
    started = time.monotonic()
    start = args.model or (MICRO_DIGITS.name if args.weights in ("random", "pretrained") else own_name(args.weights))
    changes, classes = parse_changes(args.changes), classes_of(args.data, args.classes)
    model, name, train = _fitting_model_and_images(args, start, changes, classes)
    training = Training(
        model,
        name,
        train,
        get_dataset(args.data, name, train=False, model=model),
        options,
        args.out,
        data=str(args.data),
        weights=args.weights,
        device=args.device,
        workers=args.workers,
        eval_every=args.eval_every,
        eval_images=args.eval_images,
        max_corrupt=args.max_corrupt,
    )
    left = None if args.max_minutes is None else 60 * args.max_minutes - (time.monotonic() - started)
    if not training.run(left):
        print(f"{args.out}: stopped at step {training.step}/{training.total}; start it again to go on")
        return UNFINISHED
    path, result = training.finish()
    print(f"{path}: held-out accuracy {result['heldout_accuracy']:.2f} % on {result['heldout_images']} images")
    return 0


if __name__ == "__main__":
    run_cli(main)

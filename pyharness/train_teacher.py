"""Train the micro Swin on scikit-learn's digits: the GELU teacher that the package carries.

`python pyharness/train_teacher.py` writes the checkpoint, a log (.csv) and a record of how it was made (.json) side by
side. Everything follows from the seed: AdamW, one-cycle cosine learning rate, small random shifts, turns and scalings.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyharness.atomic import atomic_path
from pyharness.config import MICRO_DIGITS
from pyharness.data import digits_split
from pyharness.distributed import need_one_process
from pyharness.errors import HarnessError, run_cli
from pyharness.models import MICRO_TEACHER, checkpoint_meta, create_model, save_checkpoint
from pyharness.training import Stopwatch, progress, repeatable, report, write_csv

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer

LOG_FIELDS = ("epoch", "lr", "loss", "train_accuracy", "heldout_accuracy", "seconds")


@dataclass(frozen=True)
class TeacherOptions:
    """Everything the result depends on, besides the versions of PyTorch and the CPU's kind."""

    seed: int = 0
    epochs: int = 50
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 4
    label_smoothing: float = 0.05
    max_turn_degrees: float = 12.0
    max_scale: float = 0.12
    max_shift_pixels: float = 2.5


def learning_rate(options: Any, progress_in_epochs: float) -> float:
    """Linear warm-up, then half a cosine down to zero at the last epoch; `options` have lr, epochs, warmup_epochs."""
    if progress_in_epochs < options.warmup_epochs:
        return options.lr * progress_in_epochs / options.warmup_epochs
    fraction = (progress_in_epochs - options.warmup_epochs) / (options.epochs - options.warmup_epochs)
    return options.lr * 0.5 * (1.0 + math.cos(math.pi * fraction))


def augment(images: Tensor, options: TeacherOptions) -> Tensor:
    """Each image [B, 1, H, W] turned, scaled and shifted by its own small random amounts; the border is repeated."""
    batch, size = len(images), images.shape[-1]
    turn, scale, dx, dy = torch.rand(4, batch) * 2 - 1
    angle = turn * math.radians(options.max_turn_degrees)
    zoom = 1 + scale * options.max_scale
    shift = options.max_shift_pixels * 2 / size  # grid coordinates run from -1 to 1
    theta = torch.stack(
        [zoom * angle.cos(), -zoom * angle.sin(), dx * shift, zoom * angle.sin(), zoom * angle.cos(), dy * shift], dim=1
    )
    grid = F.affine_grid(theta.view(batch, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def spread_initial_weights(model: nn.Module, seed: int) -> None:
    """Xavier-uniform weights for all linear layers. timm's 0.02 is made for wide models: at 32 channels it hands on
    next to no signal, and the first ten epochs go by without learning."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """For an optimizer: matrices decay; biases, norms, and what makes the position bias and V2's temperature do not."""
    kept = ("relative_position", "cpb_mlp", "logit_scale")
    named = [(p, p.ndim < 2 or any(part in name for part in kept)) for name, p in model.named_parameters()]
    return [
        {"params": [p for p, is_plain in named if not is_plain], "weight_decay": weight_decay},
        {"params": [p for p, is_plain in named if is_plain], "weight_decay": 0.0},
    ]


@torch.inference_mode()
def percent_correct(model: SwinTransformer, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent, in eval mode."""
    model.eval()
    return 100.0 * (model(images).argmax(1) == labels).float().mean().item()


def train_teacher(
    options: TeacherOptions, after_epoch: Callable[[dict[str, Any]], None] = lambda row: None
) -> tuple[SwinTransformer, list[dict[str, Any]]]:
    """Train a micro Swin from random weights: the model in eval mode, and one log row per epoch (`LOG_FIELDS`).

    The held-out accuracy is only logged: the last epoch's weights are kept, whatever it says.
    """
    train_images, train_labels, test_images, test_labels = digits_split()
    model = create_model(MICRO_DIGITS.name, seed=options.seed)
    spread_initial_weights(model, options.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay))
    steps = math.ceil(len(train_labels) / options.batch_size)
    rows, watch = [], Stopwatch()
    with repeatable(options.seed):
        for epoch in range(options.epochs):
            model.train()
            loss_sum, correct = 0.0, 0
            order = torch.randperm(len(train_labels)).split(options.batch_size)
            for step, index in enumerate(progress(order, total=steps, initial=0, label=f"epoch {epoch + 1}")):
                lr = learning_rate(options, epoch + (step + 1) / steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                logits = model(augment(train_images[index], options))
                loss = F.cross_entropy(logits, train_labels[index], label_smoothing=options.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.item() * len(index)
                correct += int((logits.argmax(1) == train_labels[index]).sum())
            row = {
                "epoch": epoch + 1,
                "lr": round(lr, 8),
                "loss": round(loss_sum / len(train_labels), 5),
                "train_accuracy": round(100 * correct / len(train_labels), 3),
                "heldout_accuracy": round(percent_correct(model, test_images, test_labels), 3),
                "seconds": round(watch.seconds(), 1),
            }
            rows.append(row)
            after_epoch(row)
    return model.eval(), rows


def save_teacher(path: Path, model: SwinTransformer, rows: list[dict[str, Any]], options: TeacherOptions) -> None:
    """Write the checkpoint at `path`, and beside it the log (.csv) and the record (.json)."""
    import sklearn
    import timm

    accuracy = rows[-1]["heldout_accuracy"]
    save_checkpoint(path, model, checkpoint_meta(model, MICRO_DIGITS.name, heldout_accuracy=accuracy))
    write_csv(path.with_suffix(".csv"), LOG_FIELDS, rows)
    record = {
        "command": f"python pyharness/train_teacher.py --seed {options.seed} --epochs {options.epochs} "
        f"--threads {torch.get_num_threads()}",
        "options": asdict(options),
        "heldout_accuracy": accuracy,
        "heldout_images": 597,
        "seconds": rows[-1]["seconds"],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_teacher.py",
        description="Train the micro Swin (GELU, fp32) on scikit-learn's digits; 3 minutes on one CPU core.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=MICRO_TEACHER, help="checkpoint; .csv and .json go beside it")
    parser.add_argument("--seed", type=int, default=TeacherOptions.seed, help="seed of weights, order and augmentation")
    parser.add_argument(
        "--epochs", type=int, default=TeacherOptions.epochs, help="passes over the 1200 training images"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the result repeats for the same number")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    need_one_process()
    if args.epochs <= TeacherOptions.warmup_epochs or args.threads < 1:
        raise HarnessError(
            f"--epochs must be more than {TeacherOptions.warmup_epochs} (the warm-up), --threads at least 1"
        )
    torch.set_num_threads(args.threads)
    options = TeacherOptions(seed=args.seed, epochs=args.epochs)

    def show(row: dict[str, Any]) -> None:
        report(
            f"epoch {row['epoch']}/{options.epochs}: loss {row['loss']:.4f}, "
            f"held-out accuracy {row['heldout_accuracy']:.2f} %, {row['seconds']:.0f} s"
        )

    model, rows = train_teacher(options, show)
    save_teacher(args.out, model, rows, options)
    print(f"{args.out}: held-out accuracy {rows[-1]['heldout_accuracy']:.2f} % on 597 images")
    return 0


if __name__ == "__main__":
    run_cli(main)

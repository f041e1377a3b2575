"""Algorithm 1 of the seed paper: make a Swin GELU-less, block after block, by knowledge distillation.

    student = clone(teacher)
    for block in student.blocks:                    # from the input to the output
        block.activation = ReLU;  block.fc1.bias = 0, frozen
        one epoch of SGD on KL(teacher's soft labels || student's), all other parameters of the student free

The program's defaults are the paper's: learning rate 1e-2 held constant, momentum 0.9, batch 32, 10 % of the training
set (one subset, drawn once), one epoch per block. Where the paper leaves a choice open it is an option, with what we
take it to mean as the default: the temperature (1), the loss (KL), the order of the blocks (the algorithm's), and that
the optimizer starts anew with each block. pyharness/ablate_distillation.py compares them.

One process or, with `torchrun --nproc-per-node N pyharness/distill.py ...`, many; pyharness/trainer.py has the loop.

A run can be killed at any moment. It resumes from the last state it wrote, to the same result bit for bit on a CPU
with the same number of threads: the state holds student, optimizer, random generator and position, and the order of
the images, like the random crop of each image, follows from the seed, block and epoch alone.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import Dataset

from pyharness import distributed
from pyharness.config import MICRO_DIGITS
from pyharness.data import DATA_HELP, class_names, get_dataset, input_normalization
from pyharness.errors import HarnessError, run_cli
from pyharness.model_card import write_card
from pyharness.models import (
    blocks_of,
    checkpoint_meta,
    config_of,
    create_model,
    is_geluless,
    load_model,
    make_geluless_block,
    make_relu_block,
    need_classes,
    note_data,
    noted_classes,
    own_name,
    save_checkpoint,
    weights_source,
)
from pyharness.train_options import (
    Machine,
    TrainOptions,
    add_machine_arguments,
    add_option_arguments,
    machine_from,
    one_of,
    options_of,
    parse_with_config,
    write_options,
)
from pyharness.trainer import Trainer, description, epoch_batches, soft_label_loss, subset_indices, weights_digest
from pyharness.training import repeatable

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer

__all__ = ["DistillOptions", "DistillSummary", "distill", "epoch_batches", "soft_label_loss", "subset_indices"]

ORDERS = ("first_to_last", "last_to_first")
SCHEDULES = ("gradual", "at_once")
BIASES = ("fc1", "none")
OPTIMIZERS = ("restart", "carry")


@dataclass(frozen=True)
class DistillOptions(TrainOptions):
    """Everything the student depends on besides teacher and data set. The defaults are the paper's.

    `order`: of the blocks. `schedule`: "at_once" replaces all blocks before the first epoch and trains as long as
    "gradual". `drop_bias`: "none" keeps the FC1 bias, for the ablation alone; no graph can run such a student.
    `optimizer`: whether it starts anew with each replacement. `distill` False replaces all blocks without any training
    (the paper's ablation).
    """

    epochs_per_block: int = 1
    order: str = "first_to_last"
    schedule: str = "gradual"
    drop_bias: str = "fc1"
    optimizer: str = "restart"
    distill: bool = True

    def _requirements(self) -> list[tuple[bool, str]]:
        return [
            *super()._requirements(),
            (self.epochs_per_block > 0, f"at least one epoch per block is needed, found {self.epochs_per_block}"),
            one_of("order", self.order, ORDERS),
            one_of("schedule", self.schedule, SCHEDULES),
            one_of("drop_bias", self.drop_bias, BIASES),
            one_of("optimizer", self.optimizer, OPTIMIZERS),
        ]


@dataclass(frozen=True)
class DistillSummary:
    """What a finished run gave. Accuracies are in percent; `rows` is the log, one row per block.

    `average` is the moving average of the student's weights, None where none was kept.
    """

    student: SwinTransformer
    student_path: Path
    rows: list[dict[str, Any]]
    images: int
    steps_per_block: int
    seconds: float
    average: SwinTransformer | None = None


def distill(
    teacher: SwinTransformer,
    name: str,
    dataset: Dataset,
    options: DistillOptions,
    out_dir: str | Path,
    *,
    eval_dataset: Dataset | None = None,
    stop_after_steps: int | None = None,
    **machine: Any,
) -> DistillSummary | None:
    """Make `teacher` (a timm Swin with GELU, called `name`) GELU-less; images f32 [B, C, H, W], labels i64 [B].

    Writes `out_dir`/student.safetensors, options.json, log.csv (one row per block), curve.csv and state.pt (after every
    block and every `state_every` steps); with an average of the weights also student_ema.safetensors. Where state.pt is
    already there the run goes on from it; a finished one is only read. `eval_dataset` is evaluated after every block,
    for the log alone. `stop_after_steps` ends early, returning None, with the state written. `machine`: the fields of
    `trainer.Machine`.

    CheckpointError where state.pt belongs to other options, another teacher or another data set. HarnessError where
    the teacher is not a GELU model, the data set is empty, or the loss is no longer finite. DataError, and no student,
    where more images than `max_corrupt` says could not be read.
    """
    run = _Run(teacher, name, dataset, options, Path(out_dir), eval_dataset, Machine(**machine))
    with repeatable(options.seed):
        run.resume()
        write_options(run.out_dir, options)
        if not options.distill:
            run.replace_all()
        elif not run.train(stop_after_steps):
            return None
        return run.finish()


class _Run(Trainer):
    """One distillation: a phase per block."""

    UNIT = "block"
    KIND = "distillation"

    def __init__(
        self,
        teacher: SwinTransformer,
        name: str,
        dataset: Dataset,
        options: DistillOptions,
        out_dir: Path,
        eval_dataset: Dataset | None,
        machine: Machine,
    ) -> None:
        if any(isinstance(block.mlp.act, nn.ReLU) for block in blocks_of(teacher)):
            raise HarnessError(f"{name}: the teacher has ReLU blocks already; a model with GELU throughout is needed")
        config_of(teacher, name)
        self.name = name
        super().__init__(
            teacher,
            teacher,
            dataset,
            options,
            out_dir,
            machine,
            phases=len(blocks_of(teacher)),
            epochs=options.epochs_per_block,
            identity={"model": name, "teacher": weights_digest(teacher)},
            described=description(teacher, name, "teacher"),
            eval_dataset=eval_dataset,
        )
        self.blocks = blocks_of(self.student)

    # Algorithm 1

    def begin_phase(self, phase: int) -> bool:
        """Lines 3 to 6."""
        chosen = self._replaced_in(phase)
        for model in self.models():
            self._replace([blocks_of(model)[block] for block in chosen])
        return bool(chosen) and self.options.optimizer == "restart"

    def phase_number(self, phase: int) -> int:
        """The number of the block that the phase replaces, from 1 at the input; at once, of the phase."""
        return (self._replaced_in(phase)[0] if self.options.schedule == "gradual" else phase) + 1

    def replace_all(self) -> None:
        """The paper's ablation: every block is replaced, and nothing is trained."""
        for model in self.models():
            self._replace(blocks_of(model))
        if not self.state.rows:
            self.state.phase = self.phases
            self.log_row(self.phases, None, None)
            self.save_state()

    def _replaced_in(self, phase: int) -> list[int]:
        every = range(self.phases) if self.options.order == "first_to_last" else range(self.phases)[::-1]
        if self.options.schedule == "gradual":
            return [every[phase]]
        return list(every) if phase == 0 else []

    def _replace(self, blocks: list[nn.Module]) -> None:
        for block in blocks:
            (make_geluless_block if self.options.drop_bias == "fc1" else make_relu_block)(block)

    def finish(self) -> DistillSummary:
        """Write the student, and sum up. DataError where too many images could not be read."""
        self.check_images()
        models = self.finished_models()
        assert self.options.drop_bias == "none" or all(is_geluless(model) for model in models)
        origin = {"teacher_sha256": self.identity["teacher"], **asdict(self.options)}
        paths = [self.out_dir / "student.safetensors", self.out_dir / "student_ema.safetensors"]
        if distributed.is_main():
            for path, model in zip(paths, models):
                save_checkpoint(path, model, checkpoint_meta(model, self.name, distillation=origin))
        self.write_log()
        distributed.barrier()
        images = len(self.indices) if self.options.distill else 0
        return DistillSummary(
            student=models[0],
            student_path=paths[0],
            rows=self.state.rows,
            images=images,
            steps_per_block=math.ceil(images / self.options.batch_size) * self.options.epochs_per_block,
            seconds=self.state.seconds,
            average=models[1] if len(models) > 1 else None,
        )


# --- The program ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    default = DistillOptions()
    parser = argparse.ArgumentParser(
        prog="distill.py",
        description="Replace GELU by ReLU block after block, distilling the GELU model's soft labels (Algorithm 1 of "
        "the seed paper). The defaults are the paper's, made for ImageNet. On many GPUs or machines: "
        "`torchrun --nproc-per-node N pyharness/distill.py --device cuda ...`.",
        epilog="Run again with the same options after an interruption: it goes on where it was. The digits are few, "
        "10 % of them are 4 steps per block: `--subset 1 --epochs-per-block 3` takes about a minute on them and gets "
        "closer to the teacher.",
    )
    where = parser.add_argument_group("model and data")
    where.add_argument(
        "--model",
        metavar="NAME",
        help="timm name of the teacher (default: the checkpoint's own; of the teacher in the package "
        f"{MICRO_DIGITS.name})",
    )
    where.add_argument(
        "--weights",
        default="pretrained",
        metavar="FILE",
        help="teacher's checkpoint; default: timm's hub, for the micro model the teacher in the package",
    )
    where.add_argument("--data", metavar="DATA", help=f"{DATA_HELP} (default: the digits)")
    where.add_argument("--out", type=Path, required=True, metavar="DIR", help="student, log and state go here")
    how = parser.add_argument_group("distillation")
    add_option_arguments(how, default)
    how.add_argument(
        "--epochs-per-block",
        type=int,
        default=default.epochs_per_block,
        metavar="N",
        help="passes over the subset after each block's replacement (default: %(default)s)",
    )
    how.add_argument("--order", choices=ORDERS, default=default.order, help="of the blocks (default: %(default)s)")
    how.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default=default.schedule,
        help="one block after the other, or all before the first epoch; as many epochs either way (%(default)s)",
    )
    how.add_argument(
        "--drop-bias",
        choices=BIASES,
        default=default.drop_bias,
        help="none: an ablation in fp32 alone, which no INT8 graph can run (default: %(default)s)",
    )
    how.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default=default.optimizer,
        help="whether it starts anew with each replacement (default: %(default)s)",
    )
    how.add_argument(
        "--no-distill",
        dest="distill",
        action="store_false",
        help="the paper's ablation: replace all blocks, train nothing",
    )
    add_machine_arguments(parser)
    return parser


def options_from(args: argparse.Namespace) -> DistillOptions:
    """The options that the command line gives."""
    return options_of(DistillOptions, args)


def load_teacher(weights: str, name: str | None) -> tuple[SwinTransformer, str]:
    """The teacher that --weights and --model give, and its name: the latter, else the checkpoint's own; of "pretrained"
    the micro model's. CheckpointError and ModelError as `load_model` and `create_model`."""
    if weights == "pretrained":
        name = name or MICRO_DIGITS.name
        return create_model(name, weights="pretrained"), name
    name = name or own_name(weights)
    return load_model(weights, name)[0], name


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_with_config(build_parser(), argv, DistillOptions)
    options, machine = options_from(args), machine_from(args)
    with distributed.session():
        distributed.device_for(machine.device)
        teacher, name = load_teacher(args.weights, args.model)
        need_classes(teacher, name, "distillation compares logits")
        note_data(teacher, {"input": input_normalization(args.data, name, teacher)})  # the student's file says it too
        dataset = get_dataset(args.data, name, train=True, model=teacher, augment=True)
        if not noted_classes(teacher):
            note_data(teacher, {"classes": class_names(dataset)})
        summary = distill(
            teacher,
            name,
            dataset,
            options,
            args.out,
            eval_dataset=get_dataset(args.data, name, train=False, model=teacher),
            **asdict(machine),
        )
        if distributed.is_main():
            _write_cards(summary, weights_source(name, args.weights), args.data, argv)
            kind = "GELU-less" if options.drop_bias == "fc1" else "ReLU with FC1 biases, for the ablation alone"
            print(
                f"{summary.student_path}: {kind}, held-out accuracy {summary.rows[-1]['eval_accuracy']:.2f} %, "
                f"{summary.images} images, {summary.steps_per_block} steps per block, {summary.seconds:.0f} s"
            )
    return 0


def _write_cards(summary: DistillSummary, teacher: str | Path, data: str | None, argv: Sequence[str] | None) -> None:
    """The card of the student and, where there is one, of the average of its weights."""
    made = [(summary.student_path, "GELU-less student", "eval_accuracy")]
    if summary.average is not None:
        average = summary.student_path.with_name("student_ema.safetensors")
        made.append((average, "GELU-less student, average of its weights", "ema_eval_accuracy"))
    for path, kind, accuracy in made:
        write_card(
            path,
            kind,
            inputs={"teacher": teacher},
            data=data or "scikit-learn's digits, training images",
            accuracy={"top1 on the held-out images": round(summary.rows[-1][accuracy], 3)},
            argv=argv,
        )


if __name__ == "__main__":
    run_cli(main)

"""Quantization-aware training: fine-tune a calibrated model until, fake-quantized, it gives the teacher's soft labels.

The student is the calibrated checkpoint's model with every quantizer at work (pyharness/fakequant.py; those of the
fused graph: pyharness/fused_fakequant.py); the teacher is an fp32 model, most often the GELU one that all graphs come
from. Rounding passes gradients straight through, as ModelOpt's quantizers do. As in FasterTransformer's recipe every
amax stays as calibrated; `learn_amax` trains them too, each as a step size (LSQ: Esser et al., 2020, "Learned Step Size
Quantization").

All graphs, both int8_modes. The result is a calibrated checkpoint like the one it came from, for convert.py. In the
fused graph the steps of weights follow from the weights, channel by channel; of a checkpoint trained for it, what
FasterTransformer's graphs quantize besides stays as calibrated, but for their weights' amax, which is the new maximum.
Many processes, states, resuming and logs: pyharness/trainer.py. One epoch is a phase there.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pyharness import distributed
from pyharness.calibrated import CalibratedCheckpoint, checkpoint_of, load_calibrated, save_calibrated
from pyharness.checkpoint import load_checkpoint
from pyharness.config import ENGINE_GRAPHS, FUSED_GRAPH
from pyharness.data import DATA_HELP, get_dataset, input_normalization
from pyharness.errors import HarnessError, run_cli
from pyharness.fakequant import FakeQuantSwin, QuantLinear
from pyharness.fused_fakequant import model_in_graph
from pyharness.model_card import write_card
from pyharness.models import (
    config_of,
    create_model,
    load_model,
    need_same_input,
    note_data,
    noted_classes,
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
from pyharness.trainer import Trainer, description, geometry, weights_digest
from pyharness.training import repeatable

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer

LEVELS = 127.0
AMAX_FLOOR = 1e-3
"""A learned amax does not sink below this share of the calibrated one: at 0 nothing would be left to learn from."""


@dataclass(frozen=True)
class QatOptions(TrainOptions):
    """Everything the result depends on besides calibrated checkpoint, teacher and data set.

    The learning rate is a tenth of distillation's: the model is to stay what it is, and only learn to be rounded.
    `graph` is the one whose quantizers are at work; "" is the checkpoint's own.
    """

    lr: float = 1e-3
    epochs: int = 5
    learn_amax: bool = False
    graph: str = ""

    def _requirements(self) -> list[tuple[bool, str]]:
        return [
            *super()._requirements(),
            (self.epochs > 0, f"at least one epoch is needed, found {self.epochs}"),
            one_of("graph", self.graph, ("", *ENGINE_GRAPHS)),
        ]


@dataclass(frozen=True)
class QatSummary:
    """What a finished run gave. Accuracies are those of the fake-quantized model, in percent; `rows` one per epoch."""

    checkpoint: CalibratedCheckpoint
    path: Path
    rows: list[dict[str, Any]]
    images: int
    seconds: float


def train_quantized(
    checkpoint: CalibratedCheckpoint,
    teacher: SwinTransformer,
    dataset: Dataset,
    options: QatOptions,
    out_dir: str | Path,
    *,
    eval_dataset: Dataset | None = None,
    stop_after_steps: int | None = None,
    **machine: Any,
) -> QatSummary | None:
    """Fine-tune `checkpoint`'s model on `dataset`: images f32 [B, C, H, W], labels i64 [B].

    Writes `out_dir`/calibrated.safetensors, options.json, log.csv (one row per epoch), curve.csv and state.pt; with an
    average of the weights also calibrated_ema.safetensors. Resuming, `stop_after_steps` and `machine` as in
    `distill.distill`.

    CalibrationError where the checkpoint is not calibrated, or training drove an amax to a value of no use.
    HarnessError where teacher and checkpoint do not take the same images or give the same classes, the options name a
    graph that the checkpoint is not for, the data set is empty, or the loss is no longer finite. CheckpointError where
    state.pt belongs to another run. DataError, and no checkpoint, where more images than `max_corrupt` says could not
    be read.
    """
    run = _Run(checkpoint, teacher, dataset, options, Path(out_dir), eval_dataset, Machine(**machine))
    with repeatable(options.seed):
        run.resume()
        write_options(run.out_dir, options)
        return run.finish() if run.train(stop_after_steps) else None


class _Run(Trainer):
    """One fine-tuning: a phase per epoch, the optimizer going on."""

    UNIT = "epoch"
    KIND = "quantization-aware training"

    def __init__(
        self,
        checkpoint: CalibratedCheckpoint,
        teacher: SwinTransformer,
        dataset: Dataset,
        options: QatOptions,
        out_dir: Path,
        eval_dataset: Dataset | None,
        machine: Machine,
    ) -> None:
        student = model_in_graph(checkpoint, options.graph or None, keep_weights=True)
        _check_pair(student, teacher)
        self.checkpoint = checkpoint
        graph = options.graph or checkpoint.graph
        # In the identity it stands in the option's place: a run that names the checkpoint's own graph is the same run.
        self.graph = {"model": checkpoint.config.name, "graph": graph, "int8_mode": student.int8_mode}
        digest = weights_digest(student)
        if options.learn_amax:
            _learn_scales(student)
        super().__init__(
            teacher,
            student,
            dataset,
            options,
            out_dir,
            machine,
            phases=options.epochs,
            epochs=1,
            identity={**self.graph, "teacher": weights_digest(teacher), "calibrated": digest},
            described={
                **description(teacher, checkpoint.config.name, "teacher"),
                **geometry(checkpoint.config, "calibrated checkpoint"),
            },
            eval_dataset=eval_dataset,
        )

    def before_piece(self, images: int, batch: int) -> None:
        for module in self.student.modules():
            if isinstance(module, LearnedQuantizer) and not module.of_weight:
                module.pieces = batch / images

    @torch.no_grad()
    def after_step(self) -> None:
        for module in self.student.modules():
            if isinstance(module, LearnedQuantizer):
                module._amax.copy_(torch.maximum(module._amax, module.floor))

    def finish(self) -> QatSummary:
        """Write the calibrated checkpoint, and sum up. DataError where too many images could not be read."""
        self.check_images()
        origin = {
            "teacher_sha256": self.identity["teacher"],
            "calibrated_sha256": self.identity["calibrated"],
            **asdict(self.options),
            "graph": self.graph["graph"],
        }
        results = [self._checkpoint_of(model, origin) for model in self.finished_models()]
        paths = [self.out_dir / "calibrated.safetensors", self.out_dir / "calibrated_ema.safetensors"]
        if distributed.is_main():
            for path, result in zip(paths, results):
                save_calibrated(path, result)
        self.write_log()
        distributed.barrier()
        return QatSummary(results[0], paths[0], self.state.rows, len(self.indices), self.state.seconds)

    def _checkpoint_of(self, model: FakeQuantSwin, origin: dict[str, Any]) -> CalibratedCheckpoint:
        """What `model` learned, under the names of `checkpoint`: a LearnedQuantizer's amax has a quantizer's name.

        The fused graph's model lacks quantizers. A weight's gets the maximum, as in a calibration; the others stay.
        """
        result = self.checkpoint.to_model()
        state = {name: tensor.detach() for name, tensor in model.state_dict().items() if not name.endswith(".floor")}
        result.load_state_dict({**result.state_dict(), **state} if self.graph["graph"] == FUSED_GRAPH else state)
        if self.graph["graph"] == FUSED_GRAPH:
            for layer in (module for module in result.modules() if isinstance(module, QuantLinear)):
                if layer.weight.any():
                    layer._weight_quantizer._amax.copy_(layer.weight.detach().abs().max())
        return checkpoint_of(result, {**self.checkpoint.meta, "qat": origin})


def _check_pair(student: FakeQuantSwin, teacher: SwinTransformer) -> None:
    found, wanted = config_of(teacher, student.config.name), student.config
    for what in ("img_size", "in_chans", "num_classes"):
        if getattr(found, what) != getattr(wanted, what):
            raise HarnessError(
                f"the teacher has {what} {getattr(found, what)}, the calibrated checkpoint of {wanted.name} "
                f"{getattr(wanted, what)}; both must take the same images and give the same classes"
            )
    if not wanted.num_classes:
        raise HarnessError(f"{wanted.name} gives features and no classes; there are no soft labels to learn")


# --- Learned scales ---------------------------------------------------------------------------------------------------


class LearnedQuantizer(nn.Module):
    """A quantizer whose amax, f32 scalar, is a parameter: y = rne(clamp(x * 127 / amax, -128, 127)) * amax / 127.

    Rounding passes gradients straight through, so that amax gets LSQ's: (q - x * 127 / amax) / 127 inside the range,
    the bound over 127 outside. LSQ learns the step amax / 127 and scales its gradient by 1 / sqrt(127 * elements), that
    one learning rate does for all; for amax to move as far, its gradient is scaled by 127^2 times that. `floor`, f32
    scalar, is the least amax.

    The elements of an activation are those of the whole batch, `pieces` times those of x, so that the gradient does not
    depend on how the batch is spread. A weight (`of_weight`) is whole wherever a piece of the batch is computed.
    """

    def __init__(self, amax: Tensor, *, of_weight: bool = False) -> None:
        super().__init__()
        self._amax = nn.Parameter(amax.detach().clone())
        self.register_buffer("floor", amax.detach() * AMAX_FLOOR)
        self.of_weight, self.pieces = of_weight, 1.0

    def forward(self, x: Tensor) -> Tensor:
        share = LEVELS**1.5 * (x.numel() * self.pieces) ** -0.5
        amax = self._amax * share + (self._amax * (1 - share)).detach()
        scaled = (x * (LEVELS / amax)).clamp(-LEVELS - 1, LEVELS)
        return (scaled + (scaled.round() - scaled).detach()) * (amax / LEVELS)


def _learn_scales(model: FakeQuantSwin) -> None:
    """Put a LearnedQuantizer in the place of every quantizer, with its amax."""
    for name, quantizer in list(model.quantizers()):
        parent, _, own = name.rpartition(".")
        learned = LearnedQuantizer(quantizer._amax, of_weight=own == "_weight_quantizer")
        setattr(model.get_submodule(parent), own, learned)


# --- The program ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    default = QatOptions()
    parser = argparse.ArgumentParser(
        prog="qat.py",
        description="Fine-tune a calibrated model, fake-quantized, on an fp32 teacher's soft labels, and write a "
        "calibrated checkpoint. On many GPUs or machines: "
        "`torchrun --nproc-per-node N pyharness/qat.py --device cuda ...`.",
        epilog="Run again with the same options after an interruption: it goes on where it was. "
        "Next: python pyharness/convert.py to-engine OUT/calibrated.safetensors ENGINE_FILE, with the same --graph",
    )
    where = parser.add_argument_group("model and data")
    where.add_argument(
        "calibrated", type=Path, metavar="FILE", help="written by pyharness/quantize.py, or by FasterTransformer's tool"
    )
    where.add_argument(
        "--model", metavar="NAME", help="timm name, for a file of FasterTransformer's tool (default: the file's own)"
    )
    where.add_argument(
        "--teacher",
        default="pretrained",
        metavar="FILE",
        help="fp32 checkpoint; default: timm's hub, for the micro model the teacher in the package",
    )
    where.add_argument("--data", metavar="DATA", help=f"{DATA_HELP} (default: the digits)")
    where.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint, log and state go here")
    how = parser.add_argument_group("training")
    add_option_arguments(how, default)
    how.add_argument(
        "--epochs", type=int, default=default.epochs, metavar="N", help="passes over the subset (default: %(default)s)"
    )
    how.add_argument(
        "--graph", choices=ENGINE_GRAPHS, default=default.graph,
        help="train with the quantizers of this graph (default: ft_int8 with GELU, geluless_int8 without)",
    )  # fmt: skip
    how.add_argument("--learn-amax", action="store_true", help="train every amax too (default: all stay as calibrated)")
    add_machine_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_with_config(build_parser(), argv, QatOptions)
    options, machine = options_of(QatOptions, args), machine_from(args)
    with distributed.session():
        distributed.device_for(machine.device)
        checkpoint = load_calibrated(args.calibrated, args.model)
        name = checkpoint.config.name
        if args.teacher == "pretrained":
            teacher = create_model(name, weights="pretrained")
        else:
            teacher, _ = load_model(args.teacher, name)
        normalization = input_normalization(args.data, name, teacher)
        # Of a file that says nothing, load_calibrated's guess knows nothing of --data.
        need_same_input(args.calibrated, load_checkpoint(args.calibrated)[1].get("input"), args.teacher, normalization)
        if normalization is not None:
            checkpoint = replace(checkpoint, meta={**checkpoint.meta, "input": normalization})
            note_data(teacher, {"input": normalization})
        if not noted_classes(teacher):  # by which the images' labels are numbered
            note_data(teacher, {"classes": checkpoint.meta.get("classes")})
        summary = train_quantized(
            checkpoint,
            teacher,
            get_dataset(args.data, name, train=True, model=teacher, augment=True),
            options,
            args.out,
            eval_dataset=get_dataset(args.data, name, train=False, model=teacher),
            **asdict(machine),
        )
        if distributed.is_main():
            inputs = {"calibrated": args.calibrated, "teacher": weights_source(name, args.teacher)}
            _write_cards(summary, inputs, args.data, argv)
            print(
                f"{summary.path}: {options.graph or checkpoint.graph}, int8_mode {checkpoint.int8_mode}, held-out "
                f"accuracy {summary.rows[-1]['eval_accuracy']:.2f} %, {summary.images} images per epoch, "
                f"{summary.seconds:.0f} s"
            )
    return 0


def _write_cards(
    summary: QatSummary, inputs: dict[str, str | Path], data: str | None, argv: Sequence[str] | None
) -> None:
    """The card of the checkpoint and, where there is one, of the average of the weights."""
    made = [(summary.path, "calibrated checkpoint after quantization-aware training", "eval_accuracy")]
    if "ema_eval_accuracy" in summary.rows[-1]:
        average = summary.path.with_name("calibrated_ema.safetensors")
        made.append((average, f"{made[0][1]}, average of its weights", "ema_eval_accuracy"))
    for path, kind, accuracy in made:
        write_card(
            path,
            kind,
            inputs=inputs,
            data=data or "scikit-learn's digits, training images",
            accuracy={"top1 on the held-out images, fake-quantized": round(summary.rows[-1][accuracy], 3)},
            argv=argv,
        )


if __name__ == "__main__":
    run_cli(main)

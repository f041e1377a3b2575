"""What a training run depends on, how a machine computes it, and the command lines of both.

The options of a run stand in one frozen dataclass, which is also a JSON file (`options.json` of a run, `--config`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from pyharness import distributed
from pyharness.atomic import atomic_path
from pyharness.data import MAX_CORRUPT_SHARE, add_max_corrupt, need_share
from pyharness.errors import HarnessError

LOSSES = ("kl", "soft_ce")
PRECISIONS = ("fp32", "bf16", "fp16")

Options = TypeVar("Options", bound="TrainOptions")


@dataclass(frozen=True)
class TrainOptions:
    """What the result depends on besides teacher, student and data set.

    `batch_size` is of all processes together. `temperature` softens both distributions. `loss`: "kl" or "soft_ce", the
    soft cross-entropy, which is greater by the teacher's entropy and has the same gradient. `hard_weight` w mixes in
    the labels: (1 - w) * soft + w * cross-entropy with the labels. `precision`: of autocast. `ema_decay` above 0 keeps
    a moving average of the weights beside the student.
    """

    lr: float = 1e-2
    momentum: float = 0.9
    batch_size: int = 32
    subset: float = 0.1
    temperature: float = 1.0
    loss: str = "kl"
    hard_weight: float = 0.0
    precision: str = "fp32"
    ema_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            self._check_type(spec)
        for ok, message in self._requirements():
            if not ok:
                raise HarnessError(message)

    def _check_type(self, spec: dataclasses.Field) -> None:
        """A JSON file can hold anything. An int does for a float."""
        kinds = {"float": (float, int), "int": (int,), "str": (str,), "bool": (bool,)}[spec.type]
        value = getattr(self, spec.name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and spec.type != "bool"):
            raise HarnessError(f"the option {spec.name} must be of type {spec.type}, found {value!r}")

    def _requirements(self) -> list[tuple[bool, str]]:
        return [
            (0 < self.lr < math.inf, f"the learning rate must be a number greater than 0, found {self.lr}"),
            (0 <= self.momentum < 1, f"the momentum must be at least 0 and below 1, found {self.momentum}"),
            (self.batch_size > 0, f"the batch size must be at least 1, found {self.batch_size}"),
            (0 < self.subset <= 1, f"the subset must be a share above 0 and at most 1, found {self.subset}"),
            (
                0 < self.temperature < math.inf,
                f"the temperature must be a number greater than 0, found {self.temperature}",
            ),
            one_of("loss", self.loss, LOSSES),
            (0 <= self.hard_weight <= 1, f"the weight of the labels must be from 0 to 1, found {self.hard_weight}"),
            one_of("precision", self.precision, PRECISIONS),
            (0 <= self.ema_decay < 1, f"the decay of the average must be at least 0, below 1, found {self.ema_decay}"),
        ]


def one_of(name: str, value: str, choices: Sequence[str]) -> tuple[bool, str]:
    """A requirement for `TrainOptions._requirements`."""
    return value in choices, f"the option {name} must be one of {', '.join(choices)}, found {value!r}"


@dataclass(frozen=True)
class Machine:
    """How a run is computed. None of it changes the result beyond rounding, and all of it may change on resuming.

    `state_every`, `log_every`: steps between two writings of the state, two points of the curve, counted over all
    epochs and phases. `accumulate`: pieces that a process computes its share of a batch in. `workers`: processes that
    read images, for each process. `max_corrupt`: the share of unreadable training images beyond which there is no
    result.
    """

    device: str = "cpu"
    workers: int = 0
    state_every: int = 200
    log_every: int = 50
    accumulate: int = 1
    channels_last: bool = False
    tensorboard: bool = False
    max_corrupt: float = MAX_CORRUPT_SHARE

    def __post_init__(self) -> None:
        for name in ("state_every", "log_every", "accumulate"):
            if getattr(self, name) < 1:
                raise HarnessError(f"--{name.replace('_', '-')} must be at least 1, found {getattr(self, name)}")
        if self.workers < 0:
            raise HarnessError(f"--workers must be at least 0, found {self.workers}")
        need_share(self.max_corrupt)


# --- Command lines ----------------------------------------------------------------------------------------------------


def add_option_arguments(group: argparse._ArgumentGroup, default: TrainOptions) -> None:
    """The arguments for `TrainOptions`; each one's `dest` is the field's name."""

    def add(flag: str, name: str, text: str, **more: Any) -> None:
        value = getattr(default, name)
        text += " (default: %(default)s)"
        group.add_argument(flag, dest=name, type=type(value), default=value, help=text, **more)

    add("--lr", "lr", "constant learning rate of SGD")
    add("--momentum", "momentum", "momentum of SGD")
    add("--batch", "batch_size", "images per step, of all processes together", metavar="N")
    add("--subset", "subset", "share of the training set that is used, drawn once", metavar="SHARE")
    add("--temperature", "temperature", "softens both distributions")
    add("--loss", "loss", "divergence, or soft cross-entropy (same gradient)", choices=LOSSES)
    add("--hard-weight", "hard_weight", "weight of the labels' cross-entropy beside the soft labels'", metavar="W")
    add("--precision", "precision", "of autocast", choices=PRECISIONS)
    add("--ema", "ema_decay", "decay of a moving average of the weights; 0: none", metavar="DECAY")
    add("--seed", "seed", "of subset, order and crops")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments for `Machine`, and --threads."""
    default = Machine()
    group = parser.add_argument_group("machine", "none of it changes the result beyond rounding")
    group.add_argument(
        "--state-every",
        type=int,
        default=default.state_every,
        metavar="N",
        help="steps between two writings of the state, which also follows SIGTERM and Ctrl-C (default: %(default)s)",
    )
    group.add_argument(
        "--log-every",
        type=int,
        default=default.log_every,
        metavar="N",
        help="steps per point of the curve, in curve.csv and TensorBoard (default: %(default)s)",
    )
    group.add_argument(
        "--device", default=default.device, choices=("cpu", "cuda"), help="only cpu repeats bit for bit (default: cpu)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    group.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="compute each batch in N pieces, for memory (default: 1)"
    )
    group.add_argument("--channels-last", action="store_true", help="memory layout of images and convolution")
    group.add_argument("--no-tensorboard", action="store_true", help="write CSV files alone")
    add_max_corrupt(group)


def machine_from(args: argparse.Namespace) -> Machine:
    """The `Machine` of the command line; sets PyTorch's threads. HarnessError where a number is no use."""
    if args.threads is not None:
        if args.threads < 1:
            raise HarnessError(f"--threads must be at least 1, found {args.threads}")
        torch.set_num_threads(args.threads)
    return Machine(
        device=args.device,
        workers=args.workers,
        state_every=args.state_every,
        log_every=args.log_every,
        accumulate=args.accumulate,
        channels_last=args.channels_last,
        tensorboard=not args.no_tensorboard,
        max_corrupt=args.max_corrupt,
    )


def parse_with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, kind: type[TrainOptions]
) -> argparse.Namespace:
    """Parse, the options of the file --config taking the place of the defaults. HarnessError where it is no use."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON with options, such as a run's options.json; arguments win"
    )
    args = parser.parse_args(argv)
    if args.config is None:
        return args
    try:
        found = json.loads(args.config.read_text(encoding="utf-8"))
    except OSError as error:
        raise HarnessError(f"cannot read {args.config} ({error.strerror}); give an existing file") from None
    except ValueError as error:
        raise HarnessError(f"{args.config}: not JSON ({error}); {{}} with options is needed") from None
    known = {spec.name for spec in dataclasses.fields(kind)}
    if not isinstance(found, dict) or found.keys() - known:
        wrong = ", ".join(sorted(found.keys() - known)) if isinstance(found, dict) else type(found).__name__
        raise HarnessError(f"{args.config}: unknown options: {wrong}; the options are {', '.join(sorted(known))}")
    kind(**found)  # a wrong value in the file is reported even where an argument replaces it
    parser.set_defaults(**found)
    return parser.parse_args(argv)


def options_of(kind: type[Options], args: argparse.Namespace) -> Options:
    """The options that the command line gives."""
    return kind(**{spec.name: getattr(args, spec.name) for spec in dataclasses.fields(kind)})


def write_options(folder: Path, options: TrainOptions) -> None:
    """`folder`/options.json, for --config."""
    if distributed.is_main():
        with atomic_path(folder / "options.json") as temporary:
            temporary.write_text(json.dumps(asdict(options), indent=2) + "\n", encoding="utf-8")

"""Models out to the formats of others: timm, Microsoft, Hugging Face. The commands to-timm, to-microsoft and to-hf of
pyharness/convert.py.

The source may be any file that these programs read: a floating-point checkpoint of any format, a calibrated checkpoint
(its scales are left behind) or an engine file (its weights are dequantized). A GELU-less model keeps FC1 biases of
zero, and says what it is: in Hugging Face's config.json as `"hidden_act": "relu"`, else in the meta data of the file.
So does an ablation's student, ReLU with FC1 biases; but stripped of its meta data, that one reads as a GELU model.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyharness.attention_geometry import attention_mask, relative_position_index
from pyharness.calibrated import ACTIVATION_OF, CalibratedCheckpoint, load_calibrated
from pyharness.checkpoint import AMAX_SUFFIX, load_checkpoint, save_state_dict, to_microsoft_layout, to_timm_layout
from pyharness.config import StageGeometry, SwinConfig
from pyharness.data import add_labels, read_labels
from pyharness.engine_file import MAGIC, load_engine_file
from pyharness.errors import CheckpointError, HarnessError, ModelError
from pyharness.hf_format import (
    check_one_window_rule,
    check_pads_first,
    not_in_processor,
    published_name,
    save_folder,
)
from pyharness.image_input import CROP_MODES, INTERPOLATIONS, is_crop_pct, merged
from pyharness.model_card import write_card
from pyharness.swin_blocks import RELU_WITH_FC1_BIAS
from pyharness.tensor_file import load_header

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer

COMMANDS = {
    "to-timm": "checkpoint in timm's layout",
    "to-microsoft": "checkpoint in Microsoft's layout",
    "to-hf": "Hugging Face folder",
}


@dataclass(frozen=True, eq=False)
class Source:
    """A floating-point model that was read, with its geometry and meta data, and what reading it left behind."""

    model: SwinTransformer
    config: SwinConfig
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def activation(self) -> str:
        from pyharness.models import activation_name

        return activation_name(self.model)


def is_engine_file(path: Path) -> bool:
    """Whether the header of `path` says so. False for what is no readable safetensors file."""
    try:
        return path.suffix == ".safetensors" and load_header(path, HarnessError).get("format") == MAGIC
    except HarnessError:
        return False


def open_calibrated(path: Path, name: str | None = None, int8_mode: int | None = None) -> CalibratedCheckpoint:
    """The calibrated checkpoint of an engine file (dequantized weights) or of a calibrated checkpoint.

    Errors as `load_calibrated` and `load_engine_file`.
    """
    if not is_engine_file(path):
        return load_calibrated(path, name, int8_mode=int8_mode)
    from pyharness.convert import to_checkpoint

    if name is not None or int8_mode is not None:
        raise HarnessError(f"{path}: an engine file says itself what it is of; leave --model and --int8-mode out")
    return to_checkpoint(load_engine_file(path))


def open_source(path: Path, name: str | None = None, activation: str | None = None) -> Source:
    """The floating-point model of any file these programs read, or, with the path "pretrained", timm's own of that
    `name`. Errors as the file's own loader."""
    from pyharness.models import checkpoint_meta, config_of, create_model, load_model, weights_source

    if str(path) == "pretrained" and not path.exists():
        if name is None:
            raise HarnessError("pretrained: timm has weights of many models; name one (--model)")
        model = create_model(name, weights=weights_source(name, "pretrained"))
        if activation not in (None, "gelu"):
            raise CheckpointError(f"pretrained: timm's {name} has GELU, not {activation}; leave --activation out")
        return Source(model, config_of(model, name), {**checkpoint_meta(model, name), "weights": "pretrained"})
    if is_engine_file(path):
        source = _without_scales(open_calibrated(path, name), "the weights are int8 values, dequantized")
        return _need_activation(source, path, activation)
    state, _ = load_checkpoint(path)
    if any(key.endswith(AMAX_SUFFIX) for key in state):
        source = _without_scales(load_calibrated(path, name), "the scales of the calibration were left behind")
        return _need_activation(source, path, activation)
    model, meta = load_model(path, name, activation=activation)
    activation = activation or meta.get("activation", "gelu")
    notes = (meta["backbone"],) if isinstance(meta.get("backbone"), str) and "config" not in meta else ()
    return Source(model, config_of(model, meta["model"]), {**meta, "activation": activation}, notes)


def _need_activation(source: Source, path: Path, activation: str | None) -> Source:
    """`source`, read from `path`. CheckpointError where `activation` was asked for and it has another."""
    if activation not in (None, source.activation):
        raise CheckpointError(
            f"{path}: shows by its graph or its scales that its activation is {source.activation}, not {activation}; "
            "leave --activation out"
        )
    return source


def need_v1(config: SwinConfig, what: str) -> None:
    """ModelError for a Swin-V2: `what` says what is done for Swin-V1 only."""
    if config.version != 1:
        raise ModelError(f"{config.name}: is a Swin-V2; {what} for Swin-V1 only")


def _without_scales(checkpoint: CalibratedCheckpoint, note: str) -> Source:
    need_v1(checkpoint.config, "a calibrated model holds its position bias as tables, and goes back to a checkpoint")
    from pyharness.models import load_state, model_from_config, note_data, set_activation

    model = model_from_config(checkpoint.config)
    note_data(model, checkpoint.meta)
    activation = ACTIVATION_OF[checkpoint.graph]
    set_activation(model, activation)
    own = model.state_dict()
    state = {key: t for key, t in to_timm_layout(checkpoint.state).items() if not key.endswith(AMAX_SUFFIX)}
    if activation == "relu":  # the GELU-less graph has no FC1 bias, timm's model has one of zero
        state |= {key: torch.zeros_like(t) for key, t in own.items() if key.endswith(".mlp.fc1.bias")}
    load_state(model, state, {"activation": activation}, checkpoint.config.name)
    return Source(model.eval(), checkpoint.config, {**checkpoint.meta, "activation": activation}, (note,))


# --- Other ways for images to come in, another image or window size --------------------------------------------------


def normalized(
    source: Source,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
) -> Source:
    """The model with a note of how its images come in, which goes before what timm says of its name: the mean and std
    that they are normalized by, a number per channel each, and how they are resized and cropped (`image_input`). What
    is None stays as it is. HarnessError where of mean and std one is missing, their number is not that of the channels,
    or one cannot be of pixels from 0 to 1, and for a crop_pct that is no share."""
    from pyharness.models import note_data

    if mean is not None or std is not None:
        _need_normalization(mean, std, source.config.in_chans)
    if crop_pct is not None and not is_crop_pct(crop_pct):
        raise HarnessError(f"--crop-pct must be above 0 and at most 1, found {crop_pct:g}")
    given = {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    given = {key: list(value) if key in ("mean", "std") else value for key, value in given.items() if value is not None}
    noted = {**(source.meta.get("input") or {}), **given}
    note_data(source.model, {"input": noted})
    return dataclasses.replace(source, meta={**source.meta, "input": noted})


def labelled(source: Source, names: Sequence[str]) -> Source:
    """The model with a note of what its classes are called, in the order of their numbers."""
    from pyharness.models import note_data

    note_data(source.model, {"classes": list(names)})
    return dataclasses.replace(source, meta={**source.meta, "classes": list(names)})


def _need_normalization(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> None:
    """HarnessError as `normalized` for mean and std."""
    for flag, values in (("--mean", mean), ("--std", std)):
        if values is None or len(values) != channels:
            found = "none" if values is None else f"{len(values)}"
            raise HarnessError(f"{flag} needs {channels} numbers, one per channel, beside the other; found {found}")
    # The standard deviation of pixels from 0 to 1 is at most 0.5; 1 is in use for images that are not scaled.
    for flag, values, needed, fits in (
        ("--mean", mean, "from 0 to 1", lambda value: 0 <= value <= 1),
        ("--std", std, "greater than 0 and at most 1", lambda value: 0 < value <= 1),
    ):
        if wrong := [value for value in values if not fits(value)]:
            scale = ", since pixels are from 0 to 1 here; divide what is of 0 to 255 by 255" if wrong[0] > 1 else ""
            raise HarnessError(f"{flag} must be {needed}, found {wrong[0]:g}{scale}")


def resized(
    source: Source, img_size: tuple[int, int] | None, window: int | None, pad_first: bool = False
) -> Source:
    """The model for another image size, or other windows (the same in every stage), or with padding moved ahead of the
    cyclic shift (`pad_first`); False leaves the padding where it is.

    The relative position bias of each stage whose window changes goes through timm's own interpolation
    (`timm.layers.resize_rel_pos_bias_table`); all else stays. FormatError for an image that is no whole number of
    patches; ModelError for a stage whose old window is not square, and for other sizes of a Swin-V2.
    """
    from timm.layers import resize_rel_pos_bias_table

    from pyharness.models import load_state, model_from_config, note_data, set_activation

    old, notes = source.config, []
    windows = old.window_size if window is None else (window,) * len(old.depths)
    first = pad_first or old.pad_first
    config = dataclasses.replace(old, img_size=img_size or old.img_size, window_size=windows, pad_first=first)
    if img_size or window:
        need_v1(old, "windows and images are resized")
        config = dataclasses.replace(config, name=published_name(config) or old.name)
        resizing = f"resized from image {old.img_size}, windows {old.window_size} by timm's interpolation"
        notes.append(f"{resizing}, not trained so")
    elif config == old:
        return source
    if config.pad_first and pad_first:
        notes += _padding_notes(config)
    state = source.model.state_dict()
    for before, after in zip(old.stages(), config.stages()):
        if before.window == after.window:
            continue
        if before.window[0] != before.window[1]:
            raise ModelError(
                f"{old.name}: the window of stage {before.index} is {before.window}; only a square one can be resized"
            )
        shape = ((2 * after.window[0] - 1) * (2 * after.window[1] - 1), after.heads)
        for block in range(before.depth):
            name = f"layers.{before.index}.blocks.{block}.attn.relative_position_bias_table"
            with warnings.catch_warnings():  # of timm's own code, nothing that a user could change
                warnings.simplefilter("ignore", UserWarning)
                state[name] = resize_rel_pos_bias_table(state[name], after.window, shape)
    model = model_from_config(config)
    set_activation(model, source.activation)
    note_data(model, source.meta)
    load_state(model, state, {"activation": source.activation}, old.name)
    return dataclasses.replace(source, model=model.eval(), config=config, notes=(*source.notes, *notes))


def _padding_notes(config: SwinConfig) -> list[str]:
    """What is worth saying of a model that was made to pad ahead of the cyclic shift."""
    if not config.is_padded:
        size = "x".join(map(str, config.img_size))
        return [
            f"windows {config.window_size} divide the tokens of a {size} image, so that padding ahead of the cyclic "
            "shift (--pad-first) matters for images of other sizes alone"
        ]
    notes = ["tokens are padded ahead of the cyclic shift (--pad-first), and timm's own model would pad behind it"]
    small = [stage for stage in config.stages() if not has_windows_of_detection(stage, config)]
    if small:
        notes.append(
            f"stage {small[0].index} of {small[0].resolution} tokens is not larger than its window of "
            f"{config.window_size[small[0].index]}: Microsoft's detection code and mmdetection shift there, and they "
            "and torchvision pad a smaller one up to the window; here nothing is shifted or padded along such a side"
        )
    return notes


def has_windows_of_detection(stage: StageGeometry, config: SwinConfig) -> bool:
    """Whether windows and shifts of the stage are those of Microsoft's detection code and of mmdetection, which are the
    same however few tokens there are."""
    window = config.window_size[stage.index]
    return stage.window == (window, window) and (stage.depth == 1 or stage.shift == (window // 2, window // 2))


# --- Writing ----------------------------------------------------------------------------------------------------------


def export(source: Source, command: str, out: Path) -> dict[str, Any]:
    """Write `source` to `out` in the format of `command` (one of COMMANDS); the meta data that went with it.

    ModelError where the format cannot express the model.
    """
    config = dataclasses.asdict(source.config)
    meta = {**source.meta, "model": source.config.name, "activation": source.activation, "config": config}
    state = source.model.state_dict()
    if command == "to-timm":
        save_state_dict(out, state, meta)
    elif command == "to-microsoft":
        check_microsoft(source.config)
        buffers = microsoft_buffers(source.config) if source.config.version == 1 else {}
        save_state_dict(out, {**to_microsoft_layout(state), **buffers}, meta)
    else:
        images = image_input(source)
        if images is not None and ("crop_pct" not in images or not_in_processor(source.config, images)):
            meta["input"] = images  # the processor cannot say it
        save_folder(out, to_microsoft_layout(state), source.config, source.activation, meta, images)
    return meta


def image_input(source: Source) -> dict[str, Any] | None:
    """How the model's images are normalized: as its file says, and what that leaves open, as the harness does it
    (`data.input_normalization`). None for a model of images of other channels whose file does not say it."""
    from pyharness.data import input_normalization

    said = source.meta.get("input")
    found = merged(input_normalization(None, source.config.name, source.model) or {}, said or {})
    return found if {"mean", "std"} <= found.keys() else None


def check_microsoft(config: SwinConfig) -> None:
    """ModelError unless Microsoft's code computes the same function: the code for classification, or where sizes do not
    divide, the one for detection, which pads."""
    if not pads(config):
        check_one_window_rule(config, "Microsoft's")
        return
    check_pads_first(config, "Microsoft's detection code")
    for stage in config.stages():
        if not has_windows_of_detection(stage, config):
            raise ModelError(
                f"{config.name}: stage {stage.index} of {stage.resolution} tokens has windows {stage.window} shifted "
                f"by {stage.shift} here; Microsoft's detection code, the one that pads, has the same windows and "
                "shifts however few tokens there are, and so would compute another function"
            )


def pads(config: SwinConfig) -> bool:
    """Whether windows, or 2x2 merging, do not divide the tokens of a stage."""
    odd = any(stage.has_downsample and any(r % 2 for r in stage.resolution) for stage in config.stages())
    return config.is_padded or odd


def microsoft_buffers(config: SwinConfig) -> Mapping[str, Tensor]:
    """What Microsoft's checkpoints hold besides the weights: `relative_position_index` int64 [N, N] of every block and
    `attn_mask` float32 [windows, N, N] of the shifted ones, but for what pads. They follow from the geometry."""
    buffers = {}
    for stage in config.stages():
        for block in range(stage.depth):
            prefix = f"layers.{stage.index}.blocks.{block}."
            buffers[f"{prefix}attn.relative_position_index"] = relative_position_index(stage.window)
            if any(stage.block_shift(block)) and not pads(config):
                buffers[f"{prefix}attn_mask"] = attention_mask(stage)
    return buffers


def _activation_notes(source: Source, command: str) -> list[str]:
    """What is worth saying of an ablation's student: nothing in its weights shows that it has no GELU."""
    if source.activation != RELU_WITH_FC1_BIAS:
        return []
    note = "ReLU with FC1 biases, which no INT8 graph runs"
    whose = {"to-timm": "timm's", "to-microsoft": "Microsoft's"}.get(command)
    return [note if whose is None else f"{note}; the meta data alone says so, {whose} own model would compute GELU"]


def _processor_notes(source: Source, command: str) -> list[str]:
    """What is worth saying of a Hugging Face folder whose processor prepares images otherwise than the model's own."""
    images = image_input(source) if command == "to-hf" else None
    if images is None or (lacking := not_in_processor(source.config, images)) is None:
        return []
    return [f"Hugging Face's image processor has not {lacking}, and presses the whole image into the model's size"]


# --- The commands -----------------------------------------------------------------------------------------------------


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add to-timm, to-microsoft and to-hf to the parser of pyharness/convert.py."""
    for name, kind in COMMANDS.items():
        command = commands.add_parser(name, help=f"any checkpoint or engine file -> {kind}")
        command.add_argument(
            "source", type=Path,
            help="checkpoint, Hugging Face folder, calibrated checkpoint or engine file; or 'pretrained', timm's own",
        )
        what = "folder to write" if name == "to-hf" else "file to write: .safetensors or .pth"
        command.add_argument("out", type=Path, help=what)
        command.add_argument("--model", help="timm name, for checkpoints that do not hold it, and for pretrained")
        command.add_argument("--activation", choices=("gelu", "relu"), help="of a checkpoint that does not say its own")
        for flag, what in (("--mean", "mean"), ("--std", "standard deviation")):
            command.add_argument(
                flag, type=float, nargs="+", metavar="X",
                help=f"{what} by which images are normalized, per channel, of values from 0 to 1, for a checkpoint "
                "trained with others than timm's model of that name",
            )  # fmt: skip
        command.add_argument(
            "--crop-pct", type=float, metavar="SHARE", help="the same of the share of the resized image that is taken"
        )
        command.add_argument(
            "--crop-mode", choices=CROP_MODES,
            help="the same of how images come to their size: the centre, all pressed into it, or all within a border",
        )  # fmt: skip
        command.add_argument("--interpolation", choices=INTERPOLATIONS, help="the same of how they are resized")
        add_labels(command)
        command.add_argument("--img-size", type=image_size, metavar="N|HxW", help="change the image size")
        command.add_argument(
            "--window", type=int, help="change the windows; the position bias is interpolated as in timm"
        )
        command.add_argument(
            "--pad-first",
            action="store_true",
            help="where windows do not divide the image's tokens: pad ahead of the cyclic shift, as Microsoft's "
            "detection code, mmdetection, torchvision and Hugging Face do; for weights that one of these trained at "
            "such sizes (default: as the source says, else behind the shift, as timm does)",
        )


def image_size(text: str) -> tuple[int, int]:
    """(H, W) of "384" or "384x512"."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no image size; give N or HxW")
    return int(parts[0]), int(parts[-1])


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run one of the commands that `add_commands` added."""
    if args.command != "to-hf" and args.out.suffix not in (".safetensors", ".pth", ".pt"):
        raise CheckpointError(f"{args.out}: a checkpoint's name must end in .safetensors, .pth or .pt")
    if args.window is not None and args.window < 1:
        raise HarnessError(f"--window must be at least 1, found {args.window}")
    source = open_source(args.source, args.model, args.activation)
    given = {key: getattr(args, key) for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    if any(value is not None for value in given.values()):
        source = normalized(source, **given)
    if args.labels:
        source = labelled(source, read_labels(args.labels, source.config.num_classes))
    if args.img_size or args.window or args.pad_first:
        source = resized(source, args.img_size, args.window, args.pad_first)
    meta = export(source, args.command, args.out)
    kind = f"{'GELU-less ' if source.activation == 'relu' else ''}{COMMANDS[args.command]}"
    notes = (*source.notes, *_activation_notes(source, args.command), *_processor_notes(source, args.command))
    write_card(args.out, kind, meta=meta, inputs={"source": args.source}, notes=notes, argv=argv)
    print(f"wrote {args.out}: {source.config.name}, {kind}", *notes, sep="; ")
    return 0

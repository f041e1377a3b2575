"""Swin-V1 and -V2 models as timm builds them, GELU-less or not, and their checkpoints.

A GELU-less model is the same timm model with ReLU for GELU and with the FC1 bias zero and frozen (seed paper,
Algorithm 1, lines 3 to 6). Its checkpoint has the same names and shapes; the meta data says which of the two it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyharness.checkpoint import (
    AMAX_SUFFIX,
    describe_geometry,
    describe_state,
    load_checkpoint,
    same_model,
    save_state_dict,
    to_microsoft_layout,
    to_timm_layout,
)
from pyharness.config import MICRO_DIGITS, SwinConfig, are_class_names
from pyharness.errors import CheckpointError, ModelError
from pyharness.image_input import with_mode
from pyharness.model_geometry import config_of
from pyharness.swin_blocks import (
    RELU_WITH_FC1_BIAS,
    activation_name,
    blocks_of,
    has_relu,
    is_geluless,
    make_geluless,
    make_geluless_block,
    make_pad_first,
    make_relu_block,
    set_activation,
)

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer

__all__ = [
    "ACTIVATIONS",
    "MICRO_TEACHER",
    "RELU_WITH_FC1_BIAS",
    "activation_name",
    "blocks_of",
    "checkpoint_meta",
    "config_of",
    "create_model",
    "is_geluless",
    "is_known",
    "known_classes",
    "load_checkpoint",
    "load_model",
    "load_state",
    "load_weights",
    "make_geluless",
    "make_geluless_block",
    "make_pad_first",
    "make_relu_block",
    "model_from_config",
    "need_classes",
    "need_same_input",
    "note_data",
    "noted_classes",
    "noted_input",
    "save_checkpoint",
    "set_activation",
    "to_microsoft_layout",
    "to_timm_layout",
    "weights_source",
]

ACTIVATIONS = ("gelu", "relu")
IMAGENET_CLASSES = 1000
MICRO_TEACHER = Path(__file__).resolve().parent / "assets" / "swin_micro_digits.safetensors"
"""The trained GELU model of the digits, made by pyharness/train_teacher.py; "pretrained" of the micro model."""


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    weights: str | Path = "random",
    seed: int = 0,
    activation: str | None = None,
) -> SwinTransformer:
    """A timm Swin-V1 or -V2 by its timm name, or `swin_micro_digits`: fp32, on the CPU, in eval mode.

    `weights` is "random" (drawn from `seed`), "pretrained" (timm's hub; for the micro model the file in the package) or
    a checkpoint's path. Where the checkpoint says its geometry, `name` must be its own, and all that is not asked for
    here is as it says. Else the model is timm's, with the checkpoint's numbers of classes and channels where none are
    given. `activation` "relu" gives the GELU-less model; from a GELU model's weights that is the paper's ablation
    without distillation. None is "gelu", and refuses a checkpoint that may be GELU-less and does not say so
    (`activation_of_file`). An `img_size` that windows do not divide is padded in timm's order, or in the other one
    (`make_pad_first`) where a checkpoint's meta data says that it is its own.
    Stochastic depth is off, so that training and inference compute the same function.

    Raises ModelError (unknown name, or a geometry the engine cannot run) and CheckpointError (weights that cannot be
    had, or do not fit).
    """
    weights = weights_source(name, weights)
    path = None if weights in ("random", "pretrained") else Path(weights)
    wanted = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans}
    if path:
        state, meta = load_checkpoint(path)
        config = _own_config(meta, name, str(path))
        _check_request(name, activation or "gelu", known=config is not None)
        return _model_with(name, state, meta, str(path), wanted, activation, config, seed)
    _check_request(name, activation or "gelu")
    model = _new_model(name, wanted, seed, pretrained=weights == "pretrained")
    if weights == "pretrained":
        model.timm_weights = _timm_weights(model)
        note_data(model, {"classes": _imagenet_classes(model)})
    if activation == "relu":
        make_geluless(model)
    return model.eval()


def _new_model(name: str, wanted: Mapping[str, Any], seed: int, pretrained: bool = False) -> SwinTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(name, {key: value for key, value in wanted.items() if value is not None}, pretrained)
    config_of(model, name)
    return model


def _model_with(
    name: str,
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    source: str,
    wanted: Mapping[str, Any],
    activation: str | None,
    config: SwinConfig | None = None,
    seed: int = 0,
) -> SwinTransformer:
    """The model `name` with the weights of a checkpoint: of the geometry `config`, the checkpoint's own, or where that
    is None timm's, with the checkpoint's numbers of classes and channels, and its image's size where `meta` tells that
    alone (`timm_format`). What `wanted` gives replaces either."""
    _need_floating_swin(state, source)
    wanted = {key: value for key, value in wanted.items() if value is not None}
    activation_of_file(state, meta, source, activation)
    if config is None:
        classes = len(state["head.fc.weight"]) if "head.fc.weight" in state else 0
        size = {"img_size": tuple(meta["img_size"])} if "img_size" in meta else {}
        wanted = {"num_classes": classes, "in_chans": state["patch_embed.proj.weight"].shape[1], **size, **wanted}
        model = _new_model(name, wanted, seed)
        if meta.get("pad_first"):
            make_pad_first(model)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_from_config(_changed(config, wanted))
        config_of(model, name)
    if meta.get("activation") == "relu" and activation == "relu":
        make_geluless(model)
    load_state(model, state, meta, source)
    if activation == "relu":
        make_geluless(model)
    note_data(model, meta)
    return model.eval()


def _own_config(meta: Mapping[str, Any], name: str | None, source: str) -> SwinConfig | None:
    """The geometry that a checkpoint's meta data gives, None where it gives none. CheckpointError where that is another
    model's than `name`."""
    if not isinstance(meta.get("config"), Mapping):
        return None
    config = SwinConfig.from_json(json.dumps(meta["config"]))
    if name is not None and not same_model(name, config.name):
        raise CheckpointError(
            f"{source}: is a checkpoint of {config.name}, not of {name}; give that name, or none where the program can "
            "do without (--model): the file says it"
        )
    return config


def _changed(config: SwinConfig, wanted: Mapping[str, Any]) -> SwinConfig:
    """`config` with other fields; an `img_size` may be one number."""
    if isinstance(size := wanted.get("img_size"), int):
        wanted = {**wanted, "img_size": (size, size)}
    return dataclasses.replace(config, **wanted)


def _need_floating_swin(state: Mapping[str, Tensor], source: str) -> None:
    """CheckpointError, saying what was found, unless `state` looks like one of a floating-point Swin."""
    if any(name.endswith(AMAX_SUFFIX) for name in state):
        raise CheckpointError(
            f"{source}: is a calibrated checkpoint, with the amax of quantizers; `python pyharness/convert.py "
            "to-engine` makes an engine file of it, to-timm a floating-point checkpoint"
        )
    if not {"patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"} <= state.keys():
        raise CheckpointError(f"{source}: is {describe_state(state)}; a Swin-V1 of timm or Microsoft is needed")


def activation_of_file(
    state: Mapping[str, Tensor], meta: Mapping[str, Any], source: str, activation: str | None = None
) -> str:
    """Which activation a checkpoint (timm's layout) is of: what it says itself, else `activation`, else GELU.

    A GELU-less model's FC1 biases are exactly zero. CheckpointError where all are and neither the file nor the caller
    says which activation it has: read as a GELU model it would compute another function without a word.
    """
    said = meta.get("activation")
    if said is not None or activation is not None:
        return said or activation
    biases = [tensor for name, tensor in state.items() if name.endswith(".mlp.fc1.bias")]
    if biases and not any(bias.any() for bias in biases):
        named = "" if "config" in meta else " --model NAME"
        raise CheckpointError(
            f"{source}: all {len(biases)} FC1 biases are exactly zero and the file does not say its activation. It is "
            "a GELU-less student whose meta data was lost, or was never trained (timm's fresh weights look like this). "
            f"Say which, and write it into a file: python pyharness/convert.py to-timm {source} OUT{named} "
            "--activation relu (or gelu)"
        )
    return "gelu"


def weights_source(name: str, weights: str | Path) -> str | Path:
    """What `weights` stands for: the packaged file where it is the micro model's "pretrained", else itself."""
    return MICRO_TEACHER if name == MICRO_DIGITS.name and weights == "pretrained" else weights


def load_model(
    path: str | Path, name: str | None = None, *, activation: str | None = None
) -> tuple[SwinTransformer, dict[str, Any]]:
    """The model a checkpoint describes, with its weights, and the checkpoint's meta data.

    Geometry and activation come from the meta data or from a Hugging Face folder's config.json, the geometry alone from
    what timm's programs write beside weights. A checkpoint without any (a published one) needs the timm `name`, and
    `activation` where its FC1 biases are all zero.
    """
    state, meta = load_checkpoint(path)
    config = _own_config(meta, name, str(path))
    _need_floating_swin(state, str(path))
    if config is None:
        if name is None:
            raise CheckpointError(
                f"{path}: does not say which model it is of; give the model's timm name (--model). "
                f"It shows {describe_geometry(state)}"
            )
        _check_request(name, activation or "gelu")
        activation = activation_of_file(state, meta, str(path), activation)
        model = _model_with(name, state, {**meta, "activation": activation}, str(path), {}, activation)
        kept = {key: meta[key] for key in ("backbone", "input", "classes") if key in meta}
        return model, {"model": name, "activation": activation, **kept}
    if activation not in (None, meta.get("activation", activation)):
        raise CheckpointError(f"{path}: says that its activation is {meta['activation']}, not {activation}")
    meta = {**meta, "activation": activation_of_file(state, meta, str(path), activation)}
    model = model_from_config(config)
    set_activation(model, meta["activation"])
    load_state(model, state, meta, str(path))
    note_data(model, meta)
    return model.eval(), meta


def own_name(path: str | Path) -> str:
    """Which model a checkpoint or a Hugging Face folder says it is of; CheckpointError where it does not."""
    _, meta = load_checkpoint(path)
    if "config" not in meta:
        raise CheckpointError(f"{path}: does not say which model it is of; give the model's timm name (--model)")
    return meta["config"]["name"]


def model_from_config(config: SwinConfig) -> SwinTransformer:
    """timm's Swin (V1 or V2) of the geometry `config`, with timm's random initial weights, in eval mode."""
    import timm
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    if not config.patch_norm:
        raise ModelError(
            f"{config.name}: timm's Swin always normalizes after the patch embedding; patch_norm must be on"
        )
    kind, own = SwinTransformer, {}
    if config.version == 2:
        kind = SwinTransformerV2
        own = {"pretrained_window_sizes": config.pretrained_window_size or (0,) * len(config.depths)}
    model = kind(
        img_size=config.img_size,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        num_classes=config.num_classes,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=[(size, size) for size in config.window_size],
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        drop_path_rate=0.0,
        **own,
    )
    if config.pad_first:
        make_pad_first(model)
    model.class_names = []  # until somebody notes them
    if timm.is_model(config.name):
        model.pretrained_cfg = timm.get_pretrained_cfg(config.name).to_dict()
    if config.qk_scale is not None:
        for block in blocks_of(model):
            block.attn.scale = config.qk_scale
    return model.eval()


def need_classes(model: nn.Module, name: str, why: str) -> None:
    """ModelError for a `model` without a head, which `why`, in words, needs one."""
    if not model.num_classes:
        raise ModelError(f"{name}: has no classification head, its results are features; {why}")


def note_data(model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Note on a timm `model` what the meta data of its file says of its data, which `checkpoint_meta` hands on to
    files: how images come in ("input", or parts of it), which `data.data_config` follows, and what its classes are
    called ("classes"). Names that are not one for each class of the model are those of another head, and left out."""
    if isinstance(meta.get("input"), Mapping):
        model.image_input = dict(meta["input"])
    if are_class_names(meta.get("classes"), model.num_classes):
        model.class_names = list(meta["classes"])


def noted_classes(model: nn.Module) -> list[str]:
    """The names of a timm model's classes in the order of their numbers; empty where none are noted (`note_data`)."""
    return list(getattr(model, "class_names", ()))


def known_classes(model: nn.Module) -> list[str]:
    """`noted_classes`; of a model that timm itself has made, those of the weights that timm has for it."""
    return noted_classes(model) if hasattr(model, "class_names") else _imagenet_classes(model)


def is_known(model: nn.Module, name: str) -> bool:
    """Whether something says how the images of a model come in: its file, or timm, or for the digits this package."""
    return bool(noted_input(model) or getattr(model, "pretrained_cfg", None)) or name == MICRO_DIGITS.name


def _imagenet_classes(model: nn.Module) -> list[str]:
    """What timm calls the classes of weights that it says were trained on ImageNet-1k, [] of others."""
    from timm.data import ImageNetInfo

    cfg = getattr(model, "pretrained_cfg", None) or {}
    if model.num_classes != IMAGENET_CLASSES or not str(cfg.get("tag")).endswith("in1k"):
        return []
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(number) for number in range(IMAGENET_CLASSES)]


def _timm_weights(model: nn.Module) -> str | None:
    """Which of a model's weights timm has loaded: `swin_tiny_patch4_window7_224.ms_in1k`. What a name without a tag
    stands for is up to timm's version."""
    cfg = model.pretrained_cfg
    return f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("architecture") and cfg.get("tag") else None


def noted_weights(model: nn.Module) -> dict[str, str]:
    """{"timm_weights": architecture and tag} of a model that `create_model` has from timm's hub, else {}."""
    found = getattr(model, "timm_weights", None)
    return {"timm_weights": found} if found else {}


def noted_input(model: nn.Module) -> dict[str, Any]:
    """What `note_data` noted, {} where that is nothing."""
    return dict(getattr(model, "image_input", {}))


def need_same_input(
    path: str | Path, said: Mapping[str, Any] | None, teacher: str | Path, expected: Mapping[str, Any] | None
) -> None:
    """CheckpointError where a student's file `path` says that its images come in otherwise (`said`) than its teacher's
    (`expected`); what one of the two leaves open fits."""
    said, expected = with_mode(said or {}), with_mode(expected or {})
    shared = said.keys() & expected.keys()
    if any(not _alike(said[key], expected[key]) for key in shared):
        found, wanted = ({key: note[key] for key in sorted(shared)} for note in (said, expected))
        raise CheckpointError(
            f"{path}: says that its images come in with {found}, but those of its teacher {teacher} come in with "
            f"{wanted}; both take the same images here. Give the teacher that it was made from, or a file of it that "
            "says the same (`python pyharness/convert.py to-timm FILE OUT`, with --mean and --std, --interpolation, "
            "--crop-pct, --crop-mode)"
        )


def _alike(one: Any, other: Any) -> bool:
    """Whether two values of an "input" note are equal, but for the rounding of files in text."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _check_request(name: str, activation: str, known: bool = False) -> None:
    """ModelError for what cannot be built; `known` names need not be timm's."""
    if activation not in ACTIVATIONS:
        raise ModelError(f"activation {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    if known or name == MICRO_DIGITS.name:
        return

    import timm

    if not timm.is_model(name):
        known = ", ".join([MICRO_DIGITS.name, *timm.list_models(["swin_*_window*", "swinv2_*_window*"])])
        raise ModelError(f"model {name!r} is unknown to timm; Swin-V1 and -V2 models are: {known}")


def _build(name: str, wanted: Mapping[str, Any], pretrained: bool) -> nn.Module:
    if name == MICRO_DIGITS.name:
        return model_from_config(_changed(MICRO_DIGITS, wanted))
    import timm

    try:
        model = timm.create_model(name, pretrained=pretrained, drop_path_rate=0.0, **wanted)
        model.class_names = []  # until somebody notes them
        return model
    except Exception as error:  # the hub's client raises its own kinds, which differ between versions
        reason = (str(error).splitlines() or [""])[0][:200]
        if pretrained:
            raise CheckpointError(
                f"the weights of {name} could not be had from timm's hub ({type(error).__name__}: {reason}). "
                "Without a network, download the checkpoint elsewhere and give its path as the weights"
            ) from None
        raise ModelError(f"timm cannot build {name} with {dict(wanted)}: {type(error).__name__}: {reason}") from None


def exercise(model: nn.Module, seed: int) -> None:
    """Random weights of variance 1/fan_in, biases, norms, position bias and Swin-V2's logit scales that all matter:
    timm's initial ones would leave attention uniform and biases zero, and hide a fault in either."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                values = 1 + 0.1 * values
            elif name.endswith("logit_scale"):
                values = math.log(10) + 0.5 * values
            elif name.endswith("bias"):
                values = 0.3 * values
            elif not name.endswith("relative_position_bias_table"):
                values = values / math.sqrt(parameter[0].numel())
            parameter.copy_(values)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_meta(model: SwinTransformer, name: str, **extra: Any) -> dict[str, Any]:
    """Meta data of a checkpoint: model, activation, config, "input" and "classes" where they are noted on the model
    (`note_data`), "timm_weights" where it began with timm's, and whatever else describes its origin."""
    found = {"input": noted_input(model), "classes": noted_classes(model)}
    noted = {key: value for key, value in found.items() if value} | noted_weights(model)
    config = dataclasses.asdict(config_of(model, name))
    return {"model": name, "activation": activation_name(model), "config": config, **noted, **extra}


def save_checkpoint(path: str | Path, model: SwinTransformer, meta: Mapping[str, Any]) -> None:
    """Write the model's weights in timm's layout with `meta` (see `checkpoint_meta`), atomically.

    .safetensors (meta as JSON in the header) or .pth / .pt, by the suffix.
    """
    save_state_dict(path, model.state_dict(), meta)


def load_weights(model: SwinTransformer, path: str | Path) -> dict[str, Any]:
    """Load a checkpoint into `model`, strictly, and return the checkpoint's meta data. Errors as `load_state`."""
    state, meta = load_checkpoint(path)
    load_state(model, state, meta, str(path))
    return meta


def load_state(model: SwinTransformer, state: Mapping[str, Tensor], meta: Mapping[str, Any], source: str) -> None:
    """Copy `state` (timm's layout) into `model`; the model is unchanged where it does not fit.

    CheckpointError, naming `source`, counts missing, unexpected and wrong-shape tensors and lists the first of each;
    also for values that are not finite or not floating point, and where GELU and GELU-less are mixed up.
    """
    own = model.state_dict()
    faults = [
        *_listed("missing", sorted(own.keys() - state.keys())),
        *_listed("unexpected", sorted(state.keys() - own.keys())),
    ]
    shared = [name for name in own if name in state]
    shapes = [
        f"{name} {list(state[name].shape)} (the model has {list(own[name].shape)})"
        for name in shared
        if state[name].shape != own[name].shape
    ]
    table = "relative_position_bias_table"
    windows = any(name.endswith(table) and len(state[name]) != len(own[name]) for name in shared)
    faults += _listed("wrong shape", shapes)
    faults += _listed("not floating point", [name for name in shared if not state[name].is_floating_point()])
    faults += _listed("NaN or infinite", [name for name in shared if not state[name].isfinite().all()])
    if faults:
        found = f"Found {describe_state(state)} with {describe_geometry(state)}. "
        raise CheckpointError(f"{source}: does not fit the model. {found}{_advice(windows)}{'; '.join(faults)}")
    biased_relu = meta.get("activation") == RELU_WITH_FC1_BIAS
    geluless = is_geluless(model) and not biased_relu
    if meta.get("activation") == "relu" and not geluless:
        raise CheckpointError(f"{source}: is a GELU-less checkpoint and the model has GELU; use activation 'relu'")
    if biased_relu and not has_relu(model):
        raise CheckpointError(f"{source}: is an ablation's student, ReLU with FC1 biases; only `load_model` reads it")
    biased = [name for name in shared if name.endswith("mlp.fc1.bias") and state[name].any()]
    if geluless and biased:
        raise CheckpointError(f"{source}: has FC1 biases ({biased[0]}, ...), which a GELU-less model must not have")
    model.load_state_dict(dict(state), strict=True)


def _advice(windows: bool) -> str:
    """What to do where a model's `windows` are the fault, if they are."""
    if not windows:
        return ""
    return (
        "Its windows are others than the model's: load it under the name it was trained as. To change windows, "
        "python pyharness/convert.py to-timm --window and --img-size resize the position bias. "
    )


LISTED = 8
"""How many names of a kind an error shows; a wrong --model lacks them all."""


def _listed(fault: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return [f"{fault} ({len(names)}): {', '.join(names[:LISTED])}{more}"] if names else []

"""Between checkpoints of all formats and the engine file (FasterTransformer's weight list and scale lists).

    to-engine      calibrated checkpoint (ours, or FasterTransformer's with --model) -> engine file
    to-checkpoint  engine file -> calibrated checkpoint with dequantized weights, of which to-engine makes the same
                   file; or a calibrated checkpoint -> the same as another kind of file
    to-timm, to-microsoft, to-hf   any of our files -> a floating-point checkpoint for others (pyharness/export.py)
    random         an engine file with random weights, for latency
    show           the header and the scales of an engine file

Linear weights become int8, q = clamp(rne(w * 127 / amax)); biases, norms, position bias, masks, patch embedding and
head become fp16. Source: docs/weight_format.md. For the fused graph see pyharness/fused_convert.py.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from pyharness import export
from pyharness.attention_geometry import attention_mask, collapse_bias, expand_bias_table
from pyharness.calibrated import CalibratedCheckpoint, load_calibrated, save_calibrated
from pyharness.config import ENGINE_GRAPHS, FUSED_GRAPH, MICRO_DIGITS, WEIGHT_SCALES, StageGeometry, SwinConfig
from pyharness.data import add_labels, read_labels
from pyharness.distributed import need_one_process
from pyharness.engine_file import (
    EngineFile,
    TensorSpec,
    load_engine_file,
    save_engine_file,
    scale_list,
    weight_specs,
)
from pyharness.errors import CheckpointError, HarnessError, run_cli
from pyharness.ft_format import SCALE_FIELDS, decode_scales, quantizer_name
from pyharness.image_input import in_words
from pyharness.model_card import file_meta, write_card
from pyharness.random_engine import random_engine_file

__all__ = ["dequantize_weight", "quantize_weight", "random_engine_file", "to_checkpoint", "to_engine_file"]

FP16_MAX = torch.finfo(torch.float16).max


def quantize_weight(weight: Tensor, amax: float) -> Tensor:
    """int8 of the same shape: clamp(rne(w * (127 / amax)), -128, 127), in float32 as ModelOpt's fake quantization."""
    scale = 127.0 / torch.tensor(amax, dtype=torch.float32)
    return (weight.float() * scale).round().clamp(-128, 127).to(torch.int8)


def dequantize_weight(q: Tensor, amax: float) -> Tensor:
    """float32 of the same shape: q * (amax / 127); `quantize_weight` gives `q` back."""
    return q.float() * (torch.tensor(amax, dtype=torch.float32) / 127.0)


def to_engine_file(
    checkpoint: CalibratedCheckpoint, graph: str | None = None, weight_scales: str = "channel"
) -> EngineFile:
    """Quantize the weights and lay everything out as the lists of `graph`: the checkpoint's own, FasterTransformer's,
    or the fused graph, whose weights have scales per "channel" or "tensor".

    Raises HarnessError for the graph of another checkpoint; CalibrationError naming every missing or unusable amax;
    CheckpointError for tensors that are missing, left over, of the wrong shape, not finite, or beyond fp16.
    """
    if graph == FUSED_GRAPH:
        from pyharness.fused_convert import to_fused_engine_file

        return to_fused_engine_file(checkpoint, weight_scales)
    if graph not in (None, checkpoint.graph):
        raise HarnessError(
            f"the checkpoint is calibrated for {checkpoint.graph}, not {graph}; it converts to {checkpoint.graph} and "
            f"{FUSED_GRAPH}"
        )
    checkpoint.check()
    builder = ListBuilder(checkpoint)
    tensors = [builder.tensor(spec) for spec in weight_specs(checkpoint.config, checkpoint.graph)]
    builder.check_nothing_left_over()
    return EngineFile(checkpoint.config, checkpoint.graph, checkpoint.int8_mode, tensors, dict(checkpoint.meta))


class ListBuilder:
    """Makes the tensors of the weight list, in order, from a checkpoint's state dict."""

    def __init__(self, checkpoint: CalibratedCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._stages = {f"layers.{stage.index}": stage for stage in checkpoint.config.stages()}
        self._used: set[str] = set()

    def tensor(self, spec: TensorSpec) -> Tensor:
        if spec.is_empty:
            return torch.zeros(spec.shape, dtype=spec.dtype)
        if spec.name.endswith("amaxList"):  # and h_amaxList, the host's copy
            _, stage, _, block, _ = spec.name.split(".")
            return scale_list(self._checkpoint.amax(int(stage), int(block)), self._checkpoint.graph)
        if spec.name.endswith(".attn_mask"):
            return self._real(spec.name, attention_mask(self._stage(spec.name)))
        if spec.name.endswith(".relative_position_bias"):
            window = self._stage(spec.name).window
            rows = (2 * window[0] - 1) * (2 * window[1] - 1)
            table = self._take(f"{spec.name}_table", (rows, spec.shape[0]))
            return expand_bias_table(self._real(f"{spec.name}_table", table), window)
        if spec.name.endswith(".logit_scale"):
            return self._take(spec.name, (*spec.shape, 1, 1)).flatten().float()
        if spec.name.endswith(".attn.qkv.bias") and self._checkpoint.config.version == 2:
            return self._qkv_bias_v2(spec)
        if spec.name == "patch_embed.proj.weight":
            config = self._checkpoint.config
            kernel = self._take(spec.name, (config.embed_dim, config.in_chans, config.patch_size, config.patch_size))
            return self._real(spec.name, kernel.flatten(1))
        values = self._take(spec.name, spec.shape)
        return self._int8(spec.name, values) if spec.dtype == torch.int8 else self._real(spec.name, values)

    def _int8(self, name: str, weight: Tensor) -> Tensor:
        amax = self._checkpoint.state[name.removesuffix("weight") + "_weight_quantizer._amax"]
        return quantize_weight(weight, float(amax))

    def _real(self, name: str, values: Tensor) -> Tensor:
        """`values` in the type that the list holds floating point in."""
        return _to_fp16(name, values)

    def _qkv_bias_v2(self, spec: TensorSpec) -> Tensor:
        """(q, 0, v): Swin-V2's k has no bias."""
        channels = spec.shape[0] // 3
        names = (spec.name.replace("qkv.bias", "q_bias"), spec.name.replace("qkv.bias", "v_bias"))
        q, v = (self._real(name, self._take(name, (channels,))) for name in names)
        return torch.cat((q, torch.zeros_like(q), v))

    def _stage(self, name: str) -> StageGeometry:
        return self._stages[".".join(name.split(".")[:2])]

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._checkpoint.state:
            raise CheckpointError(f"the calibrated checkpoint lacks {name} {list(shape)}")
        tensor = self._checkpoint.state[name].detach()
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name} must be {list(shape)}, found {list(tensor.shape)}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} holds NaN or infinity; the checkpoint is damaged")
        self._used.add(name)
        return tensor

    def check_nothing_left_over(self) -> None:
        left = [
            name for name in self._checkpoint.state if name not in self._used and not name.endswith("_quantizer._amax")
        ]
        if left:
            raise CheckpointError(
                f"the {self._checkpoint.graph} weight list has no place for {', '.join(left[:8])} "
                f"({len(left)} tensors of the checkpoint)"
            )


def _to_fp16(name: str, values: Tensor) -> Tensor:
    largest = float(values.abs().max())
    if largest > FP16_MAX:
        raise CheckpointError(
            f"{name} reaches {largest:g}, beyond the {FP16_MAX:g} of fp16, which stores it in an engine file"
        )
    return values.half().contiguous()


def to_checkpoint(ef: EngineFile) -> CalibratedCheckpoint:
    """The calibrated checkpoint of an engine file: dequantized weights in float32, and every amax of the lists.

    `to_engine_file` of it gives the same engine file, bit for bit. Masks follow from the geometry and are left out.
    HarnessError for a file of the fused graph, which lacks quantizers that a calibrated checkpoint has.
    """
    if ef.graph == FUSED_GRAPH:
        raise HarnessError(
            f"an engine file of {FUSED_GRAPH} lacks most of the amax of a calibrated checkpoint and cannot go back to "
            "one; keep the checkpoint, or convert the ft_int8 or geluless_int8 file"
        )
    config, tensors = ef.config, ef.by_name()
    state: dict[str, Tensor] = {}
    for stage in config.stages():
        for block in range(stage.depth):
            prefix = f"layers.{stage.index}.blocks.{block}."
            for scale, value in decode_scales(tensors[prefix + "amaxList"].tolist(), config.version).items():
                if value:
                    state[f"{quantizer_name(scale, stage.index, block)}._amax"] = torch.tensor(value)
            bias = tensors[prefix + "attn.relative_position_bias"].float()
            state[prefix + "attn.relative_position_bias_table"] = collapse_bias(bias, stage.window)
    for spec in weight_specs(config, ef.graph):
        if spec.is_empty or spec.name.endswith(("amaxList", ".attn_mask", ".relative_position_bias")):
            continue
        tensor = tensors[spec.name]
        if spec.dtype == torch.int8:
            amax = float(state[spec.name.removesuffix("weight") + "_weight_quantizer._amax"])
            state[spec.name] = dequantize_weight(tensor, amax)
        elif config.version == 2 and spec.name.endswith(".attn.qkv.bias"):
            state |= _split_qkv_bias(spec.name, tensor.float())
        elif spec.name.endswith(".logit_scale"):
            state[spec.name] = tensor[:, None, None].clone()
        else:
            state[spec.name] = tensor.float()
    kernel = (config.embed_dim, config.in_chans, config.patch_size, config.patch_size)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].reshape(kernel)
    return CalibratedCheckpoint(config, ef.graph, ef.int8_mode, state, dict(ef.meta))


def _split_qkv_bias(name: str, bias: Tensor) -> dict[str, Tensor]:
    """Swin-V2's q_bias and v_bias [C] from the list's (q, 0, v)."""
    q, k, v = bias.chunk(3)
    if k.any():
        raise CheckpointError(f"{name} has a bias for k, which a Swin-V2 checkpoint has no place for")
    return {name.replace("qkv.bias", "q_bias"): q.clone(), name.replace("qkv.bias", "v_bias"): v.clone()}


def describe(ef: EngineFile) -> str:
    """Header and scales of an engine file, as text: one table row per block, amax of every quantizer."""
    elements = sum(t.numel() * t.element_size() for t in ef.tensors)
    activation = "with GELU" if ef.gelu else "GELU-less"
    lines = [
        f"model      {ef.config.name}",
        f"graph      {ef.graph}, " + (activation if ef.graph == FUSED_GRAPH else f"int8_mode {ef.int8_mode}"),
        f"geometry   {ef.config.to_json()}",
        f"tensors    {len(ef.tensors)}, {elements / 1e6:.2f} MB",
        f"input      {_normalization(ef)}",
        f"meta       {json.dumps(ef.meta, sort_keys=True)}",
        "",
    ]
    if ef.graph == FUSED_GRAPH:
        from pyharness.fused_convert import describe_fused

        return "\n".join([*lines, *describe_fused(ef)[:-1]])
    tensors = ef.by_name()
    version = ef.config.version
    names = [scale.name for scale in SCALE_FIELDS if scale.kind != "factor" and version in scale.versions]
    blocks = [(stage.index, block) for stage in ef.config.stages() for block in range(stage.depth)]
    lists = [decode_scales(tensors[f"layers.{i}.blocks.{j}.amaxList"].tolist(), version) for i, j in blocks]
    for start in range(0, len(blocks), 6):
        part = slice(start, start + 6)
        lines.append(f"{'amax':<22}" + "".join(f"{f'{i}.{j}':>11}" for i, j in blocks[part]))
        for name in names:
            cells = (f"{amax[name]:>11.5g}" if amax[name] else f"{'-':>11}" for amax in lists[part])
            lines.append(f"{name:<22}" + "".join(cells))
        lines.append("")
    return "\n".join(lines[:-1])


def _normalization(ef: EngineFile) -> str:
    """How the file says that its model's images come in."""
    return in_words(ef.meta["input"]) if "input" in ef.meta else "the file does not say how images are normalized"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert.py",
        description="Convert between checkpoints (ours, timm's, Microsoft's, Hugging Face's, FasterTransformer's "
        "calibrated ones) and engine files. What a file is, its content says."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("to-engine", help="calibrated checkpoint -> engine file")
    command.add_argument("checkpoint", type=Path, help="written by pyharness/quantize.py or FT's calibration tool")
    command.add_argument("out", type=Path, help="engine file to write (.safetensors)")
    command.add_argument("--graph", choices=ENGINE_GRAPHS, help="default: the one the checkpoint is calibrated for")
    _add_weight_scales(command)
    _add_origin(command)
    add_labels(command)
    command = commands.add_parser("to-checkpoint", help="engine file -> calibrated checkpoint")
    command.add_argument("engine_file", type=Path, help="engine file, or a calibrated checkpoint to write anew")
    command.add_argument("out", type=Path, help="calibrated checkpoint to write: .safetensors or .pth (as FT's)")
    _add_origin(command)
    add_labels(command)
    export.add_commands(commands)
    command = commands.add_parser("random", help="engine file with random weights, for latency")
    command.add_argument("--model", default=MICRO_DIGITS.name, help="timm name, or swin_micro_digits (default)")
    command.add_argument("--img-size", type=export.image_size, metavar="N|HxW", help="default: the model's own")
    command.add_argument("--graph", choices=ENGINE_GRAPHS, default="ft_int8", help="default: ft_int8")
    command.add_argument("--int8-mode", type=int, choices=(1, 2), default=1)
    command.add_argument("--activation", choices=("relu", "gelu"), help=f"of {FUSED_GRAPH} alone (default: relu)")
    _add_weight_scales(command)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("out", type=Path, help="engine file to write (.safetensors)")
    command = commands.add_parser("show", help="print the header and the scales of an engine file")
    command.add_argument("engine_file", type=Path)
    return parser


def _add_weight_scales(command: argparse.ArgumentParser) -> None:
    text = f"of {FUSED_GRAPH} alone (default: channel, the most exact); for CPUs with AVX2 and no VNNI: balanced"
    command.add_argument("--weight-scales", choices=WEIGHT_SCALES, help=text)


def _add_origin(command: argparse.ArgumentParser) -> None:
    """Options for calibrated checkpoints that do not say what they are of, as FT's calibration tool writes them."""
    command.add_argument("--model", help="timm name, for a calibrated checkpoint that does not hold it")
    command.add_argument("--int8-mode", type=int, choices=(1, 2), help="the same; default: what its quantizers show")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    need_one_process()
    if args.command == "show":
        print(describe(load_engine_file(args.engine_file)))
        return 0
    if args.command in export.COMMANDS:
        return export.run(args, argv)
    if args.command == "to-checkpoint":
        dequantized = export.is_engine_file(args.engine_file)
        checkpoint = export.open_calibrated(args.engine_file, args.model, args.int8_mode)
        save_calibrated(args.out, _labelled(checkpoint, args.labels))
        kind = f"calibrated checkpoint{' with dequantized weights' if dequantized else ''}"
        write_card(args.out, kind, inputs={"source": args.engine_file}, argv=argv)
    else:
        if args.out.suffix != ".safetensors":
            raise HarnessError(f"{args.out}: an engine file's name must end in .safetensors")
        if args.command == "to-engine":
            if args.weight_scales and args.graph != FUSED_GRAPH:
                raise HarnessError(f"--weight-scales is for --graph {FUSED_GRAPH}; FasterTransformer's are per tensor")
            checkpoint = load_calibrated(args.checkpoint, args.model, int8_mode=args.int8_mode)
            checkpoint = _labelled(checkpoint, args.labels)
            ef = to_engine_file(checkpoint, args.graph, args.weight_scales or "channel")
        else:
            _check_random(args)
            config = _geometry(args.model, args.img_size)
            activation, scales = args.activation or "relu", args.weight_scales or "channel"
            ef = random_engine_file(config, args.graph, args.int8_mode, args.seed, activation, scales)
        save_engine_file(args.out, ef)
        source = {"calibrated checkpoint": args.checkpoint} if args.command == "to-engine" else {"weights": "random"}
        meta = {**file_meta(args.out), "activation": "gelu" if ef.gelu else "relu"}
        write_card(args.out, "engine file", meta=meta, inputs=source, argv=argv)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)")
    return 0


def _labelled(checkpoint: CalibratedCheckpoint, labels: Path | None) -> CalibratedCheckpoint:
    """The checkpoint with the names of its classes that the file `labels` has, None: with its own."""
    if labels is None:
        return checkpoint
    names = read_labels(labels, checkpoint.config.num_classes)
    return dataclasses.replace(checkpoint, meta={**checkpoint.meta, "classes": names})


def _check_random(args: argparse.Namespace) -> None:
    """HarnessError for an option that the graph would ignore."""
    if args.graph == FUSED_GRAPH and args.int8_mode != 1:
        raise HarnessError(f"{FUSED_GRAPH} has no int8_mode {args.int8_mode}; leave --int8-mode out")
    if args.graph != FUSED_GRAPH and args.activation:
        raise HarnessError(f"--activation is for {FUSED_GRAPH}; {args.graph} says itself whether there is GELU")
    if args.graph != FUSED_GRAPH and args.weight_scales:
        raise HarnessError(f"--weight-scales is for {FUSED_GRAPH}; weights of {args.graph} have a scale per tensor")


def _geometry(name: str, img_size: tuple[int, int] | None) -> SwinConfig:
    from pyharness.models import config_of, create_model

    return config_of(create_model(name, img_size=img_size), name)


if __name__ == "__main__":
    run_cli(main)

"""From a calibrated checkpoint to an engine file of the fused graph, and such a file described in words.

Linear weights become int8 with a step per output channel (WEIGHT_SCALES says how large); everything else stays float32.
Source: docs/fused.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyharness.calibrated import CalibratedCheckpoint
from pyharness.config import FUSED_GRAPH, WEIGHT_SCALES
from pyharness.convert import ListBuilder
from pyharness.engine_file import EngineFile, TensorSpec, amax_problem, weight_specs
from pyharness.errors import CalibrationError, CheckpointError, HarnessError
from pyharness.ft_format import quantizer_name
from pyharness.fused_format import STAGE_AMAX_FIELDS, amax_fields
from pyharness.weight_steps import channel_steps, quantize_channels


def to_fused_engine_file(checkpoint: CalibratedCheckpoint, weight_scales: str = "channel") -> EngineFile:
    """The engine file of the fused graph, from a checkpoint of either FasterTransformer graph and either int8_mode,
    with weights scaled by one of WEIGHT_SCALES.

    Of the quantizers only the seven of a block that the fused graph applies (in Swin-V2 five), and the reductions'
    inputs, are read.
    Raises HarnessError for other scales; CalibrationError naming every one of them that is missing or no use;
    CheckpointError for tensors that are missing, left over, of the wrong shape, or not finite.
    """
    if weight_scales not in WEIGHT_SCALES:
        raise HarnessError(f"weight scales {weight_scales!r} are unknown; choose {', '.join(WEIGHT_SCALES)}")
    _check_amax(checkpoint)
    builder = _FusedListBuilder(checkpoint)
    builder.weight_scales = weight_scales
    specs = weight_specs(checkpoint.config, FUSED_GRAPH, gelu=checkpoint.graph == "ft_int8")
    tensors = [builder.tensor(spec) for spec in specs]
    builder.check_nothing_left_over()
    meta = {**checkpoint.meta, "made_from": checkpoint.graph, "weight_scales": weight_scales}
    return EngineFile(checkpoint.config, FUSED_GRAPH, 1, tensors, meta)


def _check_amax(checkpoint: CalibratedCheckpoint) -> None:
    problems: dict[str, None] = {}  # a dict, since every block of a stage has the reduction's
    for stage in checkpoint.config.stages():
        needed = amax_fields(checkpoint.config.version) + (STAGE_AMAX_FIELDS if stage.has_downsample else ())
        for block in range(stage.depth):
            amax = checkpoint.amax(stage.index, block)
            for scale in needed:
                name = quantizer_name(scale, stage.index, block)
                missing = None if scale in amax else f"{name} has no amax"
                problem = missing or amax_problem(name, amax[scale])
                if problem:
                    problems[problem] = None
    if problems:
        raise CalibrationError(f"{'; '.join(problems)}. Calibrate the checkpoint with pyharness/quantize.py")


class _FusedListBuilder(ListBuilder):
    """Makes the tensors of the fused graph's list, in order."""

    weight_scales = "channel"

    def tensor(self, spec: TensorSpec) -> Tensor:
        if spec.name.endswith(".amax") and not spec.is_empty:
            return self._amax(spec.name)
        if spec.name.endswith(".weight_scale") and not spec.is_empty:
            weight = self._checkpoint.state[spec.name.removesuffix("_scale")]  # taken just before
            return channel_steps(weight, self.weight_scales)
        return super().tensor(spec)

    def _int8(self, name: str, weight: Tensor) -> Tensor:
        return quantize_channels(weight, channel_steps(weight, self.weight_scales))

    def _real(self, name: str, values: Tensor) -> Tensor:
        return _to_float32(name, values)

    def _amax(self, name: str) -> Tensor:
        """amax of `layers.0.blocks.1.amax` or `layers.0.downsample.amax`."""
        _, stage, *block, _ = name.split(".")
        of_block = block[0] == "blocks"
        values = self._checkpoint.amax(int(stage), int(block[1]) if of_block else 0)
        fields = amax_fields(self._checkpoint.config.version) if of_block else STAGE_AMAX_FIELDS
        return torch.tensor([values[scale] for scale in fields])


def _to_float32(name: str, values: Tensor) -> Tensor:
    result = values.float().contiguous()
    if not result.isfinite().all():
        raise CheckpointError(f"{name} reaches {float(values.abs().max()):g}, beyond float32")
    return result


def describe_fused(ef: EngineFile) -> list[str]:
    """Table rows of a fused engine file: per block every amax, and the range of the weights' steps."""
    tensors = ef.by_name()
    blocks = [(stage.index, block) for stage in ef.config.stages() for block in range(stage.depth)]
    columns = [_column(tensors, amax_fields(ef.config.version), *block) for block in blocks]
    lines = []
    for start in range(0, len(blocks), 4):
        part = slice(start, start + 4)
        lines.append(f"{'amax; steps of weights':<24}" + "".join(f"{f'{i}.{j}':>22}" for i, j in blocks[part]))
        lines += [f"{name:<24}" + "".join(f"{cells[name]:>22}" for cells in columns[part]) for name in columns[0]]
        lines.append("")
    merges = [stage.index for stage in ef.config.stages() if stage.has_downsample]
    if merges:
        lines.append(f"{'patch merging behind':<24}" + "".join(f"{i:>22}" for i in merges))
        steps = [_range(tensors[f"layers.{i}.downsample.reduction.weight_scale"]) for i in merges]
        amax = [float(tensors[f"layers.{i}.downsample.amax"]) for i in merges]
        lines.append(f"{'reduction_input':<24}" + "".join(f"{value:>22.5g}" for value in amax))
        lines.append(f"{'reduction.weight':<24}" + "".join(f"{text:>22}" for text in steps))
        lines.append("")
    return lines


def _column(tensors: dict[str, Tensor], fields: tuple[str, ...], stage: int, block: int) -> dict[str, str]:
    prefix = f"layers.{stage}.blocks.{block}."
    amax = tensors[prefix + "amax"].tolist()
    cells = {name: f"{value:.5g}" for name, value in zip(fields, amax)}
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        cells[f"{layer}.weight"] = _range(tensors[f"{prefix}{layer}.weight_scale"])
    return cells


def _range(steps: Tensor) -> str:
    return f"{float(steps.min()):.3g}..{float(steps.max()):.3g}"

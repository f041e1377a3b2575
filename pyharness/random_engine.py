"""Engine files with random weights and plausible scales, made without a model: for latency rows and tests."""

from __future__ import annotations

import math

import torch

from pyharness.attention_geometry import attention_mask, expand_bias_table
from pyharness.config import FUSED_GRAPH, StageGeometry, SwinConfig
from pyharness.engine_file import EngineFile, TensorSpec, scale_list, weight_specs
from pyharness.errors import HarnessError
from pyharness.fused_format import STAGE_AMAX_FIELDS, amax_fields
from pyharness.position_bias import LARGEST_BIAS
from pyharness.weight_steps import channel_steps, quantize_channels

SPREAD = 5.0
"""amax of a random activation, in standard deviations."""

WEIGHT_SPREAD = 4.5
"""amax of a weight tensor, in standard deviations: that of a million normal numbers is 4.9, of ten thousand 3.9."""

QUERY_KEY_LOGIT_STD = 1.0
"""With unit queries and keys the scaled attention logits have this standard deviation."""


def random_engine_file(
    config: SwinConfig,
    graph: str,
    int8_mode: int = 1,
    seed: int = 0,
    activation: str = "relu",
    weight_scales: str = "channel",
) -> EngineFile:
    """An engine file of `config` with random weights; the same arguments give the same tensors.

    The fused graph's file is of a model with `activation` "relu" or "gelu", its weights' steps chosen by one of
    WEIGHT_SCALES, and of int8_mode 1, the only one there.

    Linear weights are normal, with the variance 1/fan_in once dequantized, so that signals keep their size through the
    layers, and quantized as a tensor is, or for the fused graph each output channel; the scales follow from that, each
    with some per cent of its own, so that no two are equal. The weights' distribution matters, since the CPU backend's
    GEMM for AVX2 is the faster the smaller most weights are (docs/epilogues.md); those of trained layers have
    heavier tails than normal ones.
    HarnessError for another activation.
    """
    if activation not in ("relu", "gelu"):
        raise HarnessError(f"activation {activation!r} is unknown; choose relu or gelu")
    if graph == FUSED_GRAPH:
        return _random_fused_file(config, activation == "gelu", seed, weight_scales)
    generator = torch.Generator().manual_seed(seed)
    stages = {f"layers.{stage.index}": stage for stage in config.stages()}
    reductions = {
        prefix: _reduction_amax(stage, config.version, int8_mode, generator) for prefix, stage in stages.items()
    }
    tensors: list[torch.Tensor] = []
    for spec in weight_specs(config, graph):
        prefix = ".".join(spec.name.split(".")[:2])
        if spec.name.endswith(".h_amaxList"):
            tensors.append(tensors[-1].clone())
        elif spec.name.endswith(".amaxList"):
            block = int(spec.name.split(".")[3])
            amax = _block_amax(config, stages[prefix], block, graph, int8_mode, generator) | reductions[prefix]
            tensors.append(scale_list(amax, graph))
        elif spec.name.endswith(".attn_mask") and not spec.is_empty:
            tensors.append(attention_mask(stages[prefix]).half())
        elif spec.name.endswith(".relative_position_bias"):
            tensors.append(_random_position_bias(stages[prefix], config.version, generator))
        else:
            tensors.append(_random_tensor(spec, generator, config.version))
    meta = {
        "origin": "random",
        "seed": seed,
        "hint": f"python pyharness/convert.py random --model {config.name} --graph {graph} --int8-mode {int8_mode} "
        f"--seed {seed} ENGINE_FILE",
    }
    return EngineFile(config, graph, int8_mode, tensors, meta)


def _random_fused_file(config: SwinConfig, gelu: bool, seed: int, weight_scales: str) -> EngineFile:
    """The weight list of the fused graph, drawn as FasterTransformer's; every output channel has a step of its own."""
    generator = torch.Generator().manual_seed(seed)
    stages = {f"layers.{stage.index}": stage for stage in config.stages()}
    tensors: list[torch.Tensor] = []
    for spec in weight_specs(config, FUSED_GRAPH, gelu):
        stage = stages.get(".".join(spec.name.split(".")[:2]))
        if spec.is_empty:
            tensors.append(torch.zeros(spec.shape, dtype=spec.dtype))
        elif spec.name.endswith(".downsample.amax"):
            amax = _reduction_amax(stage, config.version, 1, generator)
            tensors.append(torch.tensor([amax[name] for name in STAGE_AMAX_FIELDS]))
        elif spec.name.endswith(".amax"):
            block = int(spec.name.split(".")[3])
            amax = _block_amax(config, stage, block, "ft_int8" if gelu else "geluless_int8", 1, generator)
            tensors.append(torch.tensor([amax[name] for name in amax_fields(config.version)]))
        elif spec.name.endswith(".weight_scale"):
            weight = tensors[-1].float()  # of the weight that stands before it
            step = 1 / weight.square().sum(1).sqrt().clamp(min=1.0)
            tensors.append(step * torch.empty(spec.shape).uniform_(0.85, 1.15, generator=generator))
        elif spec.name.endswith(".attn_mask"):
            tensors.append(attention_mask(stage))
        elif spec.name.endswith(".relative_position_bias"):
            tensors.append(_random_position_bias(stage, config.version, generator).float())
        elif spec.dtype == torch.int8:
            values = torch.randn(spec.shape, generator=generator)
            tensors.append(quantize_channels(values, channel_steps(values, weight_scales)))
        else:
            tensors.append(_random_tensor(spec, generator, config.version))
    meta = {
        "origin": "random",
        "seed": seed,
        "hint": f"python pyharness/convert.py random --model {config.name} --graph {FUSED_GRAPH} "
        f"--activation {'gelu' if gelu else 'relu'} --weight-scales {weight_scales} --seed {seed} ENGINE_FILE",
    }
    return EngineFile(config, FUSED_GRAPH, 1, tensors, meta)


def _random_tensor(spec: TensorSpec, generator: torch.Generator, version: int) -> torch.Tensor:
    if spec.is_empty:
        return torch.zeros(spec.shape, dtype=spec.dtype)
    if spec.dtype == torch.int8:
        values = torch.randn(spec.shape, generator=generator)
        return (values * (127 / WEIGHT_SPREAD)).round().clamp(-127, 127).to(torch.int8)
    values = torch.randn(spec.shape, generator=generator)
    if spec.name.endswith(".logit_scale"):
        return math.log(10.0) + values  # beyond log 100, where the scale ends, for one head in a hundred
    if "norm" in spec.name and spec.name.endswith(".weight"):
        values = 1 + 0.1 * values
    elif len(spec.shape) == 2:  # patch embedding and head
        values /= math.sqrt(spec.shape[1])
    else:
        values *= 0.1
    if version == 2 and spec.name.endswith(".attn.qkv.bias"):
        values.chunk(3)[1].zero_()  # Swin-V2's k has no bias
    return values.to(spec.dtype)


def _random_position_bias(stage: StageGeometry, version: int, generator: torch.Generator) -> torch.Tensor:
    """fp16 [heads, N, N]; pairs of equal offset share one value, as in any real model. Swin-V2's lie within 0 to 16."""
    (win_h, win_w), heads = stage.window, stage.heads
    table = 0.1 * torch.randn((2 * win_h - 1) * (2 * win_w - 1), heads, generator=generator)
    if version == 2:
        table = LARGEST_BIAS * torch.sigmoid(5 * table)
    return expand_bias_table(table.half(), stage.window)


def _block_amax(
    config: SwinConfig, stage: StageGeometry, block: int, graph: str, int8_mode: int, generator: torch.Generator
) -> dict[str, float]:
    """Scales of one block for weights as `_random_tensor` draws them and layer norms of unit variance."""
    hidden = config.hidden_dim(stage.dim)
    scale = config.qk_scale or stage.head_dim**-0.5
    attention_std = _attention_output_std(stage.window_area)
    amax = {
        "qkv_input": SPREAD,
        "qkv_aftergemm": SPREAD,
        "matmul_q": SPREAD,
        "matmul_k": SPREAD,
        "matmul_v": SPREAD,
        "softmax_input": SPREAD * QUERY_KEY_LOGIT_STD / scale,
        "matmul_a": min(1.0, 20.0 / stage.window_area),
        "proj_input": SPREAD * attention_std,
        "proj_aftergemm": SPREAD * attention_std,
        "fc1_input": SPREAD,
        "fc1_aftergemm": SPREAD,
        "fc2_input": SPREAD,
        "fc2_aftergemm": SPREAD * math.sqrt(0.5),  # half of a normal variable's power is left by ReLU, most by GELU
        "qkv_weight": WEIGHT_SPREAD * stage.dim**-0.5,
        "proj_weight": WEIGHT_SPREAD * stage.dim**-0.5,
        "fc1_weight": WEIGHT_SPREAD * stage.dim**-0.5,
        "fc2_weight": WEIGHT_SPREAD * hidden**-0.5,
    }
    if config.version == 2:
        amax |= _amax_v2(stage, block)
    if graph == "geluless_int8":
        del amax["fc1_aftergemm"]
    if int8_mode == 2:
        del amax["fc2_aftergemm"]
    return _jittered(amax, generator)


def _amax_v2(stage: StageGeometry, block: int) -> dict[str, float]:
    """What differs in Swin-V2: the residual stream itself enters the GEMMs, and q and k have length 1.

    Attention and MLP of every block add a tensor of unit variance to the stream, which begins a stage with the same.
    """
    attended, mlp = math.sqrt(1 + 2 * block), math.sqrt(2 + 2 * block)
    cosine = min(1.0, SPREAD * stage.head_dim**-0.5)
    output = SPREAD * attended * min(1.0, 2 * _attention_output_std(stage.window_area))
    return {
        "qkv_input": SPREAD * attended,
        "qkv_aftergemm": SPREAD * attended,
        "matmul_q": cosine,
        "matmul_k": cosine,
        "matmul_v": SPREAD * attended,
        "softmax_input": cosine,
        "matmul_a": min(1.0, 64.0 / stage.window_area),
        "proj_input": output,
        "proj_aftergemm": output,
        "fc1_input": SPREAD * mlp,
        "fc1_aftergemm": SPREAD * mlp,
        "fc2_input": SPREAD * mlp,
        "fc2_aftergemm": SPREAD * mlp * math.sqrt(0.5),
    }


def _reduction_amax(stage: StageGeometry, version: int, int8_mode: int, generator: torch.Generator) -> dict[str, float]:
    """Scales of the patch merging behind `stage`, which every block's list of the stage repeats."""
    if not stage.has_downsample:
        return {}
    spread = SPREAD * (math.sqrt(1 + 2 * stage.depth) if version == 2 else 1.0)  # as in _amax_v2
    amax = {
        "reduction_input": spread,
        "reduction_aftergemm": spread,
        "reduction_weight": WEIGHT_SPREAD * (4 * stage.dim) ** -0.5,
    }
    if int8_mode == 2:
        del amax["reduction_aftergemm"]
    return _jittered(amax, generator)


def _jittered(amax: dict[str, float], generator: torch.Generator) -> dict[str, float]:
    factors = torch.empty(len(amax)).uniform_(0.85, 1.15, generator=generator).tolist()
    return {name: value * factor for (name, value), factor in zip(amax.items(), factors)}


def _attention_output_std(tokens: int) -> float:
    """Standard deviation of sum_j p_j v_j for unit v and softmax p of unit normal logits over `tokens` entries.

    sqrt(sum_j p_j**2) = sqrt(e / tokens) for independent v; twice that, since the tokens of a window are alike.
    """
    return min(1.0, 2 * math.sqrt(math.e / tokens))

"""Fake-quantized Swin: a timm model's weights under ModelOpt's quantizers, at the places of FasterTransformer's.

The modules carry the names of the Microsoft checkpoints (downsample at the end of a stage), so that a state dict of
`FakeQuantSwin` is a calibrated checkpoint with `layers.{i}.blocks.{j}.attn.qkv._input_quantizer._amax` and so on.
With its quantizers disabled the model computes what timm's does.

Every quantizer is 8 bit, per tensor, full range -128..127, scale amax / 127, round half to even (ModelOpt's default).
After-GEMM quantizers sit between a GEMM and its bias; `softmax_input_quantizer` sits on the raw Q K^T, ahead of the
scale; `matmul_a` on the softmax's output and `attn.proj._input` on P V's, as in the engine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyharness.attention_geometry import (
    attention_mask,
    expand_bias_table,
    from_windows,
    merge_neighbours,
    to_windows,
)
from pyharness.config import StageGeometry, SwinConfig
from pyharness.engine_file import require_int8_mode
from pyharness.errors import CheckpointError, HarnessError
from pyharness.position_bias import with_bias_tables

if TYPE_CHECKING:
    from modelopt.torch.quantization.nn import TensorQuantizer
    from timm.models.swin_transformer import SwinTransformer

EPS = 1e-5


@functools.cache
def modelopt_quantization():
    """The module modelopt.torch.quantization, imported on first use (seconds) and without its start-up warnings."""
    noisy, pytree = logging.getLogger("torch.utils.cpp_extension"), logging.getLogger("torch.utils._pytree")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    pytree.addFilter(_is_no_enum_notice)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import modelopt.torch.quantization as quantization
    except ImportError as error:
        raise HarnessError(
            f"nvidia-modelopt cannot be imported ({error}); it makes the quantizers. Run `bash scripts/build_ft.sh`, "
            "or install it: pip install nvidia-modelopt requests"
        ) from None
    finally:
        noisy.setLevel(level)
        pytree.removeFilter(_is_no_enum_notice)
    return quantization


def _is_no_enum_notice(record: logging.LogRecord) -> bool:
    """False of PyTorch's notice for the authors of a library that ModelOpt imports."""
    return "is an Enum subclass and is now natively supported" not in record.getMessage()


def make_quantizer() -> TensorQuantizer:
    """An enabled TensorQuantizer: 8 bit, per tensor, full range; its `_amax` is a buffer of NaN until it is set."""
    quantization = modelopt_quantization()
    attributes = quantization.config.QuantizerAttributeConfig(num_bits=8, axis=None, narrow_range=False)
    return quantization.nn.TensorQuantizer(attributes, amax=torch.tensor(torch.nan))


class QuantLinear(nn.Module):
    """`aftergemm(input(x) @ weight(W)^T) + bias`, [..., K] -> [..., N]; the quantizers that are None are left out."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, aftergemm: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._input_quantizer = make_quantizer()
        self._weight_quantizer = make_quantizer()
        self._aftergemm_quantizer = make_quantizer() if aftergemm else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self._input_quantizer(x), self._weight_quantizer(self.weight))
        if self._aftergemm_quantizer is not None:
            y = self._aftergemm_quantizer(y)
        return y if self.bias is None else y + self.bias


class WindowAttention(nn.Module):
    """Attention within windows, [B * windows, N, C] -> same."""

    def __init__(self, stage: StageGeometry, config: SwinConfig) -> None:
        super().__init__()
        self.window, self.heads = stage.window, stage.heads
        self.scale = config.qk_scale or stage.head_dim**-0.5
        self.qkv = QuantLinear(stage.dim, 3 * stage.dim, bias=config.qkv_bias, aftergemm=True)
        self.proj = QuantLinear(stage.dim, stage.dim, bias=True, aftergemm=True)
        rows = (2 * stage.window[0] - 1) * (2 * stage.window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, stage.heads))
        self.matmul_q_input_quantizer = make_quantizer()
        self.matmul_k_input_quantizer = make_quantizer()
        self.matmul_v_input_quantizer = make_quantizer()
        self.matmul_a_input_quantizer = make_quantizer()
        self.softmax_input_quantizer = make_quantizer()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.matmul_q_input_quantizer(q)
        k = self.matmul_k_input_quantizer(k)
        v = self.matmul_v_input_quantizer(v)
        logits = self.softmax_input_quantizer(q @ k.transpose(-1, -2)) * self.scale
        logits = logits + expand_bias_table(self.relative_position_bias_table, self.window)
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        attention = self.matmul_a_input_quantizer(logits.softmax(dim=-1))
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """FC2(activation(FC1(x))); GELU-less, FC1 has no bias and nothing but ReLU stands between it and FC2's input."""

    def __init__(self, stage: StageGeometry, config: SwinConfig, graph: str, int8_mode: int) -> None:
        super().__init__()
        gelu_less = graph == "geluless_int8"
        hidden = config.hidden_dim(stage.dim)
        self.fc1 = QuantLinear(stage.dim, hidden, bias=not gelu_less, aftergemm=not gelu_less)
        self.act = nn.ReLU() if gelu_less else nn.GELU()
        self.fc2 = QuantLinear(hidden, stage.dim, bias=True, aftergemm=int8_mode == 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """One Swin block, [B, H, W, C] -> same."""

    def __init__(self, stage: StageGeometry, block: int, config: SwinConfig, graph: str, int8_mode: int) -> None:
        super().__init__()
        self.stage, self.shift = stage, stage.block_shift(block)
        self.norm1 = nn.LayerNorm(stage.dim, EPS)
        self.attn = WindowAttention(stage, config)
        self.norm2 = nn.LayerNorm(stage.dim, EPS)
        self.mlp = Mlp(stage, config, graph, int8_mode)
        self.register_buffer("attn_mask", attention_mask(stage) if any(self.shift) else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(to_windows(self.norm1(x), self.stage, self.shift), self.attn_mask)
        x = x + from_windows(y, self.stage, self.shift)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """2x2 tokens to one of twice the channels, [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""

    def __init__(self, dim: int, int8_mode: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, EPS)
        self.reduction = QuantLinear(4 * dim, 2 * dim, bias=False, aftergemm=int8_mode == 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(merge_neighbours(x)))


class Stage(nn.Module):
    """The blocks of a stage and, at its end, the patch merging."""

    def __init__(self, stage: StageGeometry, config: SwinConfig, graph: str, int8_mode: int) -> None:
        super().__init__()
        kind, merging = Block, functools.partial(PatchMerging, stage.dim, int8_mode)
        if config.version == 2:
            from pyharness.fakequant_v2 import BlockV2, PatchMergingV2  # which is built from this module's parts

            kind, merging = BlockV2, functools.partial(PatchMergingV2, stage.dim)
        self.blocks = nn.Sequential(*(kind(stage, j, config, graph, int8_mode) for j in range(stage.depth)))
        self.downsample = merging() if stage.has_downsample else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """Convolution of each patch and LayerNorm, images [B, in_chans, H, W] -> [B, H/patch, W/patch, E]."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)
        self.norm = nn.LayerNorm(config.embed_dim, EPS) if config.patch_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class FakeQuantSwin(nn.Module):
    """Swin (V1 or V2) with quantizers; `model(images [B, in_chans, H, W])` gives logits [B, num_classes] (or features).

    Parameters are uninitialized and every `_amax` is NaN until a state dict is loaded or the model calibrated.
    """

    def __init__(self, config: SwinConfig, graph: str, int8_mode: int = 1) -> None:
        super().__init__()
        require_int8_mode(config, int8_mode)
        self.config, self.graph, self.int8_mode = config, graph, int8_mode
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.Sequential(*(Stage(stage, config, graph, int8_mode) for stage in config.stages()))
        self.norm = nn.LayerNorm(config.num_features, EPS)
        self.head = nn.Linear(config.num_features, config.num_classes) if config.num_classes else None
        self.eval()

    @classmethod
    def from_timm(cls, model: SwinTransformer, config: SwinConfig, int8_mode: int = 1) -> FakeQuantSwin:
        """The quantizable form of a timm model, with copies of its weights; the graph follows from its activations.

        Raises CheckpointError where only some blocks are GELU-less.
        """
        from pyharness.models import blocks_of, to_microsoft_layout

        relu = {isinstance(block.mlp.act, nn.ReLU) for block in blocks_of(model)}
        if len(relu) > 1:
            raise CheckpointError(
                "some blocks of the model have GELU and some ReLU; finish the distillation (pyharness/distill.py) first"
            )
        graph = "geluless_int8" if relu.pop() else "ft_int8"
        state = to_microsoft_layout(model.state_dict())
        if graph == "geluless_int8":
            state = _without_fc1_bias(state)
        if config.version == 2:
            state = with_bias_tables(state, config)
        fake = cls(config, graph, int8_mode)
        fake.load_state_dict(state | {f"{name}._amax": q._amax for name, q in fake.quantizers()})
        return fake

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.layers(self.patch_embed(images))).mean((1, 2))
        return x if self.head is None else self.head(x)

    def quantizers(self) -> Iterator[tuple[str, TensorQuantizer]]:
        """Every quantizer with its name, in the order of the checkpoint."""
        kind = modelopt_quantization().nn.TensorQuantizer
        return ((name, module) for name, module in self.named_modules() if isinstance(module, kind))

    @contextlib.contextmanager
    def quantizers_disabled(self) -> Iterator[None]:
        """Within the context the model computes in floating point, as timm's does."""
        quantizers = [quantizer for _, quantizer in self.quantizers()]
        for quantizer in quantizers:
            quantizer.disable()
        try:
            yield
        finally:
            for quantizer in quantizers:
                quantizer.enable()

    @torch.no_grad()
    def round_parameters_to_fp16(self) -> None:
        """Round what the engine file stores as fp16: biases, norms, position bias, patch embedding and head."""
        int8_weights = {id(m.weight) for m in self.modules() if isinstance(m, QuantLinear)}
        for name, parameter in self.named_parameters():
            if id(parameter) not in int8_weights and not name.endswith(".logit_scale"):
                parameter.copy_(parameter.half())


def _without_fc1_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` of a GELU-less model without its FC1 biases, which must be zero: the graph has no place for them."""
    biases = [name for name in state if name.endswith(".mlp.fc1.bias")]
    nonzero = [name for name in biases if state[name].any()]
    if nonzero:
        raise CheckpointError(
            f"the GELU-less model has FC1 biases that are not zero: {', '.join(nonzero)}. "
            "Algorithm 1 sets them to zero; make the model with pyharness/distill.py"
        )
    return {name: tensor for name, tensor in state.items() if name not in set(biases)}

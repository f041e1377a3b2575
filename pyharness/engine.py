"""The compiled engine as an `nn.Module`. The library is loaded on first use, never when the package is imported."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyharness.config import ENGINE_GRAPHS, SwinConfig
from pyharness.errors import EngineError

if TYPE_CHECKING:
    from pyharness.engine_file import EngineFile

LIBRARY_NAME = "libswin_int8.so"
BUILD_HINT = "run `bash scripts/build_ft.sh`"


def library_path() -> Path:
    """Where the engine is looked for: SWIN_INT8_LIBRARY, else beside this file, where the build installs it."""
    forced = os.environ.get("SWIN_INT8_LIBRARY")
    return Path(forced) if forced else Path(__file__).parent / "_lib" / LIBRARY_NAME


@functools.cache
def load() -> None:
    """Load the engine and register its ops and their fake implementations. EngineError where that cannot be done."""
    path = library_path()
    if not path.is_file():
        raise EngineError(f"the compiled engine is not at {path}: {BUILD_HINT}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise EngineError(
            f"{path} cannot be loaded by PyTorch {torch.__version__}: {error}. It was built for another PyTorch or "
            f"machine, or is cut off: {BUILD_HINT} --clean"
        ) from None
    built_for = torch.ops.swin_int8.build_info()[4]
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        found = f"{path} was built for PyTorch {built_for}, this is {torch.__version__}"
        raise EngineError(f"{found}: {BUILD_HINT} --clean")
    torch.library.register_fake("swin_int8::forward")(_fake_forward)
    torch.library.register_fake("swin_int8::forward_stages")(_fake_forward_stages)


def _fake_forward(
    images, weights, graph, int8_mode, img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads,
    window_size, mlp_ratio, qkv_bias, qk_scale, patch_norm, version, pad_first, residual, skip, features_only, poison,
):  # fmt: skip
    """Shape and dtype of the model op's result, for torch.compile and torch.export."""
    features = embed_dim * 2 ** (len(depths) - 1)
    columns = num_classes if num_classes > 0 and not features_only else features
    return images.new_empty((images.shape[0], columns), dtype=torch.float32)


def _fake_forward_stages(
    images, weights, graph, int8_mode, img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads,
    window_size, mlp_ratio, qkv_bias, qk_scale, patch_norm, version, pad_first, residual, stages,
):  # fmt: skip
    """Shapes and dtypes of what the stages give."""
    kinds = {"": torch.float32 if images.device.type == "cpu" else torch.float16, "float32": torch.float32}
    dtype = kinds.get(residual) or getattr(torch, residual)
    height, width = (size // patch_size for size in images.shape[2:])
    outputs = []
    for i in stages:
        halved = [(side + (1 << i) - 1) // (1 << i) for side in (height, width)]
        outputs.append(images.new_empty((images.shape[0], *halved, embed_dim << i), dtype=dtype))
    return outputs


@dataclass(frozen=True)
class OpInfo:
    """One operation of a forward pass. `kind` is "gemm", "fused" or "float"; stage and block are -1 outside of them.

    Bytes are those of the tensors read and written, `operations` counts a multiply-add as two.
    """

    name: str
    kind: str
    stage: int
    block: int
    shape: str
    bytes_read: int
    bytes_written: int
    operations: int


class SwinInt8(nn.Module):
    """An INT8 Swin, V1 or V2, on the compiled engine; inference only, without gradients.

    Args:
        weights: The graph's weight list (docs/weight_format.md, docs/fused.md), on any device; kept as buffers.
        config: The model's geometry.
        graph: "ft_int8" (the FasterTransformer baseline), "geluless_int8" (after the patch series) or "fused_int8".
        int8_mode: 1: every GEMM gives int8; 2: FC2 and the patch-merging GEMM give int32. The fused graph knows 1 only.
        residual: Type of the residual stream: "float16" (default) or "bfloat16" on CUDA, "float32" on the CPU; "" is
            the device's default.

    The weights are checked and packed at the first call: ValueError, TypeError or NotImplementedError, saying what
    does not fit. Calls release the GIL and may come from several threads; torch.set_num_threads sets how many
    threads one call uses. `.to(device)` moves the weights; `.half()` and other casts leave their types.
    """

    def __init__(
        self, weights: Sequence[Tensor], config: SwinConfig, graph: str, int8_mode: int = 1, residual: str = ""
    ) -> None:
        super().__init__()
        if graph not in ENGINE_GRAPHS:
            raise EngineError(f"there is no graph {graph!r}; choose one of {', '.join(ENGINE_GRAPHS)}")
        load()
        self.config = config
        self.graph = graph
        self.int8_mode = int8_mode
        self.residual = residual
        for index, weight in enumerate(weights):
            self.register_buffer(f"weight_{index:04d}", weight.detach())

    @classmethod
    def from_engine_file(cls, file: EngineFile, residual: str = "") -> SwinInt8:
        """The model of an engine file in memory."""
        return cls(file.tensors, file.config, file.graph, file.int8_mode, residual)

    @classmethod
    def from_file(cls, path: str | Path) -> SwinInt8:
        """The model of an engine file that pyharness/convert.py wrote; FormatError where it is not one."""
        from pyharness.engine_file import load_engine_file

        return cls.from_engine_file(load_engine_file(path))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SwinInt8:
        """As `nn.Module`'s, but casts leave every tensor's type as it is: a file's types belong to its graph, and half
        precision would make other scales of its scales. Devices change."""

        def kept(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(kept, recurse)

    def extra_repr(self) -> str:
        """Model, graph, image size and classes, for `repr`."""
        c = self.config
        height, width = c.img_size
        return f"{c.name!r}, graph={self.graph!r}, img_size={height}x{width}, num_classes={c.num_classes}"

    def _weights(self) -> list[Tensor]:
        return list(self._buffers.values())  # getattr takes a quarter of a millisecond for all of them

    def _config_args(self) -> tuple:
        c = self.config
        return (
            self.graph, self.int8_mode, list(c.img_size), c.patch_size, c.in_chans, c.num_classes, c.embed_dim,
            list(c.depths), list(c.num_heads), list(c.window_size), c.mlp_ratio, c.qkv_bias, c.qk_scale, c.patch_norm,
            c.version, c.pad_first, self.residual,
        )  # fmt: skip

    def _run(
        self, images: Tensor, skip: Sequence[str] = (), features_only: bool = False, poison: bool = False
    ) -> Tensor:
        return torch.ops.swin_int8.forward(
            images, self._weights(), *self._config_args(), list(skip), features_only, poison
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] float32 of images [B, in_chans, H, W] float32; features where there is no head.

        H and W are those of `config` or any other multiples of the patch size at which every stage has windows as large
        (docs/backbone.md). ValueError for another shape or an image with NaN or infinity, TypeError for a wrong dtype,
        NotImplementedError for a device this build does not run on.
        """
        return self._run(images)

    def forward_features(self, images: Tensor) -> Tensor:
        """Pooled features [B, num_features] float32, as FT's own engine gives them."""
        return self._run(images, features_only=True)

    def forward_stages(self, images: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
        """What each of `stages` (numbers from 0; all by default) gives, for a model that is a backbone: the residual
        stream behind its last block, ahead of patch merging and of the final norm, [B, H_i, W_i, C_i].

        float32 on the CPU, the residual stream's type on CUDA. As timm's `features_only`; nothing behind the last stage
        that is asked for is computed. ValueError for a stage that is not there or is named twice.
        """
        chosen = range(len(self.config.depths)) if stages is None else stages
        return torch.ops.swin_int8.forward_stages(images, self._weights(), *self._config_args(), list(chosen))

    def forward_without(self, images: Tensor, skip: Sequence[str]) -> Tensor:
        """A forward pass without the operations named in `skip`: for timing; its numbers mean nothing."""
        return self._run(images, skip=skip)

    def forward_checked(self, images: Tensor) -> Tensor:
        """Like `forward`, with outputs poisoned before and guard bytes checked after every operation (for tests)."""
        return self._run(images, poison=True)

    def trace(self, images: Tensor) -> list[tuple[OpInfo, list[Tensor]]]:
        """What every operation of a forward pass wrote, in order: [(operation, its outputs)]. For tests and debugging.

        proj_bias_residual_norm2 (Swin-V2: proj_bias_norm1_residual), proj_norm and mlp_norm write two tensors, the
        residual stream and the int8 one; the mlp_norm of a stage's last block the residual stream alone.
        """
        outputs = iter(torch.ops.swin_int8.trace(images, self._weights(), *self._config_args()))
        ops = self.ops(images.shape[0], tuple(images.shape[2:]))
        return [(op, [next(outputs) for _ in range(self._outputs(op))]) for op in ops]

    def _outputs(self, op: OpInfo) -> int:
        """How many tensors an operation writes."""
        if op.name == "mlp_norm":
            return 1 if op.block == self.config.depths[op.stage] - 1 else 2
        return 2 if op.name in ("proj_bias_residual_norm2", "proj_bias_norm1_residual", "proj_norm") else 1

    def ops(self, batch: int, img_size: tuple[int, int] | None = None) -> list[OpInfo]:
        """The operations of a forward pass of `batch` images, in order; `img_size`: height and width, else config's."""
        size = list(img_size or self.config.img_size)
        text = torch.ops.swin_int8.describe(self._weights(), *self._config_args(), batch, size)
        return [OpInfo(**entry) for entry in json.loads(text)]

    def workspace_bytes(self, batch: int, img_size: tuple[int, int] | None = None) -> int:
        """Bytes of buffers a forward pass of `batch` images of `img_size` works in, beside the weights."""
        size = list(img_size or self.config.img_size)
        return torch.ops.swin_int8.workspace_bytes(self._weights(), *self._config_args(), batch, size)

    def time_ops(self, images: Tensor, runs: int) -> list[float]:
        """Median milliseconds of each operation by itself, in the order of `ops`, over `runs` runs."""
        return list(torch.ops.swin_int8.time_ops(images, self._weights(), *self._config_args(), runs))


def engine_info() -> dict[str, str]:
    """Backend, instruction set, version, compiler and PyTorch version of the loaded engine."""
    load()
    return dict(zip(("backend", "isa", "version", "compiler", "torch_version"), torch.ops.swin_int8.build_info()))


@functools.cache
def runs_graph(graph: str, device: str = "cpu", version: int = 1) -> bool:
    """Whether the loaded engine has `graph` for Swin-V`version` and every operation of it on `device`: a micro model is
    tried there."""
    from pyharness.config import MICRO_DIGITS
    from pyharness.random_engine import random_engine_file

    config = dataclasses.replace(MICRO_DIGITS, version=version)
    model = SwinInt8.from_engine_file(random_engine_file(config, graph)).to(device)
    try:
        model(torch.zeros(1, config.in_chans, *config.img_size, device=device))
    except NotImplementedError:
        return False
    except ValueError as error:
        if "there is no graph" in str(error):
            return False
        raise
    return True


def cpu_variants() -> list[str]:
    """Instruction sets the engine can use on this machine, best first."""
    load()
    return list(torch.ops.swin_int8.variants())


def select_cpu_variant(name: str) -> str:
    """Use another instruction set ("" for the best) in this process from now on; returns the one used before.

    The environment's SWIN_CPU_ISA sets the one a process starts with. NotImplementedError where it cannot run here.
    """
    load()
    return torch.ops.swin_int8.select_variant(name)


def measure_ceilings(threads: int) -> dict[str, float]:
    """This machine's ceilings, measured now on `threads` threads.

    copy_gb_s: bytes read plus written by a large copy; s8_gop_s: the GEMM's own integer dot product in registers only;
    u8_gop_s: the one it uses where its input is known to be 0..127, as behind a ReLU; grouped_gop_s: the one of AVX2
    for weights that allow it, at best (docs/epilogues.md), left out where there is none; f32_gflop_s: float32
    multiply-add, likewise. A multiply-add counts as two operations.
    """
    load()
    names = ("copy_gb_s", "s8_gop_s", "u8_gop_s", "grouped_gop_s", "f32_gflop_s")
    return {name: value for name, value in zip(names, torch.ops.swin_int8.ceilings(threads)) if value > 0}

"""What takes turns: the graphs of this engine, and whoever else runs a Swin on a CPU.

Peers run the GELU model, this engine's graphs the same one or what removing its GELU leaves. Each gets its files and
its model ready once, and is then a call without arguments that gives the logits of the same images.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.peers import cpuid, runtimes
from benchmarks.peers import isa as isas
from benchmarks.peers.artefacts import kept, megabytes, version_of
from pyharness import results
from pyharness.config import ENGINE_GRAPHS, FUSED_GRAPH
from pyharness.errors import HarnessError
from pyharness.pipeline import file_digest

if TYPE_CHECKING:
    from pyharness.config import SwinConfig

CALIBRATION_IMAGES = 8
"""Batches that static quantizers see. The weights are random, so that more would calibrate nothing better."""

CALIBRATION_SOURCES = (
    "attention_geometry", "calibrated", "config", "fakequant", "fakequant_v2", "position_bias", "quantize",
    "swin_blocks",
)  # fmt: skip
FILE_SOURCES = (
    "attention_geometry", "convert", "engine_file", "ft_format", "fused_convert", "fused_format", "weight_steps",
)  # fmt: skip
"""Modules of the harness that this engine's checkpoints, and its files made of these, depend on."""

GELU = "_gelu"
"""Ending of the method that runs a GELU model on a graph which runs both kinds."""
BALANCED, TENSOR = "_balanced", "_tensor"
"""Endings of the methods with other weight scales than one per channel (WEIGHT_SCALES), of the graph with a choice."""


@dataclass
class Setting:
    """What one group of methods runs: `images` f32 [B, C, H, W] on timm's fp32 `model`, and where files are kept."""

    name: str
    config: SwinConfig
    model: nn.Module
    images: Tensor
    threads: int
    isa: str
    work: Path
    flags: frozenset[str] = field(default_factory=isas.cpu_flags)
    masked: bool = field(default_factory=cpuid.is_masked)

    @property
    def batch(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> str:
        """Of the images, in words: "1x3x224x224"."""
        return "x".join(str(size) for size in self.images.shape)

    def key(self, recipe: str, *packages: str) -> dict[str, Any]:
        """What a file made from the model depends on."""
        versions = {package: version_of(package) for package in ("torch", "timm", *packages)}
        return {"model": self.config.to_json(), "weights": self.weights_digest, "recipe": recipe, **versions}

    @functools.cached_property
    def weights_digest(self) -> str:
        """Of the model's values, in the order of their names."""
        digest = hashlib.sha256()
        for _, tensor in sorted(self.model.state_dict().items()):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def calibration(self, batch: int | None = None) -> Iterator[Tensor]:
        """Images [batch, C, H, W] for static quantizers, as many as are timed where none is given, but other ones."""
        generator = torch.Generator().manual_seed(1)
        for _ in range(CALIBRATION_IMAGES):
            yield torch.randn(batch or self.batch, *self.images.shape[1:], generator=generator)

    def geluless(self) -> nn.Module:
        """The model with ReLU for GELU and no FC1 bias: what distillation would begin with."""
        from pyharness.swin_blocks import make_geluless

        model = copy.deepcopy(self.model)
        make_geluless(model)
        return model


@dataclass
class Built:
    """A method ready to run. `isa_forced`: see peers.isa; `details`: what else is worth keeping in the row's check;
    `alone`: words for peers.memory, where the method runs from its file alone, without the fp32 model; `wanted`: fp32
    logits f32 [B, K] of the model it runs, where that is not the setting's."""

    call: Callable[[], Any]
    model_mb: float | None = None
    isa_forced: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    alone: list[str] | None = None
    wanted: Tensor | None = None


class Unsuitable(HarnessError):
    """A method that this machine, or the instruction set asked for, cannot run."""


@dataclass(frozen=True)
class Method:
    """`precision`: "fp32", "bf16" or "int8"; `packages`: what is needed, the first of them gives the version."""

    name: str
    precision: str
    packages: tuple[str, ...]
    build: Callable[[Setting], Built]
    ours: bool = False

    def missing(self) -> list[str]:
        """Packages it needs that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def version(self) -> str | None:
        """Of the library that runs it; for this engine, the engine's own."""
        if self.ours:
            from pyharness.engine import engine_info

            return engine_info()["version"]
        return f"{self.packages[0]} {version_of(self.packages[0])}"


# --- this engine -----------------------------------------------------------------------------------------------------


def _sources(modules: Iterable[str]) -> dict[str, str]:
    return {module: file_digest(results.ROOT / "pyharness" / f"{module}.py") for module in modules}


def _calibrated_file(setting: Setting, activation: str) -> Path:
    """The model, or its GELU-less variant for "relu", calibrated by FasterTransformer's defaults; for any batch."""
    from pyharness.calibrated import save_calibrated
    from pyharness.quantize import quantize

    def make(into: Path) -> None:
        model = setting.geluless() if activation == "relu" else setting.model
        checkpoint = quantize(model, setting.config, setting.calibration(batch=1))
        save_calibrated(into / "calibrated.safetensors", checkpoint)

    recipe = f"calibrated, {activation}, {CALIBRATION_IMAGES} images"
    key = {**setting.key(recipe, "nvidia-modelopt"), **_sources(CALIBRATION_SOURCES)}
    folder = kept(setting.work, f"{setting.name}-{activation}-calibrated", key, make)
    return folder / "calibrated.safetensors"


def _engine(setting: Setting, graph: str, activation: str, weight_scales: str = "channel") -> Built:
    """One graph of this engine on the model with `activation`, held to that model's fp32 logits."""
    from pyharness.calibrated import load_calibrated
    from pyharness.convert import to_engine_file
    from pyharness.engine import SwinInt8
    from pyharness.engine_file import save_engine_file

    calibrated = _calibrated_file(setting, activation)

    def make(into: Path) -> None:
        checkpoint = load_calibrated(calibrated)
        save_engine_file(into / "engine.safetensors", to_engine_file(checkpoint, graph, weight_scales))

    recipe = {"calibrated": calibrated.parent.name, "graph": graph, "weight_scales": weight_scales}
    name = "-".join([setting.name, graph, activation, weight_scales])
    file = kept(setting.work, name, {**recipe, **_sources(FILE_SOURCES)}, make) / "engine.safetensors"
    forced = None if setting.isa == isas.NATIVE else "yes"
    alone = ["engine", str(file), setting.shape, str(setting.threads)]
    with torch.no_grad():
        wanted = setting.geluless()(setting.images) if activation == "relu" else None
    call = functools.partial(SwinInt8.from_file(file), setting.images)
    return Built(call, megabytes(file.parent), forced, alone=alone, wanted=wanted)


def engine_methods() -> list[Method]:
    """One method for each graph of the engine; for the fused graph one more on the GELU model, and some with the weight
    scales that CPUs without VNNI gain by: balanced ones, for either model, and one per tensor."""

    def method(name: str, graph: str, activation: str, **options: Any) -> Method:
        build = functools.partial(_engine, graph=graph, activation=activation, **options)
        return Method(name, "int8", ("torch", "modelopt"), build, ours=True)

    methods = []
    for graph in ENGINE_GRAPHS:
        methods.append(method(graph, graph, "gelu" if graph == "ft_int8" else "relu"))
        if graph == FUSED_GRAPH:
            methods += [
                method(graph + GELU, graph, "gelu"),
                method(graph + BALANCED, graph, "relu", weight_scales="balanced"),
                method(graph + GELU + BALANCED, graph, "gelu", weight_scales="balanced"),
                method(graph + TENSOR, graph, "relu", weight_scales="tensor"),
            ]
    return methods


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def _size(model: nn.Module) -> float:
    """Parameters and buffers, in 10^6 bytes."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 1e6


def _eager(setting: Setting) -> Built:
    forced = isas.forced_eager(setting.isa)
    return Built(functools.partial(setting.model, setting.images), _size(setting.model), forced)


@contextmanager
def inductor_settings(**settings: Any) -> Iterator[None]:
    """Inside, torch.compile uses `settings`: freezing is decided while the model is traced, too early for the `options`
    of torch.compile alone. Autotuning's tables are not printed."""
    import torch._inductor.config as inductor
    from torch._inductor import select_algorithm

    printed = getattr(select_algorithm, "PRINT_AUTOTUNE", None)
    if printed is not None:
        select_algorithm.PRINT_AUTOTUNE = False
    try:
        with inductor.patch(**settings):
            yield
    finally:
        if printed is not None:
            select_algorithm.PRINT_AUTOTUNE = printed


def _compiled(
    model: nn.Module, images: Tensor, within: AbstractContextManager | None = None, **settings: Any
) -> Callable[[], Tensor]:
    """`model` compiled with `settings` of Inductor for `images`, every call inside `within`. Compiled functions of one
    class share a cache, whose entries are told apart by `options`; so those are given too."""
    compiled = torch.compile(model, fullgraph=True, options=settings or None)
    within = within or nullcontext()

    def call() -> Tensor:
        with within:
            return compiled(images)

    with inductor_settings(**settings):
        call()
        call()
    return call


TUNED = {"max_autotune": True, "freezing": True}


def _need_bf16(setting: Setting) -> None:
    """Unsuitable where there is no bf16 arithmetic."""
    if not isas.has_bf16(setting.isa, setting.flags):
        raise Unsuitable(f"no bf16 arithmetic on {setting.isa} here (AVX512-BF16 or AMX is needed)")


def _compile(setting: Setting, dtype: torch.dtype = torch.float32, **settings: Any) -> Built:
    if dtype == torch.bfloat16:
        _need_bf16(setting)
    model = copy.deepcopy(setting.model).to(dtype)
    call = _compiled(model, setting.images.to(dtype), **settings)
    return Built(call, _size(model), isas.forced_compiled(setting.isa, setting.flags, setting.masked))


def _pt2e(setting: Setting, bf16: bool = False) -> Built:
    """`bf16`: what is not int8 runs in bf16, as PyTorch documents it for this quantizer: compiled and called under
    autocast. Otherwise in fp32."""
    if bf16:
        _need_bf16(setting)
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    reduce_range = not isas.has_vnni(setting.isa, setting.flags)
    exported = torch.export.export(copy.deepcopy(setting.model), (setting.images,)).module()
    recipe = get_default_x86_inductor_quantization_config(reduce_range=reduce_range)
    prepared = prepare_pt2e(exported, X86InductorQuantizer().set_global(recipe))
    for images in setting.calibration():
        prepared(images)
    converted = convert_pt2e(prepared)
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else None
    call = _compiled(converted, setting.images, autocast, freezing=True)
    details = {"reduce_range": reduce_range, "precision": "bf16" if bf16 else "f32"}
    return Built(call, None, isas.forced_compiled(setting.isa, setting.flags, setting.masked), details)


# --- ONNX Runtime and OpenVINO ---------------------------------------------------------------------------------------


def onnx_file(setting: Setting) -> Path:
    """The model exported to ONNX for exactly this batch, weights within."""

    def make(folder: Path) -> None:
        torch.onnx.export(
            setting.model, (setting.images,), str(folder / "model.onnx"), dynamo=True, external_data=False,
            input_names=["images"], output_names=["logits"], verbose=False,
        )  # fmt: skip

    key = setting.key(f"onnx, batch {setting.batch}", "onnx", "onnxscript")
    return kept(setting.work, f"{setting.name}-b{setting.batch}-onnx", key, make) / "model.onnx"


def _ort_reduce_range(setting: Setting) -> bool:
    """Whether ONNX Runtime's weights get 7 bits, as its documentation advises where there is no VNNI."""
    seen = setting.isa if setting.masked else isas.NATIVE  # what ONNX Runtime goes by: nothing but CPUID tells it
    return not isas.has_vnni(seen, setting.flags)


def ort_int8_file(setting: Setting) -> Path:
    """The ONNX model quantized by ONNX Runtime: static, QDQ, u8 activations, s8 weights per channel, in MatMul, Gemm
    and Conv."""
    reduce_range = _ort_reduce_range(setting)

    def make(folder: Path) -> None:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Images(quantization.CalibrationDataReader):
            def __init__(self) -> None:
                self.batches = setting.calibration()

            def get_next(self) -> dict[str, Any] | None:
                images = next(self.batches, None)
                return None if images is None else {"images": images.numpy()}

        prepared = folder / "prepared.onnx"
        quant_pre_process(str(onnx_file(setting)), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared), str(folder / "model.onnx"), Images(), quant_format=quantization.QuantFormat.QDQ,
            per_channel=True, reduce_range=reduce_range, op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        prepared.unlink()

    recipe = f"static QDQ, batch {setting.batch}, reduce_range {reduce_range}, {CALIBRATION_IMAGES} batches"
    key = setting.key(recipe, "onnx", "onnxscript", "onnxruntime")
    return kept(setting.work, f"{setting.name}-b{setting.batch}-ort-int8", key, make) / "model.onnx"


def ort_int8_dynamic_file(setting: Setting) -> Path:
    """The ONNX model quantized by ONNX Runtime: dynamic, u8 activations per tensor, s8 weights per channel, in MatMul
    with weights, Gemm and Conv, which is all that quantize_dynamic takes. Attention's products of two activations stay
    fp32."""
    reduce_range = _ort_reduce_range(setting)

    def make(folder: Path) -> None:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        prepared = folder / "prepared.onnx"
        quant_pre_process(str(onnx_file(setting)), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_dynamic(
            str(prepared), str(folder / "model.onnx"), per_channel=True, reduce_range=reduce_range,
            op_types_to_quantize=["MatMul", "Conv"],  # a Gemm is made a MatMul
            weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        prepared.unlink()

    key = setting.key(
        f"dynamic, batch {setting.batch}, reduce_range {reduce_range}", "onnx", "onnxscript", "onnxruntime"
    )
    return kept(setting.work, f"{setting.name}-b{setting.batch}-ort-int8-dynamic", key, make) / "model.onnx"


def openvino_int8_file(setting: Setting, smooth_quant: bool = True) -> Path:
    """The ONNX model quantized by NNCF with its transformer preset, as OpenVINO's IR.

    SmoothQuant, which the preset turns on by itself, moves the range of a few activation channels into the weights, as
    language models need. On a Swin it costs accuracy (docs/peers_cpu.md), and gains some time.
    """

    def make(folder: Path) -> None:
        import logging

        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        advanced = None
        if not smooth_quant:
            off = nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1)
            advanced = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=off)
        quantized = nncf.quantize(
            openvino.Core().read_model(str(onnx_file(setting))),
            nncf.Dataset([images.numpy() for images in setting.calibration()]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=CALIBRATION_IMAGES,
            advanced_parameters=advanced,
        )
        openvino.save_model(quantized, str(folder / "model.xml"), compress_to_fp16=False)

    smoothing = "with" if smooth_quant else "without"
    recipe = f"nncf transformer {smoothing} SmoothQuant, batch {setting.batch}, {CALIBRATION_IMAGES} batches"
    key = setting.key(recipe, "onnx", "onnxscript", "openvino", "nncf")
    name = f"{setting.name}-b{setting.batch}-openvino-int8{'' if smooth_quant else '-unsmoothed'}"
    return kept(setting.work, name, key, make) / "model.xml"


def _run_alone(setting: Setting, runtime: str, file: Path, *words: str) -> tuple[runtimes.Running, list[str]]:
    run = getattr(runtimes, runtime)
    running = run(file, setting.images.numpy(), setting.threads, *words)
    return running, [runtime, str(file), setting.shape, str(setting.threads), *words]


def _ort(setting: Setting, file_of: Callable[[Setting], Path]) -> Built:
    file = file_of(setting)
    running, words = _run_alone(setting, "onnx_runtime", file)
    forced = isas.forced_by_cpuid(setting.isa, setting.masked)
    return Built(running.call, megabytes(file.parent), forced, alone=words)


def _openvino(setting: Setting, file_of: Callable[[Setting], Path], precision: str | None = None) -> Built:
    """`precision` None: bf16 where there is any, which is OpenVINO's own choice; else f32."""
    if precision == "bf16":
        _need_bf16(setting)
    bf16 = isas.has_bf16(setting.isa, setting.flags)
    file = file_of(setting)
    # OpenVINO's choice looks at the processor alone: with bf16 on an instruction set without it, it stops at a softmax.
    words = [precision] if precision else [] if bf16 else ["f32"]
    running, alone = _run_alone(setting, "openvino", file, *words)
    forced = isas.forced_kernels(setting.isa, running.kernels, setting.masked)
    details = {"precision": running.precision}
    if forced is not None:
        details["kernels"] = " ".join(running.kernels)
    return Built(running.call, megabytes(file.parent), forced, details, alone)


def peer_methods() -> list[Method]:
    """Everybody else, in the order of the rows."""
    onnx, ort, vino = ("onnx", "onnxscript"), ("onnxruntime",), ("openvino",)
    nncf = (*vino, "nncf", *onnx)
    bind = functools.partial
    compile_bf16 = bind(_compile, dtype=torch.bfloat16, **TUNED)
    unsmoothed = bind(openvino_int8_file, smooth_quant=False)
    return [
        Method("timm_fp32", "fp32", ("torch",), _eager),
        Method("compile_fp32", "fp32", ("torch",), _compile),
        Method("compile_tuned_fp32", "fp32", ("torch",), bind(_compile, **TUNED)),
        Method("compile_tuned_bf16", "bf16", ("torch",), compile_bf16),
        Method("pt2e_int8", "int8", ("torchao", "torch"), _pt2e),
        Method("pt2e_int8_bf16", "int8", ("torchao", "torch"), bind(_pt2e, bf16=True)),
        Method("onnxruntime_fp32", "fp32", ort + onnx, bind(_ort, file_of=onnx_file)),
        Method("onnxruntime_int8", "int8", ort + onnx, bind(_ort, file_of=ort_int8_file)),
        Method("onnxruntime_int8_dynamic", "int8", ort + onnx, bind(_ort, file_of=ort_int8_dynamic_file)),
        Method("openvino_fp32", "fp32", vino + onnx, bind(_openvino, file_of=onnx_file, precision="f32")),
        Method("openvino_bf16", "bf16", vino + onnx, bind(_openvino, file_of=onnx_file, precision="bf16")),
        Method("openvino_int8", "int8", nncf, bind(_openvino, file_of=openvino_int8_file)),
        Method("openvino_int8_unsmoothed", "int8", nncf, bind(_openvino, file_of=unsmoothed)),
    ]


def all_methods() -> Mapping[str, Method]:
    """By name: this engine's, then the peers."""
    return {method.name: method for method in (*engine_methods(), *peer_methods())}

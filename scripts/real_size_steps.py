"""The steps of check_real_sizes.py: what is done with one model, and what is kept of it (`Row`).

The rows of a model with the same activation share its model, formats and calibration: FasterTransformer's graph of that
activation and the fused one are made of one checkpoint.
"""

from __future__ import annotations

import gc
import importlib.util
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from pyharness.calibrated import ACTIVATION_OF, CalibratedCheckpoint, load_calibrated, save_calibrated
from pyharness.config import FUSED_GRAPH, SwinConfig
from pyharness.convert import to_engine_file
from pyharness.engine import SwinInt8
from pyharness.engine_file import EngineFile, load_engine_file, save_engine_file
from pyharness.errors import HarnessError
from pyharness.export import COMMANDS, Source, export
from pyharness.fused_reference import FusedReferenceSwin, Stream, difference
from pyharness.models import config_of, create_model, exercise, load_model, make_geluless
from pyharness.quantize import quantize
from pyharness.reference import Node, ReferenceSwin
from pyharness.training import report

SQNR_BOUND_DB = 90.0
"""As in tests/python/test_engine.py: what is left between float32 and float64 once rounding ties are resolved alike."""

HF_BOUND_DB = 90.0
"""transformers' float32 logits against timm's: the same sums in another order. Two tensors mixed up give below 20."""


@dataclass
class Row:
    """What was found for one model, graph and activation. Times in seconds, SQNR in dB, memory in GB (the most that the
    process held during the row); null where it was not measured, and `left_out` says why."""

    model: str
    graph: str
    activation: str
    int8_mode: int
    parameters_m: float
    calibration_images: int
    formats_equal: bool | None = None
    transformers_sqnr_db: float | None = None
    ft_file_equal: bool | None = None
    wrong_values: int | None = None
    engine_sqnr_db: float | None = None
    engine_untied_sqnr_db: float | None = None
    fp32_sqnr_db: float | None = None
    engine_file_mb: float | None = None
    peak_gb: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    passed: bool = False

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        report(f"  {step}")
        start = time.perf_counter()
        yield
        self.seconds[step] = round(self.seconds.get(step, 0.0) + time.perf_counter() - start, 2)

    def decide(self) -> None:
        """Set `passed`. What was left out counts for nothing, the engine is never left out."""
        self.passed = (
            self.formats_equal is not False
            and self.ft_file_equal is not False
            and (self.transformers_sqnr_db is None or self.transformers_sqnr_db > HF_BOUND_DB)
            and not self.wrong_values
            and self.engine_sqnr_db > SQNR_BOUND_DB
        )


def sqnr_db(found: Tensor, wanted: Tensor) -> float:
    """10 log10 of signal power over error power, at most 300."""
    noise = (found.double() - wanted.double()).square().sum()
    return round(float(10 * torch.log10(wanted.double().square().sum() / noise.clamp(min=1e-30))), 2)


# --- Model and images -------------------------------------------------------------------------------------------------


def procedural_images(config: SwinConfig, count: int, seed: int) -> Tensor:
    """Smooth, distinct images f32 [count, in_chans, H, W]: coarse noise, enlarged, and some fine noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, config.in_chans, 7, 7, generator=generator)
    fine = torch.randn(count, config.in_chans, *config.img_size, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=config.img_size, mode="bilinear") + 0.3 * fine


# --- All steps --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check(
    name: str, activation: str, graphs: Sequence[str], int8_mode: int, calibration: int, seed: int, folder: Path
) -> Iterator[Row]:
    """A row for each of `graphs`, which are of one activation; files go to `folder`.

    Formats and the model's own layouts belong to FasterTransformer's graph; what both graphs need is timed in the first
    row. HarnessError from a step ends the run.
    """
    _forget_peak()
    model = create_model(name, seed=seed)
    exercise(model, seed)
    if activation == "relu":
        make_geluless(model)
    config = config_of(model, name)
    parameters = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    rows = [Row(name, graph, activation, int8_mode, parameters, calibration) for graph in graphs]
    first = rows[0]
    images = procedural_images(config, 1, seed + 1)
    with first.timed("fp32"):
        fp32 = model(images)
    for row in rows:
        if row.graph == FUSED_GRAPH:
            row.left_out.append("formats: of the model, in the row of the other graph")
        else:
            _check_formats(row, model, config, images, fp32, folder)
    batches = procedural_images(config, calibration, seed + 2).split(2)
    with first.timed("calibrate"):
        checkpoint = quantize(model, config, batches, int8_mode=int8_mode, data="procedural images")
    del model
    for row in rows:
        _convert(row, checkpoint, folder)
    del checkpoint
    gc.collect()
    for row in rows:
        _run_engine(row, load_engine_file(_engine_path(folder, row.graph)), images, fp32)
        row.peak_gb = _peak_gb()
        row.decide()
        yield row
        gc.collect()
        _forget_peak()


def _check_formats(
    row: Row, model: torch.nn.Module, config: SwinConfig, images: Tensor, fp32: Tensor, folder: Path
) -> None:
    """Whether the model comes back from every format with the same geometry, weights and logits, bit for bit."""
    source = Source(model, config, {"model": row.model, "activation": row.activation})
    row.formats_equal = True
    for command in COMMANDS:
        path = folder / (command if command == "to-hf" else f"{command}.pth")
        with row.timed(command):
            export(source, command, path)
            loaded, meta = load_model(path)
            row.formats_equal &= _same_geometry(config_of(loaded, meta["model"]), config)
            row.formats_equal &= meta["activation"] == row.activation
            row.formats_equal &= _same_weights(model, loaded) and torch.equal(loaded(images), fp32)
        del loaded
    if importlib.util.find_spec("transformers"):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        names = {1: "SwinForImageClassification", 2: "Swinv2ForImageClassification"}
        with row.timed("transformers"):
            loaded = getattr(transformers, names[config.version]).from_pretrained(folder / "to-hf").eval()
            row.transformers_sqnr_db = sqnr_db(loaded(images).logits, fp32)
    gc.collect()


def _same_geometry(one: SwinConfig, other: SwinConfig) -> bool:
    """Whether the two compute the same: the order of shift and padding, which Hugging Face's has its own, counts where
    something is padded."""
    return one == (other if other.is_padded else replace(other, pad_first=one.pad_first))


def _same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[key]) for key, tensor in one.state_dict().items())


def _engine_path(folder: Path, graph: str) -> Path:
    return folder / f"{graph}.safetensors"


def _convert(row: Row, checkpoint: CalibratedCheckpoint, folder: Path) -> None:
    """The engine file, and whether the same comes of the file that FasterTransformer's tool would have left."""
    path = _engine_path(folder, row.graph)
    with row.timed("convert"):
        file = to_engine_file(checkpoint, row.graph)
        save_engine_file(path, file)
    row.engine_file_mb = round(path.stat().st_size / 1e6, 1)
    if checkpoint.config.version != 1:
        row.left_out.append("FT file: FasterTransformer's tool makes none that is read of Swin-V2")
        return
    with row.timed("FT-calibrated file"):
        bare = folder / "ft.pth"
        if not bare.exists():
            save_calibrated(bare, checkpoint)
            torch.save({"model": torch.load(bare, weights_only=True)["model"]}, bare)
        read = load_calibrated(bare, row.model)
        again = to_engine_file(read, row.graph)
    row.ft_file_equal = read.int8_mode == checkpoint.int8_mode and _same_tensors(file, again)


def _same_tensors(one: EngineFile, other: EngineFile) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


# --- The engine against the golden model ------------------------------------------------------------------------------


def follow_of(engine: SwinInt8, graph: str, images: Tensor) -> dict[Node, object]:
    """What the golden model of `graph` follows of a forward pass of the engine: for FasterTransformer's graphs the int8
    tensors, for the fused one all that the blocks wrote. Its logits are its own."""
    follow = {}
    for op, outputs in engine.trace(images):
        node = Node(op.stage if op.stage >= 0 else None, op.block if op.block >= 0 else None, op.name)
        result = outputs[-1]
        if graph == FUSED_GRAPH:
            if node.stage is not None:
                follow[node] = list(outputs)
        elif result.dtype == torch.int8:
            padded = op.name in ("qk_gemm", "softmax")  # the columns behind are padding
            follow[node] = result[..., : result.shape[2]] if padded else result
    return follow


class _Forgetful(dict):
    """A trace that keeps nothing: at these sizes the reference's intermediates are gigabytes."""

    def __setitem__(self, key: object, value: object) -> None:
        pass


class _Compared(_Forgetful):
    """Counts the values of another implementation's pass that are wrong for the inputs they were made from."""

    def __init__(self, found: Mapping[Node, list[Tensor]]) -> None:
        super().__init__()
        self.found, self.wrong = found, 0

    def __setitem__(self, node: Node, value: object) -> None:
        parts = [(value, 0.0)]
        if isinstance(value, Stream):
            parts = [(value.residual, value.slack)] + ([] if value.quantized is None else [(value.quantized, 0.0)])
        if node in self.found:
            pairs = zip(parts, self.found[node], strict=True)
            self.wrong += sum(int(difference(own, found, slack).sum()) for (own, slack), found in pairs)


def _run_engine(row: Row, file: EngineFile, images: Tensor, fp32: Tensor) -> None:
    engine = SwinInt8.from_engine_file(file)
    with row.timed("engine, first run"):
        logits = engine(images)
    with row.timed("engine"):
        again = engine(images)
    if not torch.equal(logits, again):
        raise HarnessError(f"{row.model}: two runs of the engine differ")
    reference = FusedReferenceSwin(file) if row.graph == FUSED_GRAPH else ReferenceSwin(file)
    follow = follow_of(engine, row.graph, images)
    trace = _Compared(follow) if row.graph == FUSED_GRAPH else _Forgetful()
    with row.timed("reference"):
        row.engine_sqnr_db = sqnr_db(logits, reference(images, trace, follow))
    row.wrong_values = trace.wrong if row.graph == FUSED_GRAPH else None
    del follow, trace
    with row.timed("reference, own ties"):
        row.engine_untied_sqnr_db = sqnr_db(logits, reference(images, _Forgetful()))
    row.fp32_sqnr_db = sqnr_db(logits, fp32)


# --- Memory -----------------------------------------------------------------------------------------------------------


def _forget_peak() -> None:
    """Let the kernel count the process's largest memory anew, where it can; else `_peak_gb` is of the whole run."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak_gb() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kilobytes * 1024 / 1e9, 2)


def activation_of(graph: str) -> tuple[str, ...]:
    """The activations that a graph is made with."""
    return ("gelu", "relu") if graph == FUSED_GRAPH else (ACTIVATION_OF[graph],)

"""Take Swin T, S, B, L and L-384 through every conversion and onto the engine, and compare with the golden reference.

    python scripts/check_real_sizes.py --out results/NAME

For each model: timm's geometry with random weights of which every part matters; out to the layouts of timm, Microsoft
and Hugging Face and back, equal to the bit; calibrated on procedural images; through a file as FasterTransformer's tool
leaves it (names and scales alone) to the engine file, equal to the direct way; the engine's logits on an image against
pyharness/reference.py, ties resolved as the engine did, by the bound of tests/python/test_engine.py. Swin-L runs in
int8_mode 2. Random weights prove the conversion, and say nothing of accuracy.

Writes real_sizes.json and real_sizes.md, after every row; a run that was stopped goes on where it was as long as
options and commit are the same. About TIME on 2 cores, MEMORY of memory for L-384.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import gc
import importlib.util
import json
import math
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from pyharness import measure
from pyharness.calibrated import load_calibrated, save_calibrated
from pyharness.config import GRAPHS, SwinConfig
from pyharness.convert import to_engine_file
from pyharness.engine import SwinInt8, engine_info
from pyharness.engine_file import EngineFile, load_engine_file, save_engine_file
from pyharness.errors import HarnessError, run_cli
from pyharness.export import COMMANDS, Source, export
from pyharness.models import config_of, create_model, load_model, make_geluless
from pyharness.quantize import quantize
from pyharness.reference import Node, ReferenceSwin
from pyharness.results import markdown_table, write_text
from pyharness.training import report

SQNR_BOUND_DB = 90.0
"""As in tests/python/test_engine.py: what is left between float32 and float64 once rounding ties are resolved alike."""

HF_BOUND_DB = 90.0
"""transformers' float32 logits against timm's: the same sums in another order. Two tensors mixed up give below 20."""

CASES = {
    "swin_tiny_patch4_window7_224": 1,
    "swin_small_patch4_window7_224": 1,
    "swin_base_patch4_window7_224": 1,
    "swin_large_patch4_window7_224": 2,
    "swin_large_patch4_window12_384": 2,
}
"""Models, and the int8_mode each runs in (2 for Swin-L, as FasterTransformer's published figures)."""


@dataclass
class Row:
    """What was found for one model and graph. Times in seconds, SQNR in dB; null where it was not measured."""

    model: str
    graph: str
    int8_mode: int
    parameters_m: float
    calibration_images: int
    formats_equal: bool | None = None
    transformers_sqnr_db: float | None = None
    ft_file_equal: bool | None = None
    engine_sqnr_db: float | None = None
    engine_untied_sqnr_db: float | None = None
    fp32_sqnr_db: float | None = None
    engine_file_mb: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    passed: bool = False

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        report(f"  {step}")
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 2)


def exercise(model: torch.nn.Module, seed: int) -> None:
    """Random weights of variance 1/fan_in, biases, norms and position bias that all matter: timm's initial ones would
    leave attention uniform and biases zero, and hide a fault in either."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                values = 1 + 0.1 * values
            elif name.endswith("bias"):
                values = 0.3 * values
            elif not name.endswith("relative_position_bias_table"):
                values = values / math.sqrt(parameter[0].numel())
            parameter.copy_(values)


def procedural_images(config: SwinConfig, count: int, seed: int) -> Tensor:
    """Smooth, distinct images f32 [count, in_chans, H, W]: coarse noise, enlarged, and some fine noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, config.in_chans, 7, 7, generator=generator)
    fine = torch.randn(count, config.in_chans, *config.img_size, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=config.img_size, mode="bilinear") + 0.3 * fine


def sqnr_db(found: Tensor, wanted: Tensor) -> float:
    """10 log10 of signal power over error power, at most 300."""
    noise = (found.double() - wanted.double()).square().sum()
    return round(float(10 * torch.log10(wanted.double().square().sum() / noise.clamp(min=1e-30))), 2)


def follow_of(engine: SwinInt8, images: Tensor) -> dict[Node, Tensor]:
    """The int8 tensors of a forward pass of the engine, by the reference's names."""
    follow = {}
    for op, outputs in engine.trace(images):
        result = outputs[-1]
        if op.name in ("qk_gemm", "softmax"):
            result = result[..., : result.shape[2]]  # the columns behind are padding
        if result.dtype == torch.int8:
            follow[Node(op.stage if op.stage >= 0 else None, op.block if op.block >= 0 else None, op.name)] = result
    return follow


class _Forgetful(dict):
    """A trace that keeps nothing: at these sizes the reference's intermediates are gigabytes."""

    def __setitem__(self, key: object, value: object) -> None:
        pass


@torch.no_grad()
def check(name: str, graph: str, int8_mode: int, calibration: int, seed: int, folder: Path) -> Row:
    """All steps for one model and graph. HarnessError from a step ends the run."""
    model = create_model(name, seed=seed)
    exercise(model, seed)
    if graph == "geluless_int8":
        make_geluless(model)
    config = config_of(model, name)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    row = Row(name, graph, int8_mode, round(parameters, 2), calibration)
    images = procedural_images(config, 1, seed + 1)
    with row.timed("fp32"):
        fp32 = model(images)
    row.formats_equal = _formats_are_equal(row, model, config, images, fp32, folder)
    batches = procedural_images(config, calibration, seed + 2).split(2)
    with row.timed("calibrate"):
        checkpoint = quantize(model, config, batches, int8_mode=int8_mode, data="procedural images")
    del model
    with row.timed("convert"):
        file = to_engine_file(checkpoint)
        save_engine_file(folder / "engine.safetensors", file)
    row.engine_file_mb = round((folder / "engine.safetensors").stat().st_size / 1e6, 1)
    with row.timed("FT-calibrated file"):
        save_calibrated(folder / "ft.pth", checkpoint)
        torch.save({"model": torch.load(folder / "ft.pth", weights_only=True)["model"]}, folder / "ft.pth")
        again = to_engine_file(load_calibrated(folder / "ft.pth", name))
    row.ft_file_equal = again.int8_mode == int8_mode and _same_tensors(file, again)
    del checkpoint, again, file
    gc.collect()
    _run_engine(row, load_engine_file(folder / "engine.safetensors"), images, fp32)
    row.passed = bool(
        row.formats_equal
        and row.ft_file_equal
        and row.engine_sqnr_db > SQNR_BOUND_DB
        and (row.transformers_sqnr_db is None or row.transformers_sqnr_db > HF_BOUND_DB)
    )
    return row


def _same_tensors(one: EngineFile, other: EngineFile) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def _formats_are_equal(
    row: Row, model: torch.nn.Module, config: SwinConfig, images: Tensor, fp32: Tensor, folder: Path
) -> bool:
    """Whether the model comes back from every format with the same geometry, weights and logits, bit for bit."""
    activation = "relu" if row.graph == "geluless_int8" else "gelu"
    source = Source(model, config, {"model": row.model, "activation": activation})
    equal = True
    for command in COMMANDS:
        path = folder / (command if command == "to-hf" else f"{command}.pth")
        with row.timed(command):
            export(source, command, path)
            loaded, meta = load_model(path)
            state = loaded.state_dict()
            equal &= config_of(loaded, meta["model"]) == config and meta["activation"] == activation
            equal &= all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
            equal &= torch.equal(loaded(images), fp32)
        del loaded, state
    if importlib.util.find_spec("transformers"):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        with row.timed("transformers"):
            theirs = transformers.SwinForImageClassification.from_pretrained(folder / "to-hf").eval()
            row.transformers_sqnr_db = sqnr_db(theirs(images).logits, fp32)
    gc.collect()
    return equal


def _run_engine(row: Row, file: EngineFile, images: Tensor, fp32: Tensor) -> None:
    engine = SwinInt8.from_engine_file(file)
    with row.timed("engine, first run"):
        logits = engine(images)
    with row.timed("engine"):
        again = engine(images)
    if not torch.equal(logits, again):
        raise HarnessError(f"{row.model}: two runs of the engine differ")
    reference = ReferenceSwin(file)
    with row.timed("reference"):
        row.engine_sqnr_db = sqnr_db(logits, reference(images, _Forgetful(), follow_of(engine, images)))
    with row.timed("reference, own ties"):
        row.engine_untied_sqnr_db = sqnr_db(logits, reference(images, _Forgetful()))
    row.fp32_sqnr_db = sqnr_db(logits, fp32)


def to_markdown(document: dict) -> str:
    """The rows as a table, and what its columns mean."""

    def decibel(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    def yes(value: bool | None) -> str:
        return {True: "equal", False: "DIFFERENT", None: "-"}[value]

    header = (
        "model", "graph", "int8_mode", "parameters M", "formats", "transformers dB", "FT file", "engine dB",
        "own ties dB", "against fp32 dB", "engine file MB", "engine s", "calibrate s", "reference s", "all s", "result",
    )  # fmt: skip
    rows = [
        (
            row["model"], row["graph"], str(row["int8_mode"]), f"{row['parameters_m']:.1f}", yes(row["formats_equal"]),
            decibel(row["transformers_sqnr_db"]), yes(row["ft_file_equal"]), decibel(row["engine_sqnr_db"]),
            decibel(row["engine_untied_sqnr_db"]), decibel(row["fp32_sqnr_db"]), f"{row['engine_file_mb']:.0f}",
            *(f"{row['seconds'][step]:.1f}" for step in ("engine", "calibrate", "reference")),
            f"{sum(row['seconds'].values()):.0f}", "passed" if row["passed"] else "FAILED",
        )
        for row in document["rows"]
    ]  # fmt: skip
    meta = document["meta"]
    return (
        f"{markdown_table(header, rows, right=range(2, len(header) - 1))}\n"
        "formats: the random model went out to timm's, Microsoft's and Hugging Face's format and came back with the "
        "same geometry, weights and logits, bit for bit. transformers: SQNR of its own float32 logits from our folder. "
        "FT file: names and scales alone, as FasterTransformer's tool leaves them, give the same engine file.\n"
        "engine: SQNR of its logits on one image against the golden reference, ties resolved alike; "
        f"{SQNR_BOUND_DB:g} and more passes. own ties: the same where the reference rounds its own ties. against fp32: "
        "for random weights; it says nothing of trained ones.\n"
        f"Times are of one run with {meta['threads']} CPU threads, on a machine that may have been busy.\n"
        f"Measured: {meta['device']}; torch {meta['torch']}; {meta['date'][:10]}; "
        f"commit {(meta['commit'] or '-')[:12]}; {meta['peak_gb']:.1f} GB of memory at most.\n"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="check_real_sizes.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/local"), help="result folder (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="timm names")
    parser.add_argument("--graphs", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--calibration", type=int, default=4, help="images to calibrate on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    measure.need_positive(args, "--calibration", "--threads")
    threads = measure.set_threads(args.threads)
    target = args.out / "real_sizes.json"
    conditions = {"calibration": args.calibration, "seed": args.seed, "commit": measure.git_state()["commit"]}
    rows = _rows_of(target, conditions)
    for name in args.models:
        for graph in args.graphs:
            if any((row["model"], row["graph"]) == (name, graph) for row in rows):
                report(f"{name}, {graph}: found in {target}")
                continue
            report(f"{name}, {graph}, int8_mode {CASES[name]}")
            with tempfile.TemporaryDirectory() as folder:
                row = check(name, graph, CASES[name], args.calibration, args.seed, Path(folder))
            rows.append(asdict(row))
            gc.collect()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            meta = {**measure.environment(engine_info(), threads), "conditions": conditions, "peak_gb": round(peak, 2)}
            document = {"meta": meta, "rows": rows}
            write_text(target, json.dumps(document, indent=2) + "\n")
            write_text(target.with_suffix(".md"), to_markdown(document))
    print(target.with_suffix(".md").read_text(encoding="utf-8"))
    return 0 if all(row["passed"] for row in rows) else 1


def _rows_of(target: Path, conditions: dict) -> list[dict]:
    """Rows of an earlier run under the same conditions."""
    try:
        document = json.loads(target.read_text(encoding="utf-8"))
        return document["rows"] if document["meta"]["conditions"] == conditions else []
    except (OSError, ValueError, KeyError):
        return []


if __name__ == "__main__":
    run_cli(main)

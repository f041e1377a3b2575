"""Table 2 of the seed paper: accuracy and latency of fp32, FT INT8 and GELU-less INT8, with and without distillation;
beside them the fused graph, with GELU and GELU-less.

By default the micro Swin on scikit-learn's digits goes through everything live (distil, calibrate, convert, run the
INT8 engine), and Swin T / S / B / L are timed with random weights, their accuracy left empty.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import copy
import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyharness import gpu, measure, results
from pyharness.config import GRAPHS, MICRO_DIGITS, WEIGHT_SCALES
from pyharness.data import DATA_HELP, add_max_corrupt, check_corrupt, need_share
from pyharness.distributed import need_one_process
from pyharness.errors import HarnessError, run_cli
from pyharness.hf_format import CONFIG_NAME
from pyharness.pipeline import (
    DEFAULT_WORK,
    GRAPH_OF_METHOD,
    Inputs,
    Pipeline,
    checkpoint_digest,
    code_digest,
    listing_digest,
)
from pyharness.results import METHODS, Table2Row
from pyharness.training import report

if TYPE_CHECKING:
    from pyharness.evaluate import EvalResult, ShardedEvaluation

DEFAULT_MODELS = (MICRO_DIGITS.name, *results.PUBLISHED)
DEFAULT_BATCH = {"cuda": 128, "cpu": 1}
DEFAULT_RUNS = {"cuda": 1000, "cpu": 20}
MICRO_RUNS_CPU = 400
"""The micro model takes about a millisecond: more rounds cost nothing and steady its median."""
FLOAT_RUNS_CUDA = 100
"""Rounds of the floating-point methods on a GPU: they take several times as long as the INT8 ones and vary less."""
EVAL_BATCH = 32

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """How the rows are measured. `runs` None takes the default of the model and the device; `seconds` bounds the
    rounds of the methods that are timed together."""

    batch: int
    runs: int | None = None
    limit: int | None = None
    device: torch.device = CPU
    seconds: float | None = None

    def runs_of(self, model: str) -> int:
        if self.runs is not None:
            return self.runs
        if self.device.type == "cpu" and model == MICRO_DIGITS.name:
            return MICRO_RUNS_CPU
        return DEFAULT_RUNS[self.device.type]


@dataclass(frozen=True)
class Predictor:
    """A method: its model, and the device and dtype of the images the model takes. Called with any f32 images."""

    model: Callable[[Tensor], Tensor]
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    def prepare(self, images: Tensor) -> Tensor:
        return images.to(self.device, self.dtype)

    def __call__(self, images: Tensor) -> Tensor:
        return self.model(self.prepare(images))


def predictors(pipeline: Pipeline, device: torch.device = CPU) -> dict[str, Predictor]:
    """Images f32 [B, C, H, W] to logits [B, K], by method, in the order of the rows; on a GPU also timm in float16.

    GELU-less without distillation has a row only where it has an accuracy: its latency is that of the distilled one.
    So have the methods of a graph that the engine has on `device`.
    """
    from pyharness.engine import SwinInt8

    names = [name for name in METHODS if name != "geluless_int8_no_kd" or pipeline.inputs.has_weights]
    names = names_that_run(names, device, pipeline.config.version)
    engines = {name: SwinInt8.from_engine_file(pipeline.engine_file(name)) for name in names if name != "fp32"}
    if device.type == "cpu":
        return {"fp32": Predictor(pipeline.teacher), **{name: Predictor(engine) for name, engine in engines.items()}}
    teacher = pipeline.teacher
    return {
        "fp32": Predictor(copy.deepcopy(teacher).to(device), device),
        "fp16": Predictor(copy.deepcopy(teacher).to(device, torch.half), device, torch.half),
        **{name: Predictor(engine.to(device), device) for name, engine in engines.items()},
    }


def names_that_run(names: Sequence[str], device: torch.device, version: int = 1) -> list[str]:
    """Those methods of `names` whose graph the engine has for Swin `version` on `device`; what is left out is said."""
    from pyharness.engine import runs_graph

    graphs = dict.fromkeys(GRAPH_OF_METHOD[name] for name in names if name in GRAPH_OF_METHOD)
    others = [graph for graph in graphs if graph not in GRAPHS]
    lacking = [graph for graph in others if not runs_graph(graph, device.type, version)]
    for graph in lacking:
        report(f"the engine has no {graph} on {device.type}{'' if version == 1 else ' for Swin-V2'}: no rows for it")
    return [name for name in names if GRAPH_OF_METHOD.get(name) not in lacking]


def evaluations(
    pipeline: Pipeline, methods: Mapping[str, Predictor], limit: int | None
) -> dict[str, ShardedEvaluation]:
    """`ShardedEvaluation` by method on `limit` of the held-out images; empty where there are no trained weights.

    What is counted is kept in the pipeline's folder until it is told to `forget`: a killed run goes on from there.
    """
    from pyharness.engine import SwinInt8, library_path
    from pyharness.evaluate import ShardedEvaluation
    from pyharness.models import MICRO_TEACHER

    if not pipeline.inputs.has_weights:
        return {}
    listing = listing_digest(pipeline.dataset(train=False))
    found = {}
    for name, predict in methods.items():
        on_engine = isinstance(predict.model, SwinInt8)
        weights = pipeline.engine_path(name) if on_engine else pipeline.inputs.weights or MICRO_TEACHER
        identity = {
            "method": name, "weights": checkpoint_digest(weights), "code": code_digest(library_path()),
            "data": str(pipeline.inputs.data), "listing": listing, "device": predict.device.type,
        }  # fmt: skip
        found[name] = ShardedEvaluation(
            pipeline.dataset(train=False), EVAL_BATCH, limit=limit, folder=pipeline.work / "partial", identity=identity,
            label=f"{pipeline.inputs.model}: {name}",
        )  # fmt: skip
    return found


def evaluate(
    pipeline: Pipeline, methods: Mapping[str, Predictor], todo: Mapping[str, ShardedEvaluation]
) -> dict[str, EvalResult]:
    """`EvalResult` by method. DataError where more of the images than the pipeline allows cannot be read."""
    found = {}
    for name, evaluation in todo.items():
        found[name], corrupt = evaluation.run(methods[name])
        check_corrupt(corrupt, found[name].n + found[name].corrupt, None, pipeline.max_corrupt)  # each is named already
        report(f"{pipeline.inputs.model}: {name}: top-1 {found[name].top1:.2f} % of {found[name].n} images")
    return found


@torch.inference_mode()
def time_together(
    methods: Mapping[str, Predictor], images: Tensor, runs: int, settings: Settings
) -> measure.Samples:
    """Rounds of `methods` in alternation, on the same images f32 [batch, C, H, W]."""
    calls = {name: functools.partial(method.model, method.prepare(images)) for name, method in methods.items()}
    timing = gpu.timing_of(settings.device, len(images))
    return measure.time_alternating(calls, runs, limit_s=settings.seconds, **timing)


def time_methods(
    pipeline: Pipeline, methods: Mapping[str, Predictor], settings: Settings
) -> dict[str, measure.Samples]:
    """For each method the rounds it took part in, FT INT8 always among them.

    On a CPU all methods take turns. On a GPU those in floating point go with FT INT8 alone, for fewer rounds.
    """
    model, runs = pipeline.inputs.model, settings.runs_of(pipeline.inputs.model)
    images = measure.random_images(pipeline.config, settings.batch)
    groups = [(list(methods), runs)]
    if settings.device.type == "cuda":
        floating = [name for name in methods if name.startswith("fp")]
        integer = [name for name in methods if name not in floating]
        groups = [(integer, runs), (["ft_int8", *floating], min(runs, FLOAT_RUNS_CUDA))]
    found: dict[str, measure.Samples] = {}
    for names, rounds in groups:
        report(f"{model}: time {len(names)} methods in turn, {rounds} rounds, batch {settings.batch}")
        samples = time_together({name: methods[name] for name in names}, images, rounds, settings)
        for name in names:
            found.setdefault(name, samples)
    return found


def gemm_providers(method: Predictor, batch: int, info: Mapping[str, str]) -> dict[str, str] | None:
    """Who runs the engine's GEMMs; None for a method of PyTorch's."""
    from pyharness.engine import SwinInt8

    return gpu.gemm_providers(method.model.ops(batch), dict(info)) if isinstance(method.model, SwinInt8) else None


def rows_of(
    pipeline: Pipeline, settings: Settings, device: str, info: Mapping[str, str]
) -> tuple[list[Table2Row], Callable[[], None]]:
    """The rows of one model, and what to call once they are written: it removes what their evaluation has kept.
    `device` names the machine; `info` is what the engine says of itself."""
    methods = predictors(pipeline, settings.device)
    todo = evaluations(pipeline, methods, settings.limit)
    accuracies = evaluate(pipeline, methods, todo)
    timed = time_methods(pipeline, methods, settings)
    rows = []
    for name, method in methods.items():
        samples = timed[name]
        stats, ratio = measure.summarize(samples[name]), measure.paired_ratio(samples, name, "ft_int8")
        accuracy = accuracies.get(name)
        rows.append(
            Table2Row(
                model=pipeline.inputs.model,
                img_size=pipeline.config.img_size[0],
                batch=settings.batch,
                device=device,
                method=name,
                top1=accuracy and accuracy.top1,
                top5=accuracy and accuracy.top5,
                top1_interval95=accuracy and accuracy.interval95,
                n_eval=accuracy and accuracy.n,
                latency_ms=stats.to_dict(),
                images_per_s=settings.batch * 1000 / stats.median,
                vs_ft_int8=ratio.median,
                vs_ft_int8_quartiles=(ratio.q25, ratio.q75),
                gemm_providers=gemm_providers(method, settings.batch, info),
            )
        )

    def written() -> None:
        for evaluation in todo.values():
            evaluation.forget()

    return rows, written


# --- The program ------------------------------------------------------------------------------------------------------


def named_paths(option: str, words: Sequence[str]) -> dict[str, Path]:
    """`MODEL=FILE` words as a dict; FILE may be a Hugging Face folder.

    HarnessError where a word is not of that form, or there is neither a file nor such a folder.
    """
    found = {}
    for word in words:
        model, separator, file = word.partition("=")
        if not (model and separator and file):
            raise HarnessError(f"{option} needs MODEL=FILE, found {word!r}")
        if Path(file).is_dir() and not (Path(file) / CONFIG_NAME).is_file():
            raise HarnessError(
                f"{option} {word}: {file} is a folder without {CONFIG_NAME}; give a checkpoint or a Hugging Face folder"
            )
        if not Path(file).exists():
            fetch = "; `python pyharness/convert.py to-timm pretrained FILE --model NAME` makes one of timm's weights"
            raise HarnessError(f"{option} {word}: there is no file {file}{fetch * (file == 'pretrained')}")
        found[model] = Path(file)
    return found


def inputs_from(args: argparse.Namespace) -> list[Inputs]:
    """What each model of the command line is made from. HarnessError for files of models that are not asked for, and
    for images that no model is for."""
    weights, students = named_paths("--weights", args.weights), named_paths("--student", args.student)
    for option, given in (("--weights", weights), ("--student", students)):
        for model in given.keys() - set(args.models):
            raise HarnessError(f"{option} {model}: that model is not among --models ({', '.join(args.models)})")
    if args.data is not None and not weights:
        raise HarnessError(
            f"--data {args.data}: no model here would be evaluated on it: random weights have no accuracy, and the "
            "packaged micro model keeps its digits. Add --weights MODEL=FILE, or leave --data out"
        )
    for model in students.keys() - weights.keys() - {MICRO_DIGITS.name}:
        raise HarnessError(f"--student {model}: its teacher is needed too; add --weights {model}=FILE")
    # The folder of images belongs to the models whose weights are given; the packaged micro model keeps its digits.
    return [
        Inputs(m, weights.get(m), students.get(m), args.data if m in weights else None, args.int8_mode)
        for m in args.models
    ]


def add_device_option(group: argparse._ActionsContainer) -> None:
    """`--device`, which the measuring programs share."""
    group.add_argument(
        "--device", choices=gpu.DEVICES, default="cpu", help="what runs the models (default: %(default)s)"
    )


def add_weight_scales_option(group: argparse._ActionsContainer) -> None:
    """`--weight-scales`, which the measuring programs share."""
    group.add_argument(
        "--weight-scales", choices=WEIGHT_SCALES,
        help="how the fused graph's weights are quantized (default: balanced where the processor has AVX2 and no VNNI, "
        "else channel)",
    )  # fmt: skip


def weight_scales_of(args: argparse.Namespace, info: Mapping[str, str]) -> str:
    """One of WEIGHT_SCALES: what was asked for, else what is best for the engine that says `info` of itself
    (docs/fused.md)."""
    return args.weight_scales or ("balanced" if info["isa"] == "avx2" else "channel")


def add_file_options(parser: argparse.ArgumentParser, files: str) -> None:
    """`--out` and `--work`, which the measuring programs share. `files` says in words what goes to `--out`."""
    where = parser.add_argument_group("files")
    where.add_argument(
        "--out", type=Path, default=results.ROOT / "results" / "local", metavar="DIR",
        help=f"folder of {files} (default: results/local)",
    )  # fmt: skip
    where.add_argument(
        "--work", type=Path, default=DEFAULT_WORK, metavar="DIR",
        help="students, calibrated checkpoints and engine files, kept (default: results/local/work)",
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reproduce_table2.py",
        description="Table 2: accuracy and latency of fp32, FT INT8, GELU-less INT8 and the fused graph, through the "
        "INT8 engine.",
        epilog="On ImageNet: --models swin_tiny_patch4_window7_224 --weights swin_tiny_patch4_window7_224=FILE.pth "
        "--data IMAGENET. The student is then distilled live, which takes GPU hours or CPU weeks; give a finished one "
        "(pyharness/distill.py) with --student.",
    )
    what = parser.add_argument_group("models and data")
    what.add_argument(
        "--models", nargs="+", default=list(DEFAULT_MODELS), metavar="MODEL",
        help="timm names, or swin_micro_digits (default: micro, T, S, B, L)",
    )  # fmt: skip
    what.add_argument(
        "--weights", nargs="+", default=[], metavar="MODEL=FILE",
        help="fp32 checkpoints or Hugging Face folders; without one the weights are random and the accuracy is empty",
    )  # fmt: skip
    what.add_argument(
        "--student", nargs="+", default=[], metavar="MODEL=FILE",
        help="GELU-less checkpoints of distill.py, files or folders; without one the student is distilled live",
    )  # fmt: skip
    what.add_argument(
        "--data", metavar="DATA",
        help=f"for the models with --weights: {DATA_HELP}",
    )  # fmt: skip
    add_max_corrupt(what)
    what.add_argument("--limit", type=int, metavar="N", help="evaluate on N of the images only, from all over the set")
    what.add_argument(
        "--int8-mode", type=int, choices=(1, 2), default=1,
        help="2: FC2 and patch merging with 32-bit results (default: %(default)s)",
    )  # fmt: skip
    add_weight_scales_option(what)
    how = parser.add_argument_group("measurement")
    add_device_option(how)
    how.add_argument("--batch", type=int, metavar="N", help="images per call (default: 128 on a GPU, 1 on a CPU)")
    how.add_argument(
        "--runs", type=int, metavar="N",
        help=f"timed rounds (default: 1000 on a GPU, 20 on a CPU, {MICRO_RUNS_CPU} for the micro model)",
    )  # fmt: skip
    how.add_argument(
        "--seconds", type=int, metavar="S",
        help="begin no round after S seconds of each group of methods; the rows say how many rounds there were",
    )  # fmt: skip
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add_file_options(parser, "table2.json, .csv, .md and the plots")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    need_one_process()
    measure.need_positive(args, "--batch", "--runs", "--limit", "--threads", "--seconds")
    need_share(args.max_corrupt)
    asked = inputs_from(args)
    device = gpu.use_device(args.device)
    threads, info = measure.set_threads(args.threads), gpu.engine_info_on(device)
    scales = weight_scales_of(args, info)
    pipelines = [Pipeline(replace(inputs, weight_scales=scales), args.work, args.max_corrupt) for inputs in asked]
    settings = Settings(args.batch or DEFAULT_BATCH[device.type], args.runs, args.limit, device, args.seconds)
    meta = {**measure.environment(info, threads), "int8_mode": args.int8_mode, "data": args.data}
    meta["weight_scales"] = scales
    meta["data_models"] = [inputs.model for inputs in asked if inputs.data is not None]
    meta |= gpu.conditions_on(device, meta["device"])
    rows: list[Table2Row] = []
    finished: list[Callable[[], None]] = []
    document: dict = {}
    while pipelines:
        new, written = rows_of(pipelines.pop(0), settings, meta["device"], info)
        rows += new
        finished.append(written)
        document = results.write_table(args.out, "table2", meta, rows)  # so that a killed run leaves what it has
        gc.collect()  # the weights of one model go before those of the next come
    for written in finished:  # the table is whole: until then a run begins with the first model, and finds it counted
        written()
    from pyharness.plots import plot_table2

    pictures = plot_table2(document, args.out)
    print(f"\nTable 2\n\n{results.markdown_table2(document)}")
    print("Written:", ", ".join(str(path) for path in (*sorted(args.out.glob("table2.*")), *pictures)))
    return 0


if __name__ == "__main__":
    run_cli(main)

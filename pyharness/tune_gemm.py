"""Tune the GEMMs of a model ahead of time: which provider and kernel runs each shape fastest on this GPU.

Every candidate of cuBLASLt, CUTLASS and the engine's own tiles is first proven on random data against the engine's
plain kernel; only what is right is timed. The winners go to a config file that the engine reads; without it the engine
does the same at the first forward pass of a new batch size.
"""

from __future__ import annotations

if not __package__:  # run as a file: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyharness import measure, results
from pyharness.atomic import atomic_path
from pyharness.config import SwinConfig
from pyharness.distributed import need_one_process
from pyharness.errors import EngineError, run_cli
from pyharness.training import report

DEFAULT_BATCHES = (128,)


@dataclass(frozen=True)
class Shape:
    """out [m, n] = x s8 [m, k] times w s8 [n, k] transposed; `output`: csrc/include/swin/cuda_gemm.h."""

    m: int
    n: int
    k: int
    output: str


def gemm_shapes(config: SwinConfig, batch: int, int8_mode: int = 1) -> list[Shape]:
    """The GEMMs of all graphs for `batch` images, each once, in the order in which a forward pass comes to them."""
    wide = "s8" if int8_mode == 1 else "s32"
    shapes: dict[Shape, None] = {}
    for stage in config.stages():
        (height, width), dim = stage.resolution, stage.dim
        m, rows = batch * height * width, batch * stage.windows * stage.window_area  # rows: padding of windows included
        hidden = config.hidden_dim(dim)
        # The fused graph's, with a float16 residual stream. Its other products, and the MLPs whose rows stay in one
        # block (csrc/cuda/row_blocks.h), have kernels of their own.
        fused = [Shape(m, hidden, dim, "channels_gelu"), Shape(m, hidden, dim, "channels_relu")]
        if config.version == 1:
            fused += [Shape(rows, 3 * dim, dim, "channels_s8"), Shape(m, dim, hidden, "channels_add_f16")]
        else:
            fused += [Shape(rows, dim, dim, "channels_f32"), Shape(m, dim, hidden, "channels_f32")]
        found = [
            Shape(rows, 3 * dim, dim, "s8"),  # qkv
            Shape(rows, dim, dim, "s8"),  # proj
            Shape(m, hidden, dim, "s8"),  # fc1 of the FT graph
            Shape(m, hidden, dim, "s8_relu"),  # fc1 of the GELU-less graph
            Shape(m, dim, hidden, wide),  # fc2
        ]
        if stage.has_downsample:
            merged = batch * ((height + 1) // 2) * ((width + 1) // 2)
            found.append(Shape(merged, 2 * dim, 4 * dim, wide))  # reduction
        shapes.update(dict.fromkeys(found + fused))
    return list(shapes)


def config_of_name(name: str) -> SwinConfig:
    """The geometry of timm's model `name`, or of the micro model; no weights are made or read."""
    from pyharness.models import config_of, create_model

    with torch.device("meta"):
        return config_of(create_model(name), name)


def need_cuda_engine() -> None:
    """EngineError where the engine was built without CUDA, or this machine has no GPU."""
    from pyharness.engine import load

    load()
    if not json.loads(torch.ops.swin_int8.cuda_info())["built"]:
        raise EngineError(
            "the engine was built without the CUDA backend, which is what tuning is for. Build it on a machine with "
            "nvcc: `bash scripts/build_ft.sh`"
        )
    if not torch.cuda.is_available():
        raise EngineError("PyTorch finds no GPU on this machine, and candidates are proven and timed on one")


def tune(shapes: Iterable[Shape], again: bool = False) -> dict[str, Any]:
    """Tune `shapes` on the current device; what the engine answers (csrc/include/swin/cuda_gemm.h), as a dict.

    Shapes that the config file holds for this device and these library versions are only read, unless `again`.
    """
    shapes = list(shapes)
    columns = ([getattr(s, name) for s in shapes] for name in ("m", "n", "k", "output"))
    return json.loads(torch.ops.swin_int8.tune_gemm(*columns, again))


def table(shapes: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row per shape, with each provider's best time and how many of its candidates were proven."""
    providers = list(dict.fromkeys(name for shape in shapes for name in shape["offered"]))
    names = ["M", "N", "K", "output", "runs", "TOP/s", *(f"{name} us (proven/offered)" for name in providers)]
    lines = [" | ".join(names), " | ".join("---:" for _ in names)]
    for shape in shapes:
        best = {timing["provider"]: timing["us"] for timing in shape["best"]}
        cells = [f"{best[name]:.1f}" if name in best else "-" for name in providers]
        counts = [f"({shape['proven'].get(name, 0)}/{shape['offered'].get(name, 0)})" for name in providers]
        rate = 2e-6 * shape["m"] * shape["n"] * shape["k"] / shape["us"] if shape["us"] else 0.0
        runs = f"{shape['chosen']} {shape['candidate']}" if shape["chosen"] else "nothing"
        numbers = [str(shape[name]) for name in ("m", "n", "k", "output")]
        timings = [f"{cell} {count}" for cell, count in zip(cells, counts)]
        lines.append(" | ".join([*numbers, runs, f"{rate:.1f}", *timings]))
    return "\n".join(f"| {line} |" for line in lines)


def refusals(shapes: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each provider and shape of which something was refused, with the first reason."""
    lines = []
    for shape in shapes:
        seen: dict[str, list[str]] = {}
        for refusal in shape["refused"]:
            seen.setdefault(refusal["provider"], []).append(f"{refusal['candidate']}: {refusal['why']}".lstrip(": "))
        where = f"M={shape['m']} N={shape['n']} K={shape['k']} {shape['output']}"
        for provider, reasons in seen.items():
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            lines.append(f"{where}: {provider} {reasons[0]}{more}")
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tune_gemm.py",
        description="Prove, time and choose the INT8 GEMM kernels of Swin models on this GPU.",
        epilog="SWIN_GEMM=cublaslt|cutlass|swin_tiles|auto forces a provider when the engine runs; SWIN_GEMM_CONFIG is "
        "where the engine looks for the file, by default ~/.cache/swin_int8/gemm.json.",
    )
    parser.add_argument(
        "--model", nargs="+", default=list(results.PUBLISHED), metavar="MODEL", dest="models",
        help="timm names, or swin_micro_digits (default: T, S, B, L)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", nargs="+", type=int, default=list(DEFAULT_BATCHES), metavar="N",
        help="images per call, one or more (default: 128)",
    )  # fmt: skip
    parser.add_argument(
        "--int8-mode", type=int, choices=(1, 2), default=1,
        help="2: FC2 and patch merging with 32-bit results (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure also what the config file already holds")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the config file to write (default: see below)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything that was found here too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    need_one_process()
    for batch in args.batch:
        measure.need_positive(argparse.Namespace(batch=batch), "--batch")
    shapes: dict[Shape, None] = {}
    for name in args.models:
        config = config_of_name(name)
        for batch in args.batch:
            shapes.update(dict.fromkeys(gemm_shapes(config, batch, args.int8_mode)))
    need_cuda_engine()
    if args.config is not None:
        os.environ["SWIN_GEMM_CONFIG"] = str(args.config.resolve())
    answers: list[dict[str, Any]] = []

    def keep() -> None:
        if args.json is None:
            return
        with atomic_path(args.json) as path:
            document = {**answers[-1], "shapes": [answer["shapes"][0] for answer in answers]}
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    for index, shape in enumerate(shapes, 1):  # one by one: a killed run keeps what it has
        answer = tune([shape], args.again)
        found = answer["shapes"][0]
        what = f"{found['chosen']} {found['candidate']}, {found['us']:.1f} us" if found["chosen"] else "nothing runs it"
        known = "" if found["tuned"] else " (known)"
        report(f"{index}/{len(shapes)} M={shape.m} N={shape.n} K={shape.k} {shape.output}: {what}{known}")
        answers.append(answer)
        keep()
    last, rows = answers[-1], [answer["shapes"][0] for answer in answers]
    print(f"\nGEMMs on {last['device']} (sm_{last['sm']}), {last['versions']}\n\n{table(rows)}\n")
    if lines := refusals(rows):
        print("Not taken:", *lines, "", sep="\n  ")
    print(f"Config file: {last['config']}" + (f" was NOT written: {last['saved']}" if last["saved"] else ""))
    return 1 if last["saved"] or not all(row["chosen"] for row in rows) else 0


if __name__ == "__main__":
    run_cli(main)

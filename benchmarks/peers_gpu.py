"""The engine beside what else runs a Swin on this GPU: timm eager, torch.compile, torchao, TensorRT, where installed.

Each peer takes turns with both INT8 graphs on the same images, and has a row of Table 2's form under its own name. A
row is written as soon as it is there; what is missing or fails is said and noted in `meta`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python put this folder on the path in the place of the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
import functools
import gc
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyharness import gpu, measure, results
from pyharness.config import GRAPHS
from pyharness.errors import HarnessError, run_cli
from pyharness.reproduce_table2 import add_device_option
from pyharness.results import Table2Row
from pyharness.training import report

DEFAULT_BATCH, DEFAULT_RUNS = 128, 100
WARMUP_CALLS = 3


@dataclass(frozen=True)
class Peer:
    """`build(model, images)`: a call that gives logits, from an fp32 model on the device and images in `dtype`."""

    name: str
    build: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
    dtype: torch.dtype = torch.half
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Packages it needs that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def _eager(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    return model.to(images.dtype)


def _compiled(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.compile(model.to(images.dtype), mode="max-autotune", fullgraph=True)  # CUDA graphs included


def _torchao(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    from torchao import quantization

    config = getattr(quantization, "Int8DynamicActivationInt8WeightConfig", None)
    model = model.to(images.dtype)
    quantization.quantize_(model, config() if config else quantization.int8_dynamic_activation_int8_weight())
    return torch.compile(model, mode="max-autotune")


def _tensorrt(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    import torch_tensorrt

    model = model.to(images.dtype)
    return torch_tensorrt.compile(model, ir="dynamo", inputs=[images], enabled_precisions={images.dtype})


PEERS = {
    "fp32": Peer("timm fp32 eager", _eager, torch.float32),
    "fp16": Peer("timm fp16 eager", _eager),
    "compile": Peer("torch.compile fp16 max-autotune", _compiled),
    "torchao": Peer("torchao int8 dynamic, compiled", _torchao, needs=("torchao",)),
    "tensorrt": Peer("TensorRT fp16", _tensorrt, needs=("torch_tensorrt",)),
}


def sqnr_db(found: Tensor, wanted: Tensor) -> float:
    """Signal to noise of `found` logits against `wanted`. HarnessError where they are not finite."""
    if not found.isfinite().all():
        raise HarnessError("its logits are not finite")
    noise = (found.double() - wanted.double()).square().sum().clamp(min=1e-30)
    return float(10 * torch.log10(wanted.double().square().sum() / noise))


@dataclass
class Bench:
    """One model, batch and device: both INT8 graphs ready, peers timed against them one at a time."""

    model: str
    batch: int
    runs: int
    device: torch.device
    seconds: float | None = None

    def __post_init__(self) -> None:
        from pyharness.engine import SwinInt8
        from pyharness.models import config_of, create_model, exercise
        from pyharness.random_engine import random_engine_file

        self.timm = create_model(self.model)
        exercise(self.timm, seed=0)  # timm's initial weights leave Swin-V2's blocks without effect
        self.config = config_of(self.timm, self.model)
        self.images = measure.random_images(self.config, self.batch).to(self.device)
        self.engines = {
            graph: SwinInt8.from_engine_file(random_engine_file(self.config, graph)).to(self.device) for graph in GRAPHS
        }
        self.timm.to(self.device)

    @torch.inference_mode()
    def row_of(self, peer: Peer, device_name: str) -> tuple[Table2Row, float]:
        """The peer's row, and the SQNR in dB of its logits against fp32's."""
        wanted = self.timm(self.images[:8])
        images = self.images.to(peer.dtype)
        call = peer.build(copy.deepcopy(self.timm), images)
        for _ in range(WARMUP_CALLS):
            logits = call(images)
        quality = sqnr_db(logits[:8], wanted)
        calls = {graph: functools.partial(engine, self.images) for graph, engine in self.engines.items()}
        calls[peer.name] = functools.partial(call, images)
        timing = gpu.timing_of(self.device, self.batch)
        samples = measure.time_alternating(calls, self.runs, limit_s=self.seconds, **timing)
        stats, ratio = measure.summarize(samples[peer.name]), measure.paired_ratio(samples, peer.name, "ft_int8")
        row = Table2Row(
            model=self.model,
            img_size=self.config.img_size[0],
            batch=self.batch,
            device=device_name,
            method=peer.name,
            latency_ms=stats.to_dict(),
            images_per_s=self.batch * 1000 / stats.median,
            vs_ft_int8=ratio.median,
            vs_ft_int8_quartiles=(ratio.q25, ratio.q75),
        )
        return row, quality


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peers_gpu.py", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--models", nargs="+", default=list(results.PUBLISHED), metavar="MODEL", help="timm names (default: T, S, B, L)"
    )
    parser.add_argument(
        "--peers", nargs="+", choices=list(PEERS), default=list(PEERS), help="which of them (default: all installed)"
    )
    add_device_option(parser)
    parser.set_defaults(device="cuda")
    parser.add_argument("--batch", type=int, default=DEFAULT_BATCH, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=DEFAULT_RUNS, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=int, metavar="S", help="begin no round after S seconds of a peer")
    parser.add_argument(
        "--out", type=Path, default=results.ROOT / "results" / "local" / "peers", metavar="DIR",
        help="folder of table2.json, .csv and .md (default: results/local/peers)",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    measure.need_positive(args, "--batch", "--runs", "--seconds")
    device = gpu.use_device(args.device)
    info = gpu.engine_info_on(device)
    peers = [PEERS[key] for key in args.peers]
    left_out = {peer.name: f"not installed: {', '.join(gone)}" for peer in peers if (gone := peer.missing())}
    for name, why in left_out.items():
        report(f"{name}: {why}")
    meta = {**measure.environment(info, torch.get_num_threads()), "left_out": left_out, "sqnr_db": {}}
    meta |= gpu.conditions_on(device, meta["device"])
    rows: list[Table2Row] = []
    for model in args.models:
        bench = Bench(model, args.batch, args.runs, device, args.seconds)
        for peer in (peer for peer in peers if not peer.missing()):
            report(f"{model}: {peer.name}: build, then {args.runs} rounds, batch {args.batch}")
            try:
                row, quality = bench.row_of(peer, meta["device"])
            except Exception as error:  # somebody else's compiler: one peer's failure must not cost the others
                reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
                left_out[f"{model}: {peer.name}"] = f"failed: {type(error).__name__}: {reason}"
                report(f"{model}: {peer.name} failed: {reason}")
            else:
                rows.append(row)
                meta["sqnr_db"][f"{model}: {peer.name}"] = round(quality, 1)
            torch.compiler.reset()
            gc.collect()
            results.write_table(args.out, "table2", meta, rows)
        del bench
        gc.collect()
    print(f"Peers\n\n{results.markdown_table2(results.write_table(args.out, 'table2', meta, rows))}")
    for name, why in left_out.items():
        print(f"{name}: {why}")
    return 0


if __name__ == "__main__":
    run_cli(main)

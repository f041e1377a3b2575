"""This engine beside everybody else who runs a Swin on a CPU, all in alternation in one process.

Peers: timm eager, torch.compile, PT2E int8 (torchao), ONNX Runtime and OpenVINO in floating point and int8. Each
method is checked against timm's fp32 logits before it is timed. Rows are written after each group (model, batch,
threads, instruction set); the same command goes on where a killed run stopped. What is not installed or fails is named
in its row.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python put this folder on the path in the place of the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import cpuid, memory, rows
from benchmarks.peers import isa as isas
from benchmarks.peers.artefacts import version_of
from benchmarks.peers.methods import Built, Method, Setting, all_methods
from benchmarks.peers.rows import PeerRow
from pyharness import measure, results
from pyharness.errors import EngineError, HarnessError, run_cli
from pyharness.export import image_size
from pyharness.reproduce_table2 import add_file_options
from pyharness.training import report

DEFAULT_BATCHES, DEFAULT_RUNS, DEFAULT_SECONDS = (1, 8), 60, 60
PACKAGES = ("torchao", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
CHILD_SECONDS = 1800
SETTLE_MS = 60.0
"""Untimed calls ahead of a timed one, in milliseconds: ONNX Runtime's threads go on spinning for some 40 after its
call (seen on two cores of Zen 5), and with all cores in use the next method runs at half its speed meanwhile."""

LEAST_SQNR_DB = {"fp32": 60.0, "bf16": 20.0, "int8": 10.0}
"""Of a method's logits against the fp32 ones of its model; below it computes something else, and is not timed. Seen:
bf16 43 to 46 dB, int8 31 to 42, but 13 to 22 where NNCF applies SmoothQuant."""


class WrongResult(HarnessError):
    """A method that does not compute the model."""


def check_of(found: Any, wanted: Tensor, precision: str) -> dict[str, float]:
    """SQNR in dB and largest difference of logits `found` [B, K] (any array) against `wanted`. WrongResult where they
    have another shape, are not finite, or are too far off for `precision`."""
    found = torch.as_tensor(found).double()
    if found.shape != wanted.shape:
        raise WrongResult(f"its logits have shape {tuple(found.shape)}, {tuple(wanted.shape)} is needed")
    if not found.isfinite().all():
        raise WrongResult("its logits are not finite")
    noise = (found - wanted.double()).square().sum().clamp(min=1e-30)
    sqnr = float(10 * torch.log10(wanted.double().square().sum() / noise))
    least = LEAST_SQNR_DB[precision]
    if sqnr < least:
        raise WrongResult(f"its logits are at {sqnr:.1f} dB against timm's fp32, at least {least:.0f} dB is needed")
    return {"sqnr_db": round(sqnr, 1), "max_abs": float(f"{(found - wanted).abs().max():.3g}")}


def why(error: BaseException) -> str:
    """An error in one line, for a row."""
    if isinstance(error, HarnessError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"failed: {type(error).__name__}: {' '.join(lines)[:300]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, what others' converters print goes to stderr, and their warnings nowhere."""
    import logging
    import warnings

    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        yield


def setting_of(model: str, batch: int, threads: int, isa: str, work: Path) -> Setting:
    """The model ("NAME", or "NAME@HxW" for another image size), its images and the conditions of one group. ModelError
    where the name is unknown, HarnessError for a size that is none.

    The weights are `models.exercise`'s. Of timm's initial ones a few are a hundred standard deviations off, which no
    scale per tensor survives, and those of Swin-V2 leave its blocks without effect: no check would see them."""
    from pyharness.models import config_of, create_model, exercise

    name, at, size = model.partition("@")
    net = create_model(name, img_size=size_of(size) if at else None)
    exercise(net, seed=0)
    config = config_of(net, name)
    return Setting(model, config, net, measure.random_images(config, batch), threads, isa, work / "peers")


def size_of(text: str) -> tuple[int, int]:
    """Height and width of "800x1344"; HarnessError for anything else."""
    try:
        return image_size(text)
    except argparse.ArgumentTypeError as error:
        raise HarnessError(f"--models: {error}") from None


@dataclasses.dataclass
class Ready:
    """A method's row, still without latency, and what was built for it; `built` None where the row says why not."""

    row: PeerRow
    built: Built | None = None


def prepare(method: Method, setting: Setting, wanted: Tensor, device: str) -> Ready:
    """Build `method` and check what it computes, against `wanted` where it has no logits of its own to be held to; a
    peer's failure becomes the row's reason."""
    row = PeerRow(
        model=setting.name, img_size=setting.config.img_size[0], batch=setting.batch, device=device, method=method.name,
        threads=setting.threads, isa=setting.isa, precision=method.precision,
        side=rows.OURS if method.ours else rows.PEER,
    )  # fmt: skip
    if gone := method.missing():
        return Ready(dataclasses.replace(row, reason=f"not installed: {', '.join(gone)}"))
    started = time.monotonic()
    row = dataclasses.replace(row, version=method.version())
    try:
        with quiet():
            built = method.build(setting)
            logits = built.call()
        logits = logits.float() if isinstance(logits, Tensor) else logits
        own = wanted if built.wanted is None else built.wanted
        check = {**check_of(logits, own, method.precision), **built.details}
    except Exception as error:  # somebody else's compiler: one peer's failure must not cost the others
        if method.ours and not isinstance(error, NotImplementedError):
            raise
        report(f"{method.name}: {why(error)}")
        return Ready(dataclasses.replace(row, reason=why(error)))
    report(f"{method.name}: ready after {time.monotonic() - started:.0f} s, {check['sqnr_db']} dB against fp32")
    row = dataclasses.replace(row, isa_forced=built.isa_forced, model_mb=built.model_mb, check=check)
    return Ready(row, built)


def child_command(ready: Ready, work: Path) -> list[str]:
    """The command that measures a method's memory in a process of its own."""
    assert ready.built is not None
    if ready.built.alone is not None:
        return [sys.executable, "-m", "benchmarks.peers.memory", *ready.built.alone]
    row = ready.row
    return [
        sys.executable, str(Path(__file__).resolve()), "--memory-of", row.method, "--models", row.model,
        "--batch", str(row.batch), "--threads", str(row.threads), "--isa", row.isa, "--work", str(work),
    ]  # fmt: skip


def peak_memory(command: Sequence[str]) -> float | None:
    """What the child process `command` says of itself; None, and a line on stderr, where it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(results.ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHILD_SECONDS, env=environment, cwd=results.ROOT
        )
        return json.loads(done.stdout.splitlines()[-1])["peak_memory_mb"]
    except (subprocess.TimeoutExpired, IndexError, KeyError, ValueError) as error:
        report(f"memory of {' '.join(command[2:5])} not measured: {why(error)}")
        return None


@torch.no_grad()
def measure_group(
    methods: Sequence[Method],
    setting: Setting,
    device: str,
    runs: int,
    seconds: float | None,
    memory_of: Callable[[Ready], float | None] | None = None,
    keep: Callable[[list[PeerRow]], None] = lambda found: None,
) -> list[PeerRow]:
    """Build, check and time `methods` in alternation; memory by `memory_of`, where it is given. `keep` gets the rows as
    soon as there are latencies, before the processes that measure memory."""
    torch.compiler.reset()
    measure.set_threads(setting.threads)
    wanted = setting.model(setting.images)
    ready = [prepare(method, setting, wanted, device) for method in methods]
    calls = {entry.row.method: entry.built.call for entry in ready if entry.built is not None}
    samples: measure.Samples = {}
    if calls:
        report(f"time {len(calls)} methods in turn, at most {runs} rounds")
        samples = measure.time_alternating(calls, runs, settle_ms=SETTLE_MS, limit_s=seconds)
    found = rows.timed_rows([entry.row for entry in ready], samples)
    keep(found)
    if memory_of is not None:
        report("memory of each in a process of its own")
        for index, entry in enumerate(ready):
            if entry.built is not None:
                found[index] = dataclasses.replace(found[index], peak_memory_mb=memory_of(entry))
    return found


# --- the program -----------------------------------------------------------------------------------------------------


def default_threads() -> tuple[int, ...]:
    """One thread, and as many as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return tuple(dict.fromkeys((1, cores)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peers_cpu.py", description=__doc__.split("\n\n")[0],
        epilog="Peers: pip install '.[peers]'. One file holds any number of runs of one commit on one machine.",
    )  # fmt: skip
    what = parser.add_argument_group("what")
    what.add_argument(
        "--models", nargs="+", default=list(results.PUBLISHED), metavar="MODEL",
        help="timm names, weights random (default: T, S, B, L); NAME@HxW: with images of that size",
    )  # fmt: skip
    what.add_argument(
        "--batch", nargs="+", type=int, default=list(DEFAULT_BATCHES), metavar="N",
        help="images per call (default: 1 8)",
    )  # fmt: skip
    what.add_argument(
        "--threads", nargs="+", type=int, default=list(default_threads()), metavar="N",
        help="CPU threads (default: 1, and one for each core)",
    )  # fmt: skip
    what.add_argument(
        "--isa", nargs="+", choices=list(isas.ISAS), default=[isas.NATIVE],
        help="instruction sets to force, where a library can be told (default: %(default)s)",
    )  # fmt: skip
    what.add_argument("--methods", nargs="+", metavar="NAME", help="which (default: all; --methods list prints them)")
    how = parser.add_argument_group("measurement")
    how.add_argument("--runs", type=int, default=DEFAULT_RUNS, metavar="N", help="timed rounds (default: %(default)s)")
    how.add_argument(
        "--seconds", type=int, default=DEFAULT_SECONDS, metavar="S",
        help=f"begin no round after S seconds of a group and {measure.LEAST_ROUNDS} rounds (default: %(default)s)",
    )  # fmt: skip
    how.add_argument("--no-memory", action="store_true", help="do not measure peak memory (a process for each method)")
    how.add_argument(
        "--prepare", action="store_true", help="make and check everything, time nothing, write no rows: for later runs"
    )
    how.add_argument("--fresh", action="store_true", help="begin anew instead of going on from the rows in --out")
    how.add_argument("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    add_file_options(parser, "peers_cpu.json, .csv, .md and the pictures")
    return parser


def methods_of(names: Sequence[str] | None) -> list[Method]:
    """The methods named, in the order of the rows; all for None. HarnessError for an unknown name."""
    known = all_methods()
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise HarnessError(f"--methods: {', '.join(unknown)} unknown; choose from {', '.join(known)}")
    return [method for name, method in known.items() if names is None or name in names]


def check_arguments(args: argparse.Namespace) -> None:
    measure.need_positive(args, "--runs", "--seconds")
    for flag in ("batch", "threads"):
        for value in getattr(args, flag):
            if value < 1:
                raise HarnessError(f"--{flag} must be at least 1, found {value}")


def engine_info_on(isa: str) -> dict[str, str]:
    """What the engine says of itself. EngineError where it has no such instruction set here."""
    from pyharness.engine import engine_info

    try:
        return engine_info()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise EngineError(f"--isa {isa}: {(str(error).splitlines() or [''])[0]}") from None


def inductor_cache(work: Path, isa: str) -> str:
    """Where torch.compile keeps its code: by instruction set and by what its compiler, told -march=native, sees. Its
    own keys tell neither apart."""
    return str((work / "peers" / f"inductor-{isa}{'-cpuid' if cpuid.is_masked() else ''}").resolve())


def run(args: argparse.Namespace, isa: str) -> int:
    """Measure everything asked for on `isa`, in this process."""
    info = engine_info_on(isa)
    methods = methods_of(args.methods)
    meta: dict[str, Any] = {
        **measure.environment(info, max(args.threads)),
        "versions": {package: version_of(package) for package in PACKAGES},
        "runs_of_this_file": [],
    }
    found: list[Mapping[str, Any]] = [] if args.prepare else rows.resumed(args.out, meta, args.fresh)
    before = None if args.fresh else rows.load(args.out)
    this_run = {"date": meta["date"], "command": meta["command"], "isa": isa, "engine_isa": info["isa"]}
    this_run["torch_isa"] = torch.backends.cpu.get_cpu_capability()
    this_run["cpuid_masked"] = cpuid.is_masked()
    meta["runs_of_this_file"] = [*(before["meta"].get("runs_of_this_file", []) if before else []), this_run]
    groups = [(m, b, t) for m in args.models for b in args.batch for t in args.threads]
    for model, batch, threads in groups:
        group = (model, batch, threads, isa)
        if not args.prepare and rows.is_done(found, group, [method.name for method in methods]):
            report(f"{model}, batch {batch}, {threads} threads, {isa}: already there")
            continue
        report(f"{model}, batch {batch}, {threads} threads, {isa}")
        started = time.monotonic()
        setting = setting_of(model, batch, threads, isa, args.work)
        if args.prepare:
            with torch.no_grad():
                torch.compiler.reset()
                measure.set_threads(threads)
                wanted = setting.model(setting.images)
                for method in methods:
                    prepare(method, setting, wanted, meta["device"])
        else:
            memory_of = None if args.no_memory else lambda entry: peak_memory(child_command(entry, args.work))

            def keep(new: list[PeerRow], group: rows.Group = group, so_far: Sequence[Mapping] = tuple(found)) -> None:
                rows.write(args.out, meta, rows.merged(so_far, group, new))

            new = measure_group(methods, setting, meta["device"], args.runs, args.seconds, memory_of, keep)
            keep(new)
            found = rows.merged(found, group, new)
        report(f"{model}, batch {batch}, {threads} threads, {isa}: {time.monotonic() - started:.0f} s")
        del setting
        gc.collect()
    return 0


def finish(out: Path) -> None:
    """Draw the pictures and print the tables of what is in `out`."""
    document = rows.load(out)
    if document is None:
        return
    from benchmarks.peers.plot import plot

    drawn = plot(document, out)
    print(rows.markdown(document))
    print("Written:", ", ".join(str(path) for path in (*sorted(out.glob("peers_cpu.*")), *drawn)))


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    if args.methods == ["list"]:
        for method in all_methods().values():
            gone = ", ".join(method.missing())
            print(f"{method.name:26}{method.precision:6}{f'not installed: {gone}' if gone else method.version()}")
        return 0
    if not args.memory_of:
        methods_of(args.methods)
    started_for = os.environ.get(isas.MARK)
    if started_for in args.isa:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = inductor_cache(args.work, started_for)
        if args.memory_of:
            return memory_child(args, started_for)
        status = run(args, started_for)
        if len(args.isa) == 1 and not args.prepare:
            finish(args.out)
        return status
    if len(args.isa) == 1:
        isas.restart_on(args.isa[0])
    for index, isa in enumerate(args.isa):  # a process for each: libraries read their variables once
        words = [word for word in sys.orig_argv[1:] if word != "--fresh" or index == 0]
        done = subprocess.run([sys.executable, *words], env=isas.environment_for(isa, os.environ))
        if done.returncode:
            return done.returncode
    if not args.prepare:
        finish(args.out)
    return 0


@torch.no_grad()
def memory_child(args: argparse.Namespace, isa: str) -> int:
    """Load and run one method that needs PyTorch, and print its peak memory."""
    (method,) = methods_of([args.memory_of])
    measure.set_threads(args.threads[0])
    with quiet():
        setting = setting_of(args.models[0], args.batch[0], args.threads[0], isa, args.work)
        peak = memory.measure_call(lambda: method.build(setting).call)
    memory.answer(peak)
    return 0


if __name__ == "__main__":
    run_cli(main)

"""Many processes, one program: what `torchrun` starts, seen through a few functions.

Without torchrun, or with one process, every function answers for a world of one and nothing is set up. Tensors on the
CPU travel by gloo; tensors on a GPU by NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyharness.errors import HarnessError

TIMEOUT_SECONDS = 600.0
"""How long a process waits for the others before it gives up; the variable SWIN_DIST_TIMEOUT sets another."""

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PEER_FAILURES = ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out")
"""What a collective's error says where another process is gone; gloo raises a plain RuntimeError."""


def init() -> None:
    """Join the other processes that torchrun started. Does nothing where there are none, or after the first call.

    HarnessError where they cannot be reached, or where an environment variable is not what torchrun sets.
    """
    if dist.is_initialized() or _started() == 1:
        return
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo",
            timeout=timedelta(seconds=_timeout()),
        )
    except (RuntimeError, ValueError) as error:
        raise HarnessError(
            f"process {_from_env('RANK')} of {_from_env('WORLD_SIZE')} cannot join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({_first_line(error)}); start all processes with "
            "the same torchrun command"
        ) from None


def need_one_process() -> None:
    """HarnessError where torchrun started several of a program that does not share its work out: each would do all of
    it, and write the same files."""
    if (processes := _started()) > 1:
        raise HarnessError(
            f"this is one of {processes} processes, and this program takes one alone; start it with python in the "
            "place of torchrun (distill.py, qat.py and evaluate.py take several)"
        )


def _started() -> int:
    """How many processes torchrun started; 1 without it."""
    return _from_env("WORLD_SIZE") if all(name in os.environ for name in _NEEDED) else 1


def rank() -> int:
    """This process's number, 0 to `world_size()` - 1, over all machines."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are, over all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, which alone prints and writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    all_reduce_sum(torch.zeros(1))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Replace `tensor`, in place, by its sum over all processes, and return it. Any shape and dtype, on CPU or GPU."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """`all_reduce_sum` with the greatest of each element."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather_objects(obj: Any) -> list[Any]:
    """Every process's `obj` (picklable), in the order of the processes, on every process."""
    gathered = [obj]
    if dist.is_initialized():
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, obj)
    return gathered


def device_for(name: str) -> torch.device:
    """The device of this process: the CPU, or for "cuda" the GPU of its number on this machine.

    HarnessError where PyTorch finds no GPU, or fewer than the processes on this machine.
    """
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise HarnessError("--device cuda: PyTorch finds no GPU; use --device cpu")
    local = _from_env("LOCAL_RANK") if world_size() > 1 else torch.cuda.current_device()
    if local >= torch.cuda.device_count():
        raise HarnessError(
            f"process {local + 1} of this machine has no GPU: PyTorch finds {torch.cuda.device_count()}; start at most "
            f"as many processes (torchrun --nproc-per-node {torch.cuda.device_count()})"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def session() -> Iterator[None]:
    """`init` at the beginning; at the end, leave the others.

    HarnessError where another process failed, was killed, or did not answer within the timeout. An error of this
    process goes through; the others then see that it is gone.
    """
    init()
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and _is_peer_failure(error):
            raise HarnessError(
                f"process {rank()} of {world_size()}: another process failed, was killed, or did not answer within "
                f"{_timeout():g} s; the message of the process that ended first says why ({_first_line(error)})"
            ) from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_peer_failure(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in _PEER_FAILURES)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _from_env(name: str) -> int:
    text = os.environ.get(name, "0" if name == "LOCAL_RANK" else "")
    if not text.isdigit():
        raise HarnessError(f"{name} must be a number, found {text!r}; torchrun sets it, start the processes with that")
    return int(text)


def _timeout() -> float:
    text = os.environ.get("SWIN_DIST_TIMEOUT", "")
    try:
        seconds = float(text or TIMEOUT_SECONDS)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise HarnessError(f"SWIN_DIST_TIMEOUT must be seconds above 0, found {text!r}")
    return seconds

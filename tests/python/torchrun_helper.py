"""Start several processes as torchrun does, on this machine, and wait for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(arguments: list[str], processes: int, **extra: str) -> list[subprocess.Popen]:
    """One Python process per rank with `arguments`, torchrun's variables set, and one thread each."""
    port = str(free_port())
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    common = {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **extra}
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **common, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started: list[subprocess.Popen], seconds: float = 600) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each process; all are killed where one takes longer than `seconds`."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in started]
        return [(process.returncode, out, err) for process, (out, err) in zip(started, outputs)]
    finally:
        for process in started:
            process.kill()
            process.wait()


def run(arguments: list[str], processes: int, **extra: str) -> list[tuple[int, str, str]]:
    """`start`, then `finish`."""
    return finish(start(arguments, processes, **extra))

"""SIGTERM and SIGINT during long work: noted, so that it ends between two steps with its state whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class StopNoted(Exception):
    """A signal came where work is given up, not finished: during an evaluation."""


class NotedSignals:
    """Inside a `with`, SIGTERM and SIGINT are noted in `noted`; the third ends the process at once.

    Two are not too many: torchrun passes on a Ctrl-C that the terminal has sent to every process already. Outside the
    main thread, where Python allows no handlers, nothing is noted.
    """

    KINDS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.noted: signal.Signals | None = None
        self._before: list[Any] = []

    def __enter__(self) -> NotedSignals:
        self.noted, came = None, []

        def note(number: int, frame: Any) -> None:
            came.append(number)
            if len(came) > 2:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.noted = signal.Signals(number)

        if threading.current_thread() is threading.main_thread():
            self._before = [signal.signal(kind, note) for kind in self.KINDS]
        return self

    def __exit__(self, *error: object) -> None:
        for kind, handler in zip(self.KINDS, self._before):
            signal.signal(kind, handler)
        self._before = []

    def giving_up(self, predict: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
        """`predict`, which raises StopNoted in place of the next batch once a signal is noted."""

        def checked(images: Tensor) -> T:
            if self.noted:
                raise StopNoted
            return predict(images)

        return checked


def ignore_in_reader(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: a process that reads images leaves signals to the one it reads for, which ends
    it in good order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

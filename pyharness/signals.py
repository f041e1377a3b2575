"""SIGTERM and SIGINT during long work: noted, so that it ends between two steps with its state whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader

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


class SignalSafeLoader(DataLoader):
    """A DataLoader whose processes that read images leave SIGINT and SIGTERM to the process they read for, which ends
    them in good order.

    torchrun, systemd and a terminal send a signal to all of a group. A reader that died of it would have PyTorch raise
    in the process that reads, in the middle of a step and with no state written. They end when the loader is done with
    them, within seconds of the process they read for when that is killed, and by its own SIGTERM: where an error's
    traceback still holds the loader, Python ends them by that on its way out, and waits for it.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, worker_init_fn=_leave_signals, **more)

    def __iter__(self) -> Iterator[Any]:
        method = self.multiprocessing_context or multiprocessing
        if self.num_workers and method.get_start_method() != "fork":
            resource_tracker.ensure_running()  # which lets SIGTERM through again, also for processes started after it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # readers begin with it held back
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals(worker: int) -> None:
    """Have this reader end by the SIGTERM of the process it reads for, and by no other's."""
    reads_for = multiprocessing.parent_process().pid

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != reads_for:
            pass
        os._exit(0)  # to PyTorch any other status is a failure

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # where it began as no fork of that process
    threading.Thread(target=wait, daemon=True).start()

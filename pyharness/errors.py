"""The errors a user can cause, and how the command-line programs print them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class HarnessError(Exception):
    """A user's mistake. The message says what was found, what is needed and what to do."""


class ModelError(HarnessError):
    """A model's name is unknown, or its geometry is one that the engine cannot run."""


class CheckpointError(HarnessError):
    """A checkpoint is missing, cut off, unsafe to load, or does not fit the model."""


class CalibrationError(HarnessError):
    """A quantizer has no usable amax: missing, zero, negative, NaN or infinite."""


class FormatError(HarnessError):
    """An engine file, weight list or scale list is not what its header or its position says."""


class DataError(HarnessError):
    """A data set is missing, empty, or not laid out as needed."""


class ClassesError(DataError):
    """A data set has `classes` classes, and the model another number of them."""

    def __init__(self, message: str, classes: int) -> None:
        super().__init__(message)
        self.classes = classes


class EngineError(HarnessError):
    """The compiled engine is missing, does not fit this PyTorch, or refused a call."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a program's `main` and exit: a user's mistake becomes one `error:` line and status 2, never a traceback.

    What stdout cannot encode, as in some files' names, is escaped, as on stderr. Ctrl-C exits with 130. Set
    SWIN_TRACEBACK=1 to see the traceback of a HarnessError.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except HarnessError as error:
        if os.environ.get("SWIN_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    sys.exit(status or 0)


def _leave(status: int) -> NoReturn:
    """`sys.exit`; but a process that torchrun started beside others ends at once. The error still holds what it met on
    its way, the process group among it, and PyTorch has been seen to abort while that was taken apart at the end."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

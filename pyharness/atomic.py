"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyharness.errors import HarnessError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` on success, remove it on any error.

    Missing parent folders are made. The temporary name keeps the suffix, since many writers choose the format by it.
    The content reaches the disk before the rename, so that a power cut leaves the old file or the new one.
    HarnessError where the folder cannot be made or written to, where the disk takes no more, or where the body wrote no
    file.
    """
    target = Path(target)
    make_writable_folder(target)
    temporary = target.with_name(f".tmp-{secrets.token_hex(4)}-{target.name}")
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, target)
    except FileNotFoundError:
        raise HarnessError(f"{target}: nothing was written to it; this is a fault of the program") from None
    except IsADirectoryError:
        raise HarnessError(f"{target} is a folder; a file name is needed") from None
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise HarnessError(
            f"{target} could not be written ({error.strerror}); is the disk full? Make room, or choose another place"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def make_writable_folder(target: Path) -> None:
    """Make the folder that the file `target` is to go to. HarnessError where it cannot be made or written to."""
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"the folder of {target} cannot be made ({error.strerror}); choose another place") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise HarnessError(f"{folder} is not writable; choose another place for {target.name}")


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""One process at a time works on a slide's results: two would write into the same files."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nsam.runtime.errors import BusyError
from nsam.runtime.files import output_errors

_log = logging.getLogger(__name__)

#: What holds a folder's small files so long is a process that was stopped.
_PATIENCE_SECONDS = 30


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a slide's result folder, made where it is missing; a killed process lets go of it.

    What is locked is a file in it that goes again at the end. On Windows nothing is held, nor where the file system has
    no locks, of which the log then warns.

    Raises:
        BusyError: another process holds it.
        OutputError: it cannot be made or written into.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    path = folder / "lock.part"
    with output_errors(path):
        while (held := _locked(path)) is None:
            pass
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(held)


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """`alone`, for what takes a moment: whoever has the folder is waited for, though not for ever."""
    with ExitStack() as stack:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                stack.enter_context(alone(folder))
                break
            except BusyError:
                time.sleep(0.02)
        yield


def _locked(path: Path) -> int | None:
    """The handle of a file that nobody else holds; None where its holder has just removed it.

    Raises:
        BusyError: somebody holds it.
    """
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # writable: NFS gives no exclusive lock on what is not
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # the second, too, by POSIX
        os.close(handle)
        raise BusyError(
            f"`{path.parent}`: another run is writing it; wait for its end, or pass another --out"
        ) from error
    except OSError as error:
        _log.warning("`%s`: cannot be locked (%s); let no two runs write into one --out here", path, error.strerror)
    try:
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except FileNotFoundError:
        pass
    os.close(handle)
    return None

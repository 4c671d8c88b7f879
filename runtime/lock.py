"""One process at a time works on a slide's results, or on a table that runs share: two would write into one file."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path

from nsam.runtime.errors import BusyError
from nsam.runtime.files import output_errors

_log = logging.getLogger(__name__)

#: A table takes a moment, the report of a thousand slides some seconds: what holds it longer is a process that was
#: stopped.
_PATIENCE_SECONDS = 30.0


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a slide's result folder, made where it is missing; a killed process lets go of it.

    On Windows nothing is held, nor where the file system has no locks, of which the log then warns.

    Raises:
        BusyError: another process holds it.
        OutputError: it cannot be made or written into.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / "lock.part"):
        yield


class Turns:
    """A run's turns at a file that others, too, read, change and write."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: the file; what is locked lies beside it.
        """
        self._path = path.with_name(path.name + ".lock.part")
        self._patience = _PATIENCE_SECONDS

    @contextmanager
    def next(self) -> Iterator[None]:
        """Wait until nobody else has it, though not for ever, and not again where that was in vain.

        Raises:
            OutputError: the folder cannot be written into.
        """
        with ExitStack() as stack:
            deadline = time.monotonic() + self._patience
            while True:
                try:
                    stack.enter_context(_held(self._path))
                    break
                except BusyError:
                    if time.monotonic() > deadline:
                        if self._patience:
                            _log.warning("`%s`: another run holds it, and seems to be stopped; going on", self._path)
                        self._patience = 0  # from now on one look
                        break
                    time.sleep(0.02)
            yield


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock file, which goes again at the end; raises as `alone`."""
    if sys.platform == "win32":
        yield
        return
    with output_errors(path):
        while (held := _locked(path)) is None:
            pass
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(held)


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
        _warn(error.strerror)
    try:
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except FileNotFoundError:
        pass
    os.close(handle)
    return None


@lru_cache
def _warn(reason: str) -> None:
    """Once a process, not for each slide."""
    _log.warning("files cannot be locked there (%s); let no two runs write into one --out", reason)

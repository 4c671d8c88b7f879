"""One process at a time works on a slide's results: two would write into the same files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nsam.runtime.errors import OutputError
from nsam.runtime.files import output_errors


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a slide's result folder, made where it is missing; a killed process lets go of it.

    It is the folder itself that is locked, so nothing is left behind. Where system or file system have no such locks
    (Windows, some network drives) nothing is held.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with output_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"`{folder}`: another run is writing it; wait for its end, or pass another --out"
            ) from error
        except OSError:  # no locks here
            pass
        yield
    finally:
        os.close(handle)

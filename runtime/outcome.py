"""What became of a slide: nuclei, or the stage at which it failed and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from nsam.runtime.errors import BusyError, InputError, NsamError, OutputError
from nsam.runtime.inputs import Source


class Outcome(NamedTuple):
    """What became of a slide."""

    source: Source
    nuclei: int | None = None  # None: done before, or failed
    mm2: float = 0.0
    seconds: float = 0.0
    remarks: tuple[str, ...] = ()  # what the user should know about the results
    failure: tuple[str, str] | None = None  # stage and reason


class Failed(Exception):
    """A slide failed at a stage: open, mpp, mask, read, infer, write, or busy where another run is writing it."""

    def __init__(self, stage: str, error: Exception) -> None:
        # Reading and writing go on while the network runs; their errors say so themselves.
        if stage == "infer" and isinstance(error, InputError):
            stage = "read"
        elif isinstance(error, BusyError):
            stage = "busy"
        elif stage == "infer" and isinstance(error, OutputError):
            stage = "write"
        self.stage = stage
        self.reason = str(error)
        if not isinstance(error, NsamError):
            self.reason = f"unexpected: {type(error).__name__}: {error} (run with -v for the traceback)"


@contextmanager
def at(stage: str) -> Iterator[None]:
    """Any error in here is a failure at this stage, unless it is one already."""
    try:
        yield
    except Failed:
        raise
    except Exception as error:
        raise Failed(stage, error) from error

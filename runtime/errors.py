"""What may go wrong that a user can mend. The commands print these as one line; `-v` adds the traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NsamError(Exception):
    """Root of every error with a message for the user.

    The message names the argument or file in backticks, the rule, the value received and the remedy.
    """


class InputError(NsamError):
    """A slide, image, label map or folder that cannot be used as it is."""


class ModelError(NsamError):
    """A model directory, card, checkpoint or engine that does not fit."""


class OutputError(NsamError):
    """Results that cannot be written, or that would overwrite others."""


class BusyError(OutputError):
    """Results that another process is writing."""


class DeviceError(NsamError):
    """A device that was asked for and cannot be had."""


class UnfitError(DeviceError):
    """The device is there, but does not run this precision."""


def first_line(error: Exception) -> str:
    """What a library's error says, without its traceback of native code."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith("Exception from ")]
    return (lines or [type(error).__name__])[0]


def not_imported(name: str, error: ImportError) -> str:
    """What keeps a library away: it is not there, or something that it needs is not."""
    missing = isinstance(error, ModuleNotFoundError)
    return f"{name} is not installed" if missing else f"{name} is broken ({first_line(error)})"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any failure into an InputError: libraries and codecs raise what they like on a damaged file."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(
            f"`{path}`: too little memory for it; tiled 8 bit RGB, in tiles of 512 px or so, needs least"
        ) from error
    except Exception as error:
        raise InputError(
            f"`{path}`: cannot be read, it is damaged, cut off or not an image ({first_line(error)})"
        ) from error

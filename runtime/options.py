"""What the commands share: how they refuse, values that click has no type for, output that any log can take."""

from __future__ import annotations

import io
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import click

from nsam.runtime.errors import NsamError
from nsam.runtime.settings import Device, Precision, Settings


def print_anything() -> None:
    """Escape on stdout and stderr what their encoding lacks: a file's name must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Command(click.Command):
    """A command that what a user can mend ends with one line and exit code 2; `--verbose` adds the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Command`."""
        print_anything()
        try:
            return super().invoke(ctx)
        except NsamError as error:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            raise _Refusal(str(error)) from error


@contextmanager
def brought_by(extra: str) -> Iterator[None]:
    """Tell, of an import that fails, which of nsam's extras brings it.

    Raises:
        NsamError: something is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise NsamError(f"`{error.name}` is not installed; pip install 'nsam[{extra}]'") from error


class _Refusal(click.ClickException):
    exit_code = 2


class NumberRange(click.FloatRange):
    """A range of finite numbers, which click's own leaves for `nan` and `inf`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType`."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail("must be a finite number", param, ctx)
        return number


device_option = click.option(
    "--device",
    type=click.Choice(get_args(Device)),
    default=Settings.device,
    show_default=True,
    help="What runs the network. `auto`: the first of cuda, openvino (faster than cpu) and cpu that can be had.",
)
precision_option = click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default=Settings.precision,
    show_default=True,
    help="Arithmetic of the network. `auto`: the fastest that the device runs and the model's proof covers.",
)

#: µm per px that an image may have, or a network be shown.
SCALE = NumberRange(0.05, 4)


def names_of(allowed: Iterable[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """A callback for names separated by commas, each out of a list: `a, b` -> ("a", "b"); twice counts once."""
    known = tuple(allowed)

    def read(context: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in known:
                raise click.BadParameter(f"`{name}` is none of {', '.join(known)}")
        return names

    return read

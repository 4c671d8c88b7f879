"""Kinds of command-line values that click does not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click


class NameList(click.ParamType):
    """Names separated by commas, each out of a given list: `a, b` -> ("a", "b")."""

    name = "list"

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = tuple(allowed)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """See the class; a name twice counts once."""
        if isinstance(value, tuple):  # converted before
            return value
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        for name in names:
            if name not in self._allowed:
                self.fail(f"`{name}` is none of {', '.join(self._allowed)}", param, ctx)
        return names

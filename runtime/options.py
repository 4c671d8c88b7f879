"""Command-line values that click has no type for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click


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

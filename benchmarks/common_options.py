"""Options that benchmarks share; light, for some of them measure their own start and memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def _writable(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse before the work what could not be written after it."""
    if path and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise click.BadParameter(f"`{path}`: cannot be written; name a file in a folder that is there")
    return path


json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), callback=_writable, help="Write all figures here."
)


def numbers(kind: Callable[[str], Any]) -> Callable[..., tuple[Any, ...] | None]:
    """A callback for positive numbers separated by commas."""

    def read(context: click.Context, option: click.Parameter, text: str | None) -> tuple[Any, ...] | None:
        if text is None:
            return None
        try:
            found = tuple(kind(number) for number in text.split(","))
        except ValueError:
            found = ()
        if not found or not min(found) > 0:  # nan, too
            raise click.BadParameter(f"numbers above 0, separated by commas, are wanted, not `{text}`")
        return found

    return read

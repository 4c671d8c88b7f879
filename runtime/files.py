"""Files that appear whole or not at all, and one line where the system refuses."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nsam.runtime.errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file in one step.

    Raises:
        OutputError: it cannot be written.
    """
    write_bytes(path, printable(text).encode())


def printable(name: str | Path) -> str:
    """A text that UTF-8 can hold; names of files may be none."""
    return str(name).encode(errors="backslashreplace").decode()


def to_json(data: dict[str, Any]) -> str:
    """Text of a JSON file."""
    return json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n"


def write_csv(path: Path, names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a small table in one step: the names of its columns, then its rows.

    Raises:
        OutputError: it cannot be written.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    write_text(path, table.getvalue())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file in one step.

    Raises:
        OutputError: it cannot be written.
    """
    # A name of its own: several runs may share a folder, and with it the files that tell of all of it.
    part = part_of(path.with_name(f"{path.name}.{secrets.token_hex(4)}"))
    with output_errors(path), ExitStack() as cleanup:
        cleanup.callback(part.unlink, missing_ok=True)
        part.write_bytes(content)
        os.replace(part, path)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Tell the system's refusals to write as an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"`{path}`: cannot be written ({error.strerror or error})") from error


def part_of(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(path.name + ".part")

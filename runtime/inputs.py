"""Which slides a run takes, and where each one's results go."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nsam.runtime.errors import InputError
from nsam.runtime.settings import DONE_NAME
from nsam.runtime.slides import EXTENSIONS

#: Many `.dcm` make up one DICOM slide: found in a folder they would count once each, so one has to be named.
_FOUND_IN_FOLDERS = tuple(extension for extension in EXTENSIONS if extension != ".dcm")


def find_slides(inputs: Sequence[str]) -> list[Path]:
    """The slides that files, folders and glob patterns name.

    A folder gives every slide below it, whatever the case of the extension, except hidden ones, DICOM and the
    results of earlier runs.

    Returns:
        Each slide once, in natural order (`s2` before `s10`).

    Raises:
        InputError: one of the inputs does not exist or gives no slide.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        slides = list(_slides_of(text))
        if not slides:
            raise InputError(f"`{text}`: no slide or image in it; supported: {', '.join(_FOUND_IN_FOLDERS)}")
        for path in slides:
            found.setdefault(path.resolve(), path)
    return sorted(found.values(), key=_natural)


def folder_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name of its own for each slide's results: its stem, or more of its path where that is not enough."""
    forms = {
        path: (
            path.stem,
            f"{path.resolve().parent.name}_{path.stem}",
            f"{path.resolve().parent.name}_{path.name}",
            f"{path.stem}_{hashlib.sha256(bytes(path.resolve())).hexdigest()[:12]}",
        )
        for path in paths
    }
    # Case is ignored, as many file systems do.
    uses = Counter(form for names in forms.values() for form in {name.casefold() for name in names})
    return {path: next(name for name in names if uses[name.casefold()] == 1) for path, names in forms.items()}


def _slides_of(text: str) -> Iterator[Path]:
    path = Path(text)
    if path.is_dir():
        yield from _below(path)
    elif path.exists():
        yield path
    elif any(sign in text for sign in "*?["):  # a pattern that the shell did not expand
        for match in map(Path, glob.glob(text, recursive=True)):
            if match.is_dir():
                yield from _below(match)
            elif match.suffix.lower() in EXTENSIONS:
                yield match
    else:
        raise InputError(f"`{text}`: no such file or folder")


def _below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        if DONE_NAME in files:  # results: an overlay is no slide
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(_FOUND_IN_FOLDERS):
                yield Path(root, name)


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if i % 2 else (0, part.casefold()) for i, part in enumerate(parts)]

"""Which slides a run takes, and where each one's results go."""

from __future__ import annotations

import csv
import glob
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nsam.runtime.errors import InputError
from nsam.runtime.settings import DONE_NAME
from nsam.runtime.slides import EXTENSIONS, MPP_RANGE

#: Many `.dcm` make up one DICOM slide: found in a folder they would count once each, so one has to be named.
_FOUND_IN_FOLDERS = tuple(extension for extension in EXTENSIONS if extension != ".dcm")
_MASK_EXTENSIONS = (".png", ".tif", ".tiff")


class Source(NamedTuple):
    """A slide, and what the user says about it."""

    path: Path
    mpp: float | None = None  # µm per level-0 px
    mask: Path | None = None  # an image of where nuclei are wanted; it may be missing


def find_slides(inputs: Sequence[str], mask_dir: Path | None = None) -> list[Source]:
    """The slides that files, folders, glob patterns and tables name.

    A folder gives every slide below it, whatever the case of the extension, except hidden ones, DICOM and the
    results of earlier runs. A table is a `.csv` with the columns `path`, and as wanted `mpp` and `mask`.

    Args:
        inputs: see above.
        mask_dir: a folder with a mask for each slide that has none in a table, named as the slide.

    Returns:
        Each slide once, in natural order (`s2` before `s10`).

    Raises:
        InputError: one of the inputs does not exist, gives no slide, or is a table that is wrong.
    """
    if mask_dir and not mask_dir.is_dir():
        raise InputError(f"`--mask-dir {mask_dir}`: no such folder")
    found: dict[Path, Source] = {}
    for text in inputs:
        sources = (
            list(_read_table(Path(text))) if text.lower().endswith(".csv") else list(map(Source, _slides_of(text)))
        )
        if not sources:
            raise InputError(f"`{text}`: no slide or image in it; supported: {', '.join(_FOUND_IN_FOLDERS)}")
        for source in sources:
            if mask_dir and not source.mask:
                source = source._replace(mask=_mask_in(mask_dir, source.path))
            found.setdefault(source.path.resolve(), source)
    return sorted(found.values(), key=lambda source: _natural(source.path))


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


def _read_table(path: Path) -> Iterator[Source]:
    """Rows of a CSV; paths in it are relative to its own folder."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"`{path}`: the table cannot be read ({getattr(error, 'strerror', None) or error})") from error
    for line, row in enumerate(rows, 2):
        if not row.get("path"):
            raise InputError(
                f"`{path}`, line {line}: no `path`; wanted are the columns path, mpp and mask, with a header"
            )
        mpp = None
        if text := (row.get("mpp") or "").strip():
            try:
                mpp = float(text)
            except ValueError:
                mpp = math.nan
            low, high = MPP_RANGE
            if not low <= mpp <= high:
                raise InputError(f"`{path}`, line {line}: `mpp` must be from {low:g} to {high:g} µm/px, is `{text}`")
        mask = (row.get("mask") or "").strip()
        yield Source(path.parent / row["path"].strip(), mpp, path.parent / mask if mask else None)


def _mask_in(folder: Path, slide: Path) -> Path:
    names = [folder / (slide.stem + extension) for extension in _MASK_EXTENSIONS]
    # One that is missing is told when the slide's turn comes, and costs no other slide.
    return next((path for path in names if path.is_file()), names[0])


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

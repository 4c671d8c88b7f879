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
from functools import cache
from pathlib import Path
from typing import NamedTuple

from nsam.runtime.errors import InputError
from nsam.runtime.results import RUN_NAMES, holds_results, slide_of
from nsam.runtime.settings import BANDS_NAME, DONE_NAME, RESULT_NAMES
from nsam.runtime.slides import EXTENSIONS, MPP_RANGE

#: Many `.dcm` make up one DICOM slide: found in a folder they would count once each, so one has to be named.
_FOUND_IN_FOLDERS = tuple(extension for extension in EXTENSIONS if extension != ".dcm")
_MASK_EXTENSIONS = (".png", ".tif", ".tiff")
_UNSAID = (None, None)  # mpp and mask
#: Bytes, of all usual file systems; and how many of a slide's name are kept where it would be too long.
_LONGEST_NAME, _KEPT_OF_NAME = 255, 200


class Source(NamedTuple):
    """A slide, and what the user says about it."""

    path: Path
    mpp: float | None = None  # µm per level-0 px
    mask: Path | None = None  # an image of where nuclei are wanted; it may be missing

    @property
    def real_path(self) -> str:
        """Where it lies, links followed; unlike `Path.resolve` never an error."""
        return os.path.realpath(self.path)

    @property
    def size(self) -> int:
        """Bytes of the file, without opening it; 0 where there is none."""
        return os.path.getsize(self.path) if os.path.exists(self.path) else 0

    @property
    def modified_ns(self) -> int:
        """When the file was last written, ns since 1970; 0 where there is none."""
        return self.path.stat().st_mtime_ns if os.path.exists(self.path) else 0


def find_slides(inputs: Sequence[str], mask_dir: Path | None = None) -> list[Source]:
    """The slides that files, folders, glob patterns and tables name.

    A folder gives every slide below it, whatever the case of the extension, except hidden ones, DICOM, the results of
    earlier runs, thumbnails of QuPath projects and the parts of `.vms` slides; links to folders are followed. A table
    is a `.csv` with the columns `path`, and as wanted `mpp` and `mask`; what it says of a slide holds, however else
    that is named.

    Args:
        inputs: see above.
        mask_dir: a folder with a mask for each slide that has none in a table, named as the slide.

    Returns:
        Each slide once, in natural order (`s2` before `s10`).

    Raises:
        InputError: one of the inputs does not exist, cannot be looked into, gives no slide, or is a table that is
            wrong.
    """
    if mask_dir and not mask_dir.is_dir():
        raise InputError(f"`--mask-dir {mask_dir}`: no such folder")
    found: dict[str, Source] = {}
    for text in inputs:
        try:
            sources = (
                list(_read_table(Path(text))) if text.lower().endswith(".csv") else list(map(Source, _slides_of(text)))
            )
        except OSError as error:
            raise InputError(f"`{error.filename or text}`: cannot be read ({error.strerror})") from error
        if not sources:
            raise InputError(f"`{text}`: no slide or image in it; supported: {', '.join(_FOUND_IN_FOLDERS)}")
        for source in sources:
            key = source.real_path
            before = found.get(key)
            if before and _UNSAID not in (before[1:], source[1:]) and before != source:
                raise InputError(f"`{source.path}`: is in the table twice, with another mpp or mask; keep one line")
            if not before or before[1:] == _UNSAID != source[1:]:
                found[key] = source
    if mask_dir:
        found = _with_masks(found, mask_dir)
    return sorted(found.values(), key=lambda source: _natural(source.path))


def _with_masks(found: dict[str, Source], folder: Path) -> dict[str, Source]:
    """The slides with their masks, and without those that are masks of others.

    Raises:
        InputError: a mask would be that of two slides.
    """
    masked = {key: s if s.mask else s._replace(mask=_mask_in(folder, s.path)) for key, s in found.items()}
    masks = {key: os.path.realpath(s.mask) for key, s in masked.items() if s.mask}
    of_others = {mask for key, mask in masks.items() if mask != key}
    kept = {key: s for key, s in masked.items() if key not in of_others}
    users: dict[Path, Path] = {}
    for key, source in kept.items():
        if source.mask and not found[key].mask and source.mask.is_file():
            twin = users.setdefault(source.mask, source.path)
            if twin != source.path:
                raise InputError(
                    f"`{source.mask}`: is named as `{twin}` and as `{source.path}`; give both masks in a table"
                )
    return kept


def folder_names(paths: Sequence[Path], out: Path) -> dict[Path, str]:
    """A name of its own below `out` for each slide's results: its stem, or more of its path where that is not enough.

    None is that of a folder in which a slide lies: results would hide it from the next run. Where an earlier run has
    put a slide's results they stay, and no other slide's go there as long as that slide exists.
    """
    real = {path: Path(os.path.realpath(path)) for path in paths}
    homes = {path.parent for path in real.values()}
    forms = {
        path: (
            path.stem,
            f"{file.parent.name}_{path.stem}",
            f"{file.parent.name}_{path.name}",
            f"{_cut(path.stem)}_{hashlib.sha256(bytes(file)).hexdigest()[:12]}",
        )
        for path, file in real.items()
    }
    # Case is ignored, as many file systems do.
    uses = Counter(form for names in forms.values() for form in {name.casefold() for name in names})

    there = {name.casefold() for name in os.listdir(out)} if out.is_dir() else set()

    @cache
    def owner(name: str) -> str:
        return slide_of(out / name) if name.casefold() in there else ""

    def fits(name: str) -> bool:
        if name.casefold() in RUN_NAMES or len(os.fsencode(name)) > _LONGEST_NAME:
            return False
        free = not os.path.exists(owner(name))
        return free and uses[name.casefold()] == 1 and Path(os.path.realpath(out / name)) not in homes

    def name_of(path: Path) -> str:
        kept = (name for name in forms[path] if owner(name) == str(real[path]))
        return next(kept, None) or next(filter(fits, forms[path]))

    return {path: name_of(path) for path in paths}


def _cut(stem: str) -> str:
    return os.fsencode(stem)[:_KEPT_OF_NAME].decode(errors="ignore")


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
            elif match.suffix.lower() in EXTENSIONS and not _is_result(match):
                yield match
    else:
        raise InputError(f"`{text}`: no such file or folder")


def _read_table(path: Path) -> Iterator[Source]:
    """Rows of a CSV; paths in it are relative to its own folder."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            head = stream.readline()
            stream.seek(0)
            # Where the comma is the decimal sign, spreadsheets put semicolons between the columns.
            semicolons = ";" in head and "," not in head
            reader = csv.DictReader(stream, strict=True, delimiter=";" if semicolons else ",")
            reader.fieldnames = [name.strip().casefold() for name in reader.fieldnames or ()]
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnicodeDecodeError):
            reason = "its text is not UTF-8; save it as `CSV UTF-8`"
        raise InputError(f"`{path}`: the table cannot be read ({reason})") from error
    for line, row in rows:
        if None in row:
            raise InputError(
                f"`{path}`, line {line}: more fields than columns; a decimal comma? Quote it, or use a point"
            )
        if not row.get("path") or "\0" in row["path"]:
            raise InputError(
                f"`{path}`, line {line}: no `path`; wanted are the columns path, mpp and mask, with a header"
            )
        mpp = None
        if text := (row.get("mpp") or "").strip():
            try:
                mpp = float(text.replace(",", ".") if semicolons else text)
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


def _is_result(path: Path) -> bool:
    return path.name in RESULT_NAMES and holds_results(path.parent)


def _below(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        # A link back, or results: an overlay is no slide.
        ours = (DONE_NAME in files or BANDS_NAME in folders) and holds_results(Path(root))
        if real in seen or ours:
            folders.clear()
            continue
        seen.add(real)
        # Nor are the thumbnails in the `data` of a QuPath project.
        hidden = "data" if any(name.endswith(".qpproj") for name in files) else ""
        folders[:] = [name for name in folders if not name.startswith(".") and name != hidden]
        # Hamamatsu's slides of JPEG: their parts, map and macro image are called as they are, and more.
        stems = [Path(name).stem for name in files if name.lower().endswith((".vms", ".vmu"))]
        parts = tuple(stem + sign for stem in stems for sign in ".(_")
        for name in files:
            if name.startswith(".") or not name.lower().endswith(_FOUND_IN_FOLDERS):
                continue
            if not (name.lower().endswith(".jpg") and name.startswith(parts)):
                yield Path(root, name)


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if i % 2 else (0, part.casefold()) for i, part in enumerate(parts)]

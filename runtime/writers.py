"""Results of a slide, written while it is segmented; every file is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from nsam.runtime.canvas import Strip
from nsam.runtime.errors import OutputError
from nsam.runtime.settings import DONE_NAME, OUTPUTS
from nsam.runtime.sinks import Add, csv_sink, geojson_sink, overlay_sink
from nsam.runtime.slides import Slide

_TILE_PX = 512
_UM_PER_CM = 10000.0


def write_results(strips: Iterable[Strip], slide: Slide, mpp: float, folder: Path, outputs: Sequence[str]) -> int:
    """Write a slide's results while its strips come in, and move them into place at the end.

    Earlier results stay until then. `slide.json`, which says that results are complete, is removed before the
    first file is moved; to write it anew is the caller's part.

    Args:
        strips: of the whole slide; consumed once.
        slide: the slide itself, for its size, its name and the overlay's background.
        mpp: µm per level-0 px.
        folder: made if need be.
        outputs: keys of `settings.OUTPUTS`.

    Returns:
        The number of nuclei.

    Raises:
        OutputError: disk full, no permission and the like.
        Exception: whatever `strips` raises. Nothing half-written is left in either case.
    """
    parts = {name: _part(folder / OUTPUTS[name]) for name in outputs}
    sinks: dict[str, Callable[[Path], AbstractContextManager[Add]]] = {
        "geojson": lambda path: geojson_sink(path, slide.path.name),
        "csv": lambda path: csv_sink(path, mpp),
        "overlay": lambda path: overlay_sink(path, slide),
    }
    nuclei = 0

    def feed(adds: Sequence[Add]) -> Iterator[Strip]:
        nonlocal nuclei
        for strip in strips:
            for nucleus in strip.nuclei:
                ring = nucleus.ring_xy()
                for add in adds:
                    add(nucleus, ring)
            nuclei += len(strip.nuclei)
            yield strip

    with output_errors(folder), ExitStack() as cleanup:
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts.values():
            cleanup.callback(part.unlink, missing_ok=True)
        with ExitStack() as files:
            fed = feed([files.enter_context(sinks[name](parts[name])) for name in outputs if name in sinks])
            if "labels" in parts:
                _write_labels(parts["labels"], fed, slide.size_wh, mpp)
            else:
                for _ in fed:
                    pass
        (folder / DONE_NAME).unlink(missing_ok=True)
        for name, part in parts.items():
            os.replace(part, folder / OUTPUTS[name])
    return nuclei


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file in one step.

    Raises:
        OutputError: it cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step.

    Raises:
        OutputError: it cannot be written.
    """
    part = _part(path)
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


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _write_labels(path: Path, strips: Iterator[Strip], size_wh: tuple[int, int], mpp: float) -> None:
    """Label image as tiled TIFF, int32; pulls the strips as it needs them."""
    width, height = size_wh
    # Offsets of a classic TIFF end at 4 GB, those of some readers at 2.
    with tifffile.TiffWriter(path, bigtiff=width * height * 4 > 2**31) as tif:
        tif.write(
            _label_tiles(strips, width),
            shape=(height, width),
            dtype=np.int32,
            tile=(_TILE_PX, _TILE_PX),
            compression="zlib",
            # More would pull the strips ahead, and their cores are the network's.
            maxworkers=1,
            photometric="minisblack",
            resolution=(_UM_PER_CM / mpp, _UM_PER_CM / mpp),
            resolutionunit="CENTIMETER",
            metadata=None,
        )


def _label_tiles(strips: Iterator[Strip], width: int) -> Iterator[NDArray[np.int32]]:
    """Strips of any height -> tiles, row by row; those at the right and lower edge are smaller."""
    band = np.empty((_TILE_PX, width), np.int32)
    filled = 0
    for strip in strips:
        start = 0
        while start < len(strip.labels):
            rows = strip.labels[start : start + _TILE_PX - filled]
            band[filled : filled + len(rows)] = rows
            start, filled = start + len(rows), filled + len(rows)
            if filled == _TILE_PX:
                yield from _cut(band)
                filled = 0
    if filled:
        yield from _cut(band[:filled])


def _cut(band: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    for x in range(0, band.shape[1], _TILE_PX):
        yield band[:, x : x + _TILE_PX]

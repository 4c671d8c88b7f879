"""Label images as TIFF: tiled and compressed, flat or as an OME pyramid."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from nsam.runtime.canvas import Strip

_TILE_PX = 512
_UM_PER_CM = 10000.0
#: Offsets of a classic TIFF end at 4 GB, those of some readers at 2.
_CLASSIC_BYTES = 2**31
_REDUCTION = 4  # a level of the pyramid against the one above: as in scanners' files, and half the passes of 2
_FORMAT: dict[str, Any] = {
    "dtype": np.int32,
    "tile": (_TILE_PX, _TILE_PX),
    "compression": "zlib",
    "photometric": "minisblack",
    "maxworkers": 1,  # more would pull the strips ahead, and their cores are the network's
}


def write_labels(path: Path, strips: Iterator[Strip], size_wh: tuple[int, int], mpp: float) -> None:
    """Label image, int32; pulls the strips as it needs them.

    Args:
        path: to write.
        strips: of the whole slide.
        size_wh: the slide's width and height, level-0 px.
        mpp: µm per level-0 px, for the resolution tags.
    """
    width, height = size_wh
    with tifffile.TiffWriter(path, bigtiff=_big(size_wh)) as tif:
        tif.write(_tiles(strips, width), shape=(height, width), metadata=None, **_resolution(mpp), **_FORMAT)


def write_pyramid(path: Path, labels: Path, mpp: float, name: str) -> None:
    """OME-TIFF with the label image in full and at 1/4, 1/16, … down to one tile.

    The full image is copied tile by tile as it is compressed, and read once more for each level; a level takes each
    fourth pixel of each fourth row (labels have no mean). Memory: a row of tiles.

    Args:
        path: to write.
        labels: what `write_labels` wrote.
        mpp: µm per level-0 px.
        name: of the image.
    """
    with tifffile.TiffFile(labels) as source:
        page = source.pages.first
        assert isinstance(page, tifffile.TiffPage)
        height, width = page.shape
        steps = [1]
        while max(width, height) > steps[-1] * _TILE_PX:
            steps.append(steps[-1] * _REDUCTION)
        metadata = {
            "axes": "YX",
            "Name": name,
            "PhysicalSizeX": mpp,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": mpp,
            "PhysicalSizeYUnit": "µm",
            "UUID": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"nsam#{name}")),
        }
        with tifffile.TiffWriter(path, bigtiff=_big((width, height)), ome=True) as tif:
            for step in steps:
                shape = -(-height // step), -(-width // step)
                tif.write(
                    _encoded(source, page) if step == 1 else _reduced(page, step, shape),
                    shape=shape,
                    subifds=len(steps) - 1 if step == 1 else None,
                    subfiletype=int(step > 1),
                    metadata=metadata if step == 1 else None,
                    **_resolution(mpp * step),
                    **_FORMAT,
                )


def _big(size_wh: tuple[int, int]) -> bool:
    return size_wh[0] * size_wh[1] * 4 > _CLASSIC_BYTES


def _resolution(mpp: float) -> dict[str, Any]:
    return {"resolution": (_UM_PER_CM / mpp, _UM_PER_CM / mpp), "resolutionunit": "CENTIMETER"}


def _tiles(strips: Iterator[Strip], width: int) -> Iterator[NDArray[np.int32]]:
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


def _encoded(source: tifffile.TiffFile, page: tifffile.TiffPage) -> Iterator[bytes]:
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        source.filehandle.seek(offset)
        yield source.filehandle.read(count)


def _reduced(page: tifffile.TiffPage, step: int, shape: tuple[int, int]) -> Iterator[NDArray[np.int32]]:
    """Tiles of the image whose px are each `step`th of the page's along both axes, the middle one of its cell."""
    band = np.empty((_TILE_PX, shape[1]), np.int32)
    shown_y, shown_x = (
        np.minimum(np.arange(count) * step + step // 2, size - 1)
        for count, size in zip(shape, (page.imagelength, page.imagewidth), strict=True)
    )
    for top in range(0, shape[0], _TILE_PX):
        rows = min(_TILE_PX, shape[0] - top)
        for tile, (y, x) in _decoded(page, top * step, (top + rows) * step):
            rows_in, columns_in = (
                slice(*np.searchsorted(shown, (start, start + length)))
                for shown, start, length in ((shown_y, y, tile.shape[0]), (shown_x, x, tile.shape[1]))
            )
            part = tile[np.ix_(shown_y[rows_in] - y, shown_x[columns_in] - x)]
            band[rows_in.start - top : rows_in.stop - top, columns_in] = part
        yield from _cut(band[:rows])


def _decoded(page: tifffile.TiffPage, y0: int, y1: int) -> Iterator[tuple[NDArray[np.int32], tuple[int, int]]]:
    """Tiles that hold rows from `y0`, a tile's first, to `y1`, with the place of their first pixel."""
    across = -(-page.imagewidth // _TILE_PX)
    first, last = y0 // _TILE_PX * across, min(-(-y1 // _TILE_PX) * across, len(page.dataoffsets))
    handle = page.parent.filehandle
    for index in range(first, last):
        handle.seek(page.dataoffsets[index])
        data, place, _ = page.decode(handle.read(page.databytecounts[index]), index)
        assert isinstance(data, np.ndarray)
        y, x = place[2], place[3]
        yield data[0, : page.imagelength - y, : page.imagewidth - x, 0], (y, x)


def _cut(band: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    for x in range(0, band.shape[1], _TILE_PX):
        yield band[:, x : x + _TILE_PX]

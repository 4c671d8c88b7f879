"""Slides and TIFFs behind `slides.open_slide`, by OpenSlide and tifffile, each with its own metadata."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray

from nsam.runtime.errors import InputError, reading
from nsam.runtime.images import load_image
from nsam.runtime.pixels import on_white, to_rgb8
from nsam.runtime.scales import openslide_mpp, tiff_mpp
from nsam.runtime.slides import ArraySlide, Slide
from nsam.runtime.tiles import Box

#: Pieces of a slide kept decoded, for neighbouring tiles of the network share them: 50 MB at 512 px, 200 at 4096.
_PIECES_KEPT, _LEAST_KEPT, _BYTES_KEPT = 64, 4, 200_000_000
#: Side of the lattice on which OpenSlide's lower levels are read.
_LATTICE_PX = 512


class OpenSlideSlide(Slide):
    """A scanner's file, by OpenSlide; transparent parts are white."""

    def __init__(self, path: Path) -> None:
        """Open the file; raises InputError when it is damaged."""
        with reading(path):
            self._slide = openslide.OpenSlide(path)
            self.level_whs = list(self._slide.level_dimensions)
            properties = self._slide.properties
            mpp = openslide_mpp(properties)
            x, y, width, height = (
                int(properties.get(f"openslide.bounds-{n}", 0)) for n in ("x", "y", "width", "height")
            )
            self.origin_xy = (x, y)
            self.scanned_wh = (width, height) if width > 0 and height > 0 else None
        self.path = path
        self.mpp, self.mpp_source = mpp
        self._piece = _kept(self._read_piece, _LATTICE_PX**2)

    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        if level == 0:
            return self._read(0, (x, y), (width, height))
        # OpenSlide takes level-0 positions: a level's px mostly lie between two of them and are then blurred,
        # each start by another fraction. One lattice gives a pixel the same value whichever region asks.
        box = Box(x, y, x + width, y + height)
        return _assembled(partial(self._piece, level), (_LATTICE_PX, _LATTICE_PX), box)

    def close(self) -> None:
        self._slide.close()
        self._piece.cache_clear()

    def _read_piece(self, level: int, column: int, row: int) -> NDArray[np.uint8]:
        x, y = column * _LATTICE_PX, row * _LATTICE_PX
        width, height = self.level_whs[level]
        down = self._slide.level_downsamples[level]
        size = (min(_LATTICE_PX, width - x), min(_LATTICE_PX, height - y))
        return self._read(level, (round(x * down), round(y * down)), size)

    def _read(self, level: int, level0_xy: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        with reading(self.path):
            rgba = np.asarray(self._slide.read_region(level0_xy, level, size))
        return on_white(rgba[..., :3], rgba[..., 3:])


class TiffSlide(Slide):
    """A tiled TIFF of 8 bits, with or without pyramid; only the tiles asked for are decoded."""

    def __init__(self, path: Path, tif: tifffile.TiffFile, pages: Sequence[Any], mpp: tuple[float | None, str]) -> None:
        self.path = path
        self.mpp, self.mpp_source = mpp
        self.level_whs = [(page.imagewidth, page.imagelength) for page in pages]
        self._tif, self._pages = tif, pages
        self._lock = Lock()
        self._piece = _kept(self._decode, max(page.tilewidth * page.tilelength for page in pages))

    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        page = self._pages[level]
        box = Box(x, y, x + width, y + height)
        return _assembled(partial(self._piece, level), (page.tilewidth, page.tilelength), box)

    def close(self) -> None:
        self._tif.close()
        self._piece.cache_clear()

    def _decode(self, level: int, column: int, row: int) -> NDArray[np.uint8]:
        page = self._pages[level]
        index = row * math.ceil(page.imagewidth / page.tilewidth) + column
        if page.databytecounts[index] == 0:  # left out by the writer: glass
            return np.full((page.tilelength, page.tilewidth, 3), 255, np.uint8)
        with reading(self.path):
            with self._lock:
                self._tif.filehandle.seek(page.dataoffsets[index])
                data = self._tif.filehandle.read(page.databytecounts[index])
            tile = page.decode(data, index, jpegtables=page.jpegtables)[0][0]
        return _rgb(page, tile, self.path)


def openslide_vendor(path: Path) -> str | None:
    """OpenSlide's name of the file's format, or None; `generic-tiff`: a tiled TIFF of no scanner."""
    vendor: str | None = openslide.OpenSlide.detect_format(path)
    return vendor


def open_tiff(path: Path) -> Slide:
    """A TIFF or OME-TIFF of one plane; of several images the largest, for the others are previews and labels of it.

    Tiles of 8 bits are read piecewise, everything else is held in memory. Pixels stay as they are stored, whatever the
    tag of orientation says, as in QuPath.

    Raises:
        InputError: damaged, cut off, several planes, or pixels that `to_rgb8` refuses.
    """
    with reading(path), ExitStack() as stack:
        # Its OME metadata may speak of other files, whose pixels are not this one's.
        tif = stack.enter_context(tifffile.TiffFile(path, _multifile=False))
        if not tif.series:
            raise InputError(f"`{path}`: no image in it; the file is damaged or cut off")
        largest = max(tif.series, key=lambda series: series.keyframe.imagewidth * series.keyframe.imagelength)
        if largest.axes not in ("YX", "YXS", "SYX"):
            raise InputError(f"`{path}`: one plane of grey or RGB is wanted, its axes are {largest.axes}")
        pages = [level.keyframe for level in largest.levels]
        ends = (o + n for page in pages for o, n in zip(page.dataoffsets, page.databytecounts, strict=True))
        if max(ends) > tif.filehandle.size:
            raise InputError(f"`{path}`: the file is cut off, pixels are missing; copy it again")
        mpp = tiff_mpp(tif, pages[0])
        # Of 16 bits the brightest pixel decides how many count, so they are read whole.
        if all(page.is_tiled and page.dtype == np.uint8 and page.axes != "SYX" and _is_plain(page) for page in pages):
            if any(len(page.databytecounts) != math.prod(page.chunked) for page in pages):
                raise InputError(f"`{path}`: its size and its number of tiles disagree; the file is damaged")
            stack.pop_all()  # the slide closes the file
            return TiffSlide(path, tif, pages, mpp)
        return ArraySlide(_whole_page(path, pages[0]), path, *mpp)


def _kept(read: Callable[[int, int, int], NDArray[np.uint8]], px: int) -> Any:
    """`read`, which gives RGB pieces of so many px, with the latest of them kept."""
    return lru_cache(max(_LEAST_KEPT, min(_PIECES_KEPT, _BYTES_KEPT // (3 * px))))(read)


def _assembled(
    piece: Callable[[int, int], NDArray[np.uint8]], piece_wh: tuple[int, int], box: Box
) -> NDArray[np.uint8]:
    """The px of a box, put together from the pieces (column, row) of a lattice."""
    region = np.empty((box.height, box.width, 3), np.uint8)
    piece_w, piece_h = piece_wh
    for row in range(box.y0 // piece_h, math.ceil(box.y1 / piece_h)):
        for column in range(box.x0 // piece_w, math.ceil(box.x1 / piece_w)):
            left, top = column * piece_w, row * piece_h
            x0, x1 = max(box.x0, left), min(box.x1, left + piece_w)
            y0, y1 = max(box.y0, top), min(box.y1, top + piece_h)
            part = piece(column, row)[y0 - top : y1 - top, x0 - left : x1 - left]
            region[y0 - box.y0 : y1 - box.y0, x0 - box.x0 : x1 - box.x0] = part
    return region


def _is_plain(page: Any) -> bool:
    """Whether tifffile decodes the page to grey or RGB, perhaps with alpha."""
    jpeg = page.photometric == tifffile.PHOTOMETRIC.YCBCR and page.compression == tifffile.COMPRESSION.JPEG
    plain = page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.MINISBLACK)
    return bool(plain or (jpeg and page.samplesperpixel == 3))


def _rgb(page: Any, pixels: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    """Samples of a plain page, or of a part of it, as (H, W, 3) uint8 RGB."""
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    if page.extrasamples and page.extrasamples[0] == tifffile.EXTRASAMPLE.UNSPECIFIED:
        pixels = pixels[..., : -len(page.extrasamples)]  # not alpha
    bits = page.bitspersample
    return to_rgb8(pixels, str(path), bits if isinstance(bits, int) else None)


def _whole_page(path: Path, page: Any) -> NDArray[np.uint8]:
    """A page as (H, W, 3) uint8 RGB."""
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
        return to_rgb8(np.moveaxis(page.colormap[:, page.asarray()] >> 8, 0, -1).astype(np.uint8), str(path))
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and page.samplesperpixel == 1 and page.dtype.kind in "bu":
        samples = page.asarray()
        return _rgb(page, ~samples if samples.dtype == np.bool_ else 2**page.bitspersample - 1 - samples, path)
    if _is_plain(page):
        return _rgb(page, page.asarray(), path)
    coding = f"its coding, {page.photometric.name} by {page.compression.name}"
    try:
        pixels = load_image(path, ("TIFF",))  # Pillow knows CMYK and others, of 8 bits
    except InputError as error:
        raise InputError(f"{error}; or {coding}, is not known: save it as 8 bit RGB") from error
    if pixels.shape[:2] != (page.imagelength, page.imagewidth):  # it was turned, or another image comes first
        raise InputError(f"`{path}`: {coding}, is not known in such a file; save it as 8 bit RGB")
    return pixels

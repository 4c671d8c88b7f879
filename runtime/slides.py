"""Slides: one narrow protocol over OpenSlide, TIFF and plain images, read at the network's scale."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nsam.runtime.errors import InputError
from nsam.runtime.tiles import Box, Grid

#: What OpenSlide reads, one file naming the slide; `.dcm` is any one file of a DICOM slide.
VENDOR_EXTENSIONS = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms", ".vmu", ".czi", ".dcm")
TIFF_EXTENSIONS = (".tif", ".tiff")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg")
EXTENSIONS = (*VENDOR_EXTENSIONS, *TIFF_EXTENSIONS, *IMAGE_EXTENSIONS)

#: µm per level-0 px that can be meant: from oil immersion to a loupe.
MPP_RANGE = (0.1, 2.0)

#: Longer side of the overview that pictures are drawn on.
OVERVIEW_PX = 2048
#: Level px that one step of `read_overview` may read, along one axis; 4096² RGB are 50 MB.
_OVERVIEW_STEP_PX = 4096


class Slide(Protocol):
    """A slide or image. Levels go from full resolution down, each with px of its own."""

    path: Path
    mpp: float | None  # µm per level-0 px from the metadata
    mpp_source: str  # what the metadata say; when `mpp` is None, why it is
    level_whs: list[tuple[int, int]]  # (width, height) of each level
    #: Where the scanned part begins, level-0 px. QuPath shows only that part, and counts from its corner.
    origin_xy: tuple[int, int] = (0, 0)
    #: Width and height of the scanned part, level-0 px, where the file says that it is less than the canvas.
    scanned_wh: tuple[int, int] | None = None

    def __hash__(self) -> int:
        return id(self)

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height in level-0 px."""
        return self.level_whs[0]

    @property
    def level_downsamples(self) -> list[float]:
        """Level-0 px per px of each level, the mean of both axes."""
        width, height = self.size_wh
        return [(width / w + height / h) / 2 for w, h in self.level_whs]

    @abstractmethod
    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Pixels of a rectangle that lies inside the level, in that level's px: (height, width, 3) uint8 RGB.

        Raises:
            InputError: the file is damaged there.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ArraySlide(Slide):
    """An image in memory: (H, W, 3) uint8 RGB, one level."""

    def __init__(
        self, image: NDArray[np.uint8], path: Path, mpp: float | None = None, mpp_source: str = "the caller"
    ) -> None:
        self.path, self.mpp, self.mpp_source = path, mpp, mpp_source
        self.level_whs = [(image.shape[1], image.shape[0])]
        self._image = image

    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        return self._image[y : y + height, x : x + width]

    def close(self) -> None:
        del self._image


def open_slide(path: Path) -> Slide:
    """Open whatever OpenSlide, tifffile (TIFF) or Pillow (PNG, JPEG) reads.

    A file's content decides, not its name; but a scanner's file that OpenSlide does not recognise is refused
    rather than taken for a plain image: without its companions an `.mrxs`, say, is a JPEG of the thumbnail.

    Raises:
        InputError: no such file, a folder, empty, damaged, or of a kind that is not supported.
    """
    if path.is_dir():
        raise InputError(f"`{path}`: a slide is wanted, this is a folder")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"`{path}`: cannot be read ({error.strerror})") from error
    if size == 0:
        raise InputError(f"`{path}`: the file is empty (0 bytes)")
    # Imported here: the readers build on this module.
    from nsam.runtime import images, readers

    suffix = path.suffix.lower()
    vendor = readers.openslide_vendor(path)
    # tifffile rather than OpenSlide: it knows OME metadata and 16 bits.
    if vendor == "generic-tiff" or (vendor is None and suffix in TIFF_EXTENSIONS):
        return readers.open_tiff(path)
    if vendor is not None:
        return readers.OpenSlideSlide(path)
    if suffix in IMAGE_EXTENSIONS:
        return images.open_image(path)
    if suffix in VENDOR_EXTENSIONS:
        raise InputError(f"`{path}`: OpenSlide finds no slide in it; the file is damaged, cut off or something else")
    raise InputError(f"`{path}`: not a slide or image that is supported ({', '.join(EXTENSIONS)})")


def checked_mpp(xy: tuple[float, float], source: str) -> tuple[float | None, str]:
    """The mpp and its source if metadata can be trusted with it, else None and the reason.

    Args:
        xy: µm per px along x and y.
        source: which metadata say so.
    """
    x, y = xy
    if abs(x - y) > 0.02 * min(x, y):
        return None, f"its mpp differs between x ({x:.4g}) and y ({y:.4g}) in {source}"
    low, high = MPP_RANGE
    if not low <= x <= high:
        return None, f"its mpp of {x:.4g} in {source} is not from {low:g} to {high:g}"
    return (x + y) / 2, source


def read_input(slide: Slide, box: Box, grid: Grid) -> NDArray[np.uint8]:
    """Pixels of `box` as the network wants them: resized to the input grid, mirrored where the slide ends.

    Reads the coarsest level that is still as fine as the input. Each pixel is sampled at its own place in the
    slide with an antialiased bilinear filter that also sees the pixels outside `box`, so a pixel is the same
    in whichever box it is read, but for a grey level where the filter rounds.

    Args:
        slide: where to read.
        box: input px; may reach beyond the slide on any side.
        grid: the slide's grid.

    Returns:
        (box.height, box.width, 3) uint8 RGB.

    Raises:
        InputError: the file is damaged there.
    """
    columns = _mirrored(box.x0, box.x1, grid.input_wh[0])
    rows = _mirrored(box.y0, box.y1, grid.input_wh[1])
    inside = Box(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    pixels = _resized(slide, level_for(slide, grid), inside, grid.input_wh)
    return pixels if inside == box else pixels[rows - inside.y0][:, columns - inside.x0]


def read_overview(slide: Slide, longest_px: int) -> NDArray[np.uint8]:
    """The whole slide, its longer side at most `longest_px`: (h, w, 3) uint8 RGB.

    Memory stays small for slides without pyramid, too: they are read piece by piece. And they are read once, for all of
    it has to be decoded: what is smaller than `OVERVIEW_PX` is shrunk from that.

    Raises:
        InputError: the file is damaged.
    """
    grid, largest = _overview_grid(slide, longest_px), _overview_grid(slide, OVERVIEW_PX)
    if longest_px > OVERVIEW_PX or level_for(slide, grid) != level_for(slide, largest):
        return _read_pieces(slide, grid)
    picture = _picture(slide)
    if grid == largest:
        return picture
    return np.asarray(Image.fromarray(picture).resize(grid.input_wh, Image.Resampling.BOX))


def _overview_grid(slide: Slide, longest_px: int) -> Grid:
    width, height = slide.size_wh
    shrink = min(1.0, longest_px / max(width, height))
    return Grid((width, height), (max(1, round(width * shrink)), max(1, round(height * shrink))), stride=1)


@lru_cache(maxsize=1)
def _picture(slide: Slide) -> NDArray[np.uint8]:
    picture = _read_pieces(slide, _overview_grid(slide, OVERVIEW_PX))
    picture.flags.writeable = False  # several look at it
    return picture


def _read_pieces(slide: Slide, grid: Grid) -> NDArray[np.uint8]:
    small_w, small_h = grid.input_wh
    level_wh = slide.level_whs[level_for(slide, grid)]
    step = max(1, int(_OVERVIEW_STEP_PX * small_w / level_wh[0]))
    overview = np.empty((small_h, small_w, 3), np.uint8)
    for y in range(0, small_h, step):
        for x in range(0, small_w, step):
            box = Box(x, y, x + step, y + step).clipped(small_w, small_h)
            overview[box.y0 : box.y1, box.x0 : box.x1] = read_input(slide, box, grid)
    return overview


def level_for(slide: Slide, grid: Grid) -> int:
    """The coarsest level that is as fine as the input grid, 1 % apart."""
    scale = min(full / small for full, small in zip(grid.level0_wh, grid.input_wh, strict=True))
    return max((i for i, down in enumerate(slide.level_downsamples) if down <= scale * 1.01), default=0)


def _mirrored(start: int, end: int, length: int) -> NDArray[np.intp]:
    """Indices in [0, length) for [start, end), mirrored at the outermost px as by `np.pad`'s `reflect`."""
    period = max(2 * (length - 1), 1)
    index = np.abs(np.arange(start, end)) % period
    return np.minimum(index, period - index) if length > 1 else np.zeros_like(index)


def _resized(slide: Slide, level: int, box: Box, input_wh: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels of a box inside the input grid, from one level."""
    if slide.level_whs[level] == input_wh:
        return slide.read_region(level, box.x0, box.y0, box.width, box.height)
    level_w, level_h = slide.level_whs[level]
    x, width, left, right = _source(box.x0, box.x1, input_wh[0], level_w)
    y, height, top, bottom = _source(box.y0, box.y1, input_wh[1], level_h)
    region = Image.fromarray(slide.read_region(level, x, y, width, height))
    resized = region.resize((box.width, box.height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    return np.asarray(resized)


def _source(start: int, end: int, input_length: int, level_length: int) -> tuple[int, int, float, float]:
    """Level px to read for input px [start, end): first, count, where the input begins and ends."""
    # Whole numbers are multiplied first: at the slide's end the quotient is then exactly its length.
    begin, stop = start * level_length / input_length, end * level_length / input_length
    # Half the width of the filter reaches over the box at each side.
    margin = math.ceil(max(level_length / input_length, 1)) + 1
    first = max(math.floor(begin) - margin, 0)
    last = min(math.ceil(stop) + margin, level_length)
    return first, last - first, begin - first, stop - first

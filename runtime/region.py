"""Which part of a slide is worked on: tissue, a mask of the user's, a rectangle."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nsam.runtime.errors import InputError, first_line
from nsam.runtime.slides import Slide, read_overview
from nsam.runtime.tiles import Box
from nsam.runtime.tissue import RESOLUTION_UM, find_tissue

_MASK_PX = 8192  # the tissue mask's longest side: 200 MB while it is made
_SMALLEST_UM = 100.0  # somebody has cut out an image this small: there is no glass in it
_SAME_SHAPE = 0.02  # relative difference of aspect ratios


@dataclass(frozen=True)
class Region:
    """Nuclei are wanted where the mask is True and inside the rectangle.

    Attributes:
        mask: (h, w) bool, stretched over `shown`; of any resolution.
        box: level-0 px, inside `shown`.
        size_wh: the slide's, level-0 px.
        shown: level-0 px; the whole slide, or the part of it that was scanned.
    """

    mask: NDArray[np.bool_]
    box: Box
    size_wh: tuple[int, int]
    shown: Box

    @classmethod
    def whole(cls, size_wh: tuple[int, int]) -> Region:
        """All of a slide."""
        whole = Box(0, 0, *size_wh)
        return cls(np.ones((1, 1), bool), whole, size_wh, whole)

    @classmethod
    def of(
        cls,
        slide: Slide,
        mpp: float,
        *,
        mask: Path | None = None,
        tissue: bool = True,
        roi: tuple[int, int, int, int] | None = None,
    ) -> Region:
        """The region of an open slide.

        Args:
            slide: see there.
            mpp: its µm per level-0 px.
            mask: an image, not black where nuclei are wanted; in place of the tissue mask. Its shape is the slide's, or
                that of the scanned part, which is all that QuPath shows.
            tissue: whether to look for tissue.
            roi: x, y, width and height of a rectangle, level-0 px.

        Raises:
            InputError: slide or mask cannot be read, the mask has another shape, or the rectangle lies outside.
        """
        width, height = slide.size_wh
        whole = box = Box(0, 0, width, height)
        if roi:
            x, y, w, h = roi
            box = Box(x, y, x + w, y + h).clipped(width, height)
            if box.width <= 0 or box.height <= 0:
                raise InputError(
                    f"`{slide.path}`: --roi {x} {y} {w} {h} lies outside the slide of {width} x {height} px"
                )
        if mask:
            drawn = read_mask(mask)
            shown = _shown_by(drawn.shape, slide, mask)
            box = Box(max(box.x0, shown.x0), max(box.y0, shown.y0), min(box.x1, shown.x1), min(box.y1, shown.y1))
            if box.width <= 0 or box.height <= 0:
                raise InputError(f"`{slide.path}`: --roi lies outside the scanned part, which `{mask}` shows")
            return cls(drawn, box, slide.size_wh, shown)
        longest = max(width, height)
        if not tissue or longest * mpp < _SMALLEST_UM:
            return cls(np.ones((1, 1), bool), box, slide.size_wh, whole)
        overview = read_overview(slide, min(_MASK_PX, max(1, round(longest * mpp / RESOLUTION_UM))))
        return cls(find_tissue(overview, longest * mpp / max(overview.shape[:2])), box, slide.size_wh, whole)

    def meets(self, box: Box) -> bool:
        """Whether a nucleus is wanted anywhere in a box (level-0 px)."""
        x0, x1 = max(box.x0, self.box.x0), min(box.x1, self.box.x1)
        y0, y1 = max(box.y0, self.box.y0), min(box.y1, self.box.y1)
        if x0 >= x1 or y0 >= y1:
            return False
        (height, width), shown = self.mask.shape, self.shown
        top, bottom, left, right = y0 - shown.y0, y1 - shown.y0, x0 - shown.x0, x1 - shown.x0
        rows = slice(top * height // shown.height, -(-bottom * height // shown.height))
        columns = slice(left * width // shown.width, -(-right * width // shown.width))
        return bool(self.mask[rows, columns].any())

    def holds(self, x: float, y: float) -> bool:
        """Whether the nucleus with this centroid (level-0 px) is wanted."""
        if not (self.box.x0 <= x < self.box.x1 and self.box.y0 <= y < self.box.y1):
            return False
        (height, width), shown = self.mask.shape, self.shown
        row, column = (y - shown.y0) * height / shown.height, (x - shown.x0) * width / shown.width
        return bool(self.mask[int(row), int(column)])

    def shares(self, cell_px: float, rows: int, columns: int) -> NDArray[np.float32]:
        """Of each square cell of a grid from the slide's corner the share that is wanted: (rows, columns)."""
        (height, width), shown, box = self.mask.shape, self.shown, self.box

        def weights(count: int, span: tuple[int, int], low: int, high: int, cell: int) -> NDArray[np.float64]:
            return _overlaps(count, span, *np.clip((cell * cell_px, (cell + 1) * cell_px), low, high))

        xs, ys = (shown.x0, shown.x1), (shown.y0, shown.y1)
        across = np.array([weights(width, xs, box.x0, box.x1, column) for column in range(columns)])
        result = np.zeros((rows, columns), np.float32)
        for row in range(rows):
            down = weights(height, ys, box.y0, box.y1, row)
            some = np.flatnonzero(down)
            result[row] = across @ (down[some] @ self.mask[some]) / cell_px**2
        return result

    @property
    def area_px(self) -> float:
        """Its area in level-0 px."""
        (height, width), shown = self.mask.shape, self.shown
        rows = _overlaps(height, (shown.y0, shown.y1), self.box.y0, self.box.y1)
        columns = _overlaps(width, (shown.x0, shown.x1), self.box.x0, self.box.x1)
        return float(rows @ self.mask @ columns)


def read_mask(path: Path) -> NDArray[np.bool_]:
    """A mask that the user drew: (h, w) bool, False where every colour is 0, or nothing is painted.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size
            with Image.open(path) as image:
                if image.mode in ("LA", "PA", "RGBA"):
                    pixels = np.asarray(image.convert("RGBA"))
                    pixels = pixels[..., :3] * (pixels[..., 3:] > 0)
                else:
                    pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "CMYK") else image)
    except Image.DecompressionBombError as error:
        raise InputError(f"`{path}`: the mask is too large; save it at a lower resolution") from error
    except Exception as error:  # codecs raise what they like
        raise InputError(f"`{path}`: the mask cannot be read ({first_line(error)})") from error
    return np.asarray(pixels if pixels.ndim == 2 else pixels.max(axis=2)) > 0


def _shown_by(shape: tuple[int, ...], slide: Slide, path: Path) -> Box:
    """What a mask of (h, w) shows, level-0 px: the scanned part or the whole slide, whose shape is nearer to its own;
    the scanned part where they are alike.

    Raises:
        InputError: it has another shape.
    """
    height, width = shape
    (x, y), (full_w, full_h) = slide.origin_xy, slide.size_wh
    boxes = [Box(0, 0, full_w, full_h)]
    if slide.scanned_wh:
        boxes.insert(0, Box(x, y, x + slide.scanned_wh[0], y + slide.scanned_wh[1]).clipped(full_w, full_h))
    differ = [abs(width * box.height / box.width - height) for box in boxes]
    # A px more or less, as rounding at low resolution gives it, is no other shape.
    if min(differ) <= max(1.5, _SAME_SHAPE * height):
        return boxes[differ.index(min(differ))]
    sizes = " nor a scanned part of ".join(f"{box.width} x {box.height}" for box in reversed(boxes))
    raise InputError(f"`{path}`: a mask of {width} x {height} px does not fit a slide of {sizes}")


def _overlaps(count: int, span: tuple[int, int], start: int, end: int) -> NDArray[np.float64]:
    """Level-0 px of each of `count` mask px, which share out `span`, that lie in [start, end)."""
    first, last = span
    borders = np.clip(first + np.arange(count + 1) * (last - first) / count, start, end)
    return np.diff(borders)

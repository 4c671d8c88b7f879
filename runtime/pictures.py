"""Pictures of a slide's nuclei: outlines over the slide, density as a heat map, and a thumbnail of both."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nsam.runtime.measure import Nucleus
from nsam.runtime.region import Region
from nsam.runtime.sinks import Add
from nsam.runtime.tiles import Box

_THUMBNAIL_PX = 420
_HEATMAP_PX = 1200
_OUTLINE_RGB = (0, 200, 60)  # green stands out from both stains
_REGION_RGB = (20, 90, 220)
_FRACTION_BITS = 4  # OpenCV draws in 1/16 px
_CELL_UM = 50.0  # side of a cell in which nuclei are counted
_COLOURS = cv2.COLORMAP_VIRIDIS
_LEAST_SEEN = 0.2  # share of a cell's neighbourhood, of the largest share, that a density is reckoned by
_NOT_LOOKED_AT = 235  # grey
_BAR_PX = 150  # width of the legend


class Density:
    """Nuclei counted in cells of 50 µm, by their centroids.

    Args:
        size_wh: the slide's width and height, level-0 px.
        mpp: µm per level-0 px.
        region: where nuclei were wanted; None: everywhere.
    """

    def __init__(self, size_wh: tuple[int, int], mpp: float, region: Region | None = None) -> None:
        self.size_wh, self.mpp = size_wh, mpp
        self._cell_px = _CELL_UM / mpp
        self._cells_wh = size_wh[0] / self._cell_px, size_wh[1] / self._cell_px  # the last may be a part
        rows, columns = (max(1, math.ceil(side)) for side in self._cells_wh[::-1])
        self._counts = np.zeros((rows, columns), np.float32)
        self._wanted = (region or Region.whole(size_wh)).shares(self._cell_px, rows, columns)

    def add(self, nucleus: Nucleus) -> None:
        """Count a nucleus."""
        x, y = nucleus.centroid_xy
        self._counts[int(y / self._cell_px), int(x / self._cell_px)] += 1

    def per_mm2(self) -> NDArray[np.float32]:
        """Nuclei per mm² of each cell, smoothed by a Gaussian of one cell: (rows, columns) float32.

        Only what was looked at is weighed; where that is little, a single nucleus makes no peak. Cells of which nothing
        was looked at have what their neighbours make likely.
        """
        found, seen = (
            cv2.GaussianBlur(part, (0, 0), 1, borderType=cv2.BORDER_CONSTANT) for part in (self._counts, self._wanted)
        )
        least = max(_LEAST_SEEN * float(seen.max()), 1e-6)
        return np.asarray(found / np.maximum(seen, least) / (_CELL_UM / 1000) ** 2, np.float32)

    @property
    def peak(self) -> float:
        """The highest of `per_mm2` where anything was looked at."""
        return float(self.per_mm2()[self._wanted > 0].max(initial=0))

    def picture(self, wh: tuple[int, int]) -> NDArray[np.float32]:
        """`per_mm2` at each px of a picture of the slide, (width, height) `wh`: (h, w) float32; 0 beside the region."""
        return self._spread(self.per_mm2(), wh, cv2.INTER_LINEAR) * self.looked_at(wh)

    def looked_at(self, wh: tuple[int, int]) -> NDArray[np.bool_]:
        """Whether anything of the cell at each px of such a picture was looked at: (h, w)."""
        return self._spread(self._wanted, wh, cv2.INTER_NEAREST) > 0

    def _spread(self, cells: NDArray[np.float32], wh: tuple[int, int], how: int) -> NDArray[np.float32]:
        x, y = ((np.arange(n) + 0.5) / n * side - 0.5 for n, side in zip(wh, self._cells_wh, strict=True))
        grid_x, grid_y = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
        return np.asarray(cv2.remap(cells, grid_x, grid_y, how, borderMode=cv2.BORDER_REPLICATE), np.float32)


@contextmanager
def overlay_sink(path: Path, overview: NDArray[np.uint8], size_wh: tuple[int, int]) -> Iterator[Add]:
    """A JPEG of the slide, its longer side at most 2048 px, with the outlines of the nuclei.

    Args:
        path: to write.
        overview: (h, w, 3) uint8 RGB, the whole slide.
        size_wh: the slide's width and height, level-0 px.
    """
    canvas = overview.copy()
    scale = np.array(canvas.shape[1::-1]) / size_wh

    def add(nucleus: Nucleus, rings: list[NDArray[np.float64]]) -> None:
        # OpenCV counts from the middle of the first pixel, rings from its corner.
        points = [np.rint((ring * scale - 0.5) * (1 << _FRACTION_BITS)).astype(np.int32) for ring in rings]
        cv2.polylines(canvas, points, True, _OUTLINE_RGB, 1, cv2.LINE_AA, _FRACTION_BITS)

    yield add
    _save(path, Image.fromarray(canvas), "JPEG", quality=90)


def write_heatmap(path: Path, density: Density) -> None:
    """A PNG of the nuclei per mm², its longer side some 1200 px, with colour bar and scale bar."""
    scale = _HEATMAP_PX / max(density.size_wh)
    width, height = (max(1, round(side * scale)) for side in density.size_wh)
    values = density.picture((width, height))
    top = _round_up(float(values.max()))
    page_h = max(height, 300)
    page = Image.new("RGB", (width + _BAR_PX, page_h + 60), "white")
    shown = np.where(density.looked_at((width, height))[..., None], _coloured(values, top), np.uint8(_NOT_LOOKED_AT))
    page.paste(Image.fromarray(shown), (0, 0))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(18)
    x, length = width + 20, page_h - 80
    bar = np.repeat(np.linspace(top, 0, length, dtype=np.float32)[:, None], 24, axis=1)
    page.paste(Image.fromarray(_coloured(bar, top)), (x, 60))
    draw.text((x, 4), "nuclei per\nsquare mm", "black", font)  # Pillow's font has no exponent
    for share in (0, 0.25, 0.5, 0.75, 1):
        draw.text((x + 32, 60 + (1 - share) * length), f"{top * share:,.0f}", "black", font, anchor="lm")
    mm = _round_down(width / scale * density.mpp / 1000 / 3)
    draw.rectangle((10, page_h + 14, 10 + mm * 1000 / density.mpp * scale, page_h + 20), "black")
    draw.text((10, page_h + 26), f"{mm:g} mm", "black", font)
    _save(path, page, "PNG")


def write_thumbnail(path: Path, overview: NDArray[np.uint8], density: Density, region: Region | None = None) -> None:
    """A small JPEG for the report: the slide, and beside it the slide in grey under the density's colours.

    Args:
        path: to write.
        overview: (h, w, 3) uint8 RGB, the whole slide.
        density: of its nuclei; the colours go from 0 to its maximum.
        region: where nuclei were wanted; its border is drawn on the slide.
    """
    image = Image.fromarray(overview)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    plain = image.convert("L").convert("RGB")
    if region:
        image = Image.fromarray(_outlined(np.array(image), region))
    values = density.picture(image.size)
    top = density.peak
    weight = np.minimum(values / max(top, 1e-6) * 4, 0.75)[..., None]  # where nothing is, the slide shows
    grey = np.asarray(plain)
    mixed = np.rint(grey * (1 - weight) + _coloured(values, top) * weight).astype(np.uint8)
    wide = image.width > 1.6 * image.height
    offset = (0, image.height + 8) if wide else (image.width + 8, 0)
    both = Image.new("RGB", (offset[0] + image.width, offset[1] + image.height), "white")
    both.paste(image, (0, 0))
    both.paste(Image.fromarray(mixed), offset)
    _save(path, both, "JPEG", quality=70)


def _outlined(image: NDArray[np.uint8], region: Region) -> NDArray[np.uint8]:
    """The slide with a line around the region, unless that is all of it."""
    height, width = image.shape[:2]
    across, down = width / region.size_wh[0], height / region.size_wh[1]

    def px(box: Box) -> tuple[slice, slice]:
        return slice(round(box.y0 * down), round(box.y1 * down)), slice(round(box.x0 * across), round(box.x1 * across))

    shown, inside = (np.zeros((height, width), np.uint8) for _ in range(2))
    part = shown[px(region.shown)]
    if part.size:
        part[:] = cv2.resize(region.mask.view(np.uint8), part.shape[::-1])
    inside[px(region.box)] = shown[px(region.box)]
    lines, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return image if inside.all() else np.asarray(cv2.drawContours(image, lines, -1, _REGION_RGB, 1))


def _coloured(values: NDArray[np.float32], top: float) -> NDArray[np.uint8]:
    """(h, w) of 0 to `top` -> (h, w, 3) uint8 RGB."""
    levels = np.rint(np.clip(values / max(top, 1e-6), 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(levels, _COLOURS)[..., ::-1])


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1.0)))
    return next(power * step for step in (1, 2, 4, 6, 8, 10) if value <= power * step)


def _round_down(value: float) -> float:
    """The last of 1, 2, 5 times a power of ten that is not above."""
    value *= 1 + 1e-9  # .3 / 3 is less than .1
    power = 10.0 ** math.floor(math.log10(value))
    return max(power * step for step in (1, 2, 5) if power * step <= value)


def _save(path: Path, image: Image.Image, kind: str, **options: int) -> None:
    # Through memory: Pillow takes a write that a full disk cut short for a success.
    content = io.BytesIO()
    image.save(content, kind, **options)
    path.write_bytes(content.getvalue())

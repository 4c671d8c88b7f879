"""Slide -> strips of labels and nuclei: read | infer | separate | own.

The network fills a rolling strip of maps, each map px predicted once; blocks of it are separated with a halo, and
a nucleus belongs to the block whose write box holds its centroid. Nothing is merged. Ids follow the raster order
of the nuclei's first pixels, so they do not depend on the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.engines import Engine
from nsam.runtime.measure import Nucleus, measure
from nsam.runtime.slides import Slide, read_input
from nsam.runtime.stains import haematoxylin
from nsam.runtime.tiles import Box, Grid, blocks, interpolate, map_span, tile_rows
from nsam.runtime.watershed import separate

#: Side of a block's write box, level-0 px: large against the halo, small against memory.
BLOCK_PX = 2048


@dataclass(frozen=True)
class Strip:
    """Finished rows of a slide; strips come top to bottom without gap or overlap.

    Attributes:
        y0: first level-0 row.
        labels: (h, W) int32 of those rows, 0 = background.
        nuclei: those whose first pixel lies in these rows, ids ascending.
    """

    y0: int
    labels: NDArray[np.int32]
    nuclei: list[Nucleus]


def segment_slide(
    slide: Slide,
    engine: Engine,
    mpp: float,
    *,
    batch: int = 4,
    block_px: int = BLOCK_PX,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Strip]:
    """Segment a slide, strip by strip, in memory that grows with its width only.

    Args:
        slide: an open slide.
        engine: the network.
        mpp: µm per level-0 px.
        batch: tiles a pass of the network.
        block_px: side of a post-processing block; the result does not depend on it.
        on_progress: called with (tiles done, tiles in all).

    Yields:
        `Strip`s that cover the slide.

    Raises:
        InputError: the slide could not be read.
    """
    grid = Grid.of(slide.size_wh, mpp, engine.card.input.mpp, engine.card.output.stride)
    yield from segment_maps(map_rows(slide, engine, grid, batch, on_progress), engine, grid, mpp, block_px)


def map_rows(
    slide: Slide,
    engine: Engine,
    grid: Grid,
    batch: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[NDArray[np.float32]]:
    """The slide's maps, top to bottom: (C + 1, h, map width) float32 for each row of tiles.

    The last is haematoxylin: made of the pixels that the network sees, so that the slide is read once.
    """
    card = engine.card
    stride = card.output.stride
    rows = list(tile_rows(grid.input_wh, card.input.size, card.post.tile_halo_px))
    total, done = sum(len(row) for row in rows), 0
    for row in rows:
        top, bottom = row[0].write.y0 // stride, -(-row[0].write.y1 // stride)
        maps = np.empty((len(card.output.channels) + 1, bottom - top, grid.map_wh[0]), np.float32)
        for start in range(0, len(row), batch):
            tiles = row[start : start + batch]
            images = np.stack([read_input(slide, tile.read, grid) for tile in tiles])
            for tile, result, stain in zip(tiles, engine.run(images), haematoxylin(images, stride), strict=True):
                left, right = tile.write.x0 // stride, -(-tile.write.x1 // stride)
                x, y = left - tile.read.x0 // stride, top - tile.read.y0 // stride
                maps[:-1, :, left:right] = result[:, y : y + bottom - top, x : x + right - left]
                maps[-1, :, left:right] = stain[y : y + bottom - top, x : x + right - left]
            done += len(tiles)
            if on_progress:
                on_progress(done, total)
        yield maps


def segment_maps(
    rows: Iterator[NDArray[np.float32]], engine: Engine, grid: Grid, mpp: float, block_px: int = BLOCK_PX
) -> Iterator[Strip]:
    """Separate nuclei in maps that arrive in rows, top to bottom, as `map_rows` gives them; see `segment_slide`."""
    halo = math.ceil(engine.card.post.block_halo_um / mpp)
    width, height = grid.level0_wh
    strip = _MapStrip(rows)
    canvas = _Canvas(width)
    for block_row in blocks(grid.level0_wh, block_px, halo):
        read, write = block_row[0].read, block_row[0].write
        top, bottom = map_span(read.y0, read.y1, grid.map_per_level0[1], grid.map_wh[1])
        maps = strip.rows(top, bottom)
        for block in block_row:
            left, right = map_span(block.read.x0, block.read.x1, grid.map_per_level0[0], grid.map_wh[0])
            region = interpolate(maps[:, :, left:right], (left, top), block.read, grid)
            labels, probability = separate(region, engine.card.output, engine.card.post, mpp)
            found = measure(labels, probability, region[-1], (block.read.x0, block.read.y0), mpp)
            canvas.add([nucleus for nucleus in found if _owns(block.write, nucleus)])
        # The next row of blocks can still add nuclei that begin in its halo.
        last = write.y1 == height
        yield canvas.finish(height if last else max(canvas.y0, write.y1 - halo))


def _owns(write: Box, nucleus: Nucleus) -> bool:
    x, y = nucleus.centroid_xy
    return write.x0 <= x < write.x1 and write.y0 <= y < write.y1


class _MapStrip:
    """A window over rows of maps that arrive top to bottom."""

    def __init__(self, rows: Iterator[NDArray[np.float32]]) -> None:
        self._source = rows
        self._top = 0
        self._maps: NDArray[np.float32] | None = None

    def rows(self, top: int, bottom: int) -> NDArray[np.float32]:
        """Map rows [top, bottom); rows above `top` are forgotten."""
        parts = [] if self._maps is None else [self._maps[:, max(0, top - self._top) :]]
        first = max(top, self._top) if parts else 0
        end = first + (parts[0].shape[1] if parts else 0)
        while end < bottom:
            parts.append(next(self._source))
            end += parts[-1].shape[1]
        self._maps = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        self._top = first
        return self._maps[:, top - first : bottom - first]


class _Canvas:
    """Label rows that are not yet finished, and the nuclei waiting for their id."""

    def __init__(self, width: int) -> None:
        self.y0 = 0
        self._labels = np.zeros((0, width), np.int32)
        self._waiting: list[Nucleus] = []
        self._next_id = 1

    def add(self, nuclei: list[Nucleus]) -> None:
        self._waiting += nuclei

    def finish(self, y1: int) -> Strip:
        """Number and paint all nuclei that begin above `y1`, and let go of the rows above it."""
        ready = sorted((n for n in self._waiting if n.first_yx[0] < y1), key=lambda n: n.first_yx)
        self._waiting = [n for n in self._waiting if n.first_yx[0] >= y1]
        ready = [n.renumbered(self._next_id + i) for i, n in enumerate(ready)]
        self._next_id += len(ready)
        end = max([y1, *(n.bbox_xywh[1] + n.bbox_xywh[3] for n in ready)])
        missing = end - self.y0 - len(self._labels)
        if missing > 0:
            self._labels = np.pad(self._labels, ((0, missing), (0, 0)))
        for nucleus in ready:
            x, y, w, h = nucleus.bbox_xywh
            window = self._labels[y - self.y0 : y - self.y0 + h, x : x + w]
            window[nucleus.mask & (window == 0)] = nucleus.id
        strip = Strip(self.y0, self._labels[: y1 - self.y0], ready)
        self._labels = self._labels[y1 - self.y0 :]
        self.y0 = y1
        return strip

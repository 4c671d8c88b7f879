"""Tile and block geometry: what is read, what is written, who owns a nucleus. Pure arithmetic, no I/O.

Three pixel grids meet here. *Level-0* px of the slide; *input* px, level-0 resized to the card's mpp; *map* px,
input px over the card's stride. A `Grid` fixes their sizes once for a slide, so that every tile and block
computes the same positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Box:
    """Half-open rectangle [x0, x1) x [y0, y1) in px of one grid; may reach beyond the grid."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    def grown(self, margin: int) -> Box:
        """The box with `margin` px more on each side."""
        return Box(self.x0 - margin, self.y0 - margin, self.x1 + margin, self.y1 + margin)

    def clipped(self, width: int, height: int) -> Box:
        """The part inside [0, width) x [0, height)."""
        return Box(max(self.x0, 0), max(self.y0, 0), min(self.x1, width), min(self.y1, height))


@dataclass(frozen=True)
class Tile:
    """One pass of the network: `read` has the network's size, `write` is the part that is kept (input px)."""

    read: Box
    write: Box


@dataclass(frozen=True)
class Block:
    """One unit of post-processing (level-0 px): nuclei with their centroid in `write` are its own."""

    read: Box
    write: Box


@dataclass(frozen=True)
class Grid:
    """Sizes of a slide in the three grids; (width, height) each."""

    level0_wh: tuple[int, int]
    input_wh: tuple[int, int]
    stride: int

    @classmethod
    def of(cls, level0_wh: tuple[int, int], slide_mpp: float, input_mpp: float, stride: int) -> Grid:
        """Grid of a slide with `slide_mpp` for a network that wants `input_mpp` (µm/px both)."""
        width, height = (max(1, round(side * slide_mpp / input_mpp)) for side in level0_wh)
        return cls(level0_wh, (width, height), stride)

    @property
    def map_wh(self) -> tuple[int, int]:
        """Map px that cover the slide; the last may reach over its edge."""
        return -(-self.input_wh[0] // self.stride), -(-self.input_wh[1] // self.stride)

    @property
    def map_per_level0(self) -> tuple[float, float]:
        """Map px in one level-0 px, along x and y."""
        return (
            self.input_wh[0] / self.level0_wh[0] / self.stride,
            self.input_wh[1] / self.level0_wh[1] / self.stride,
        )


def tile_rows(input_wh: tuple[int, int], size: int, halo: int) -> Iterator[list[Tile]]:
    """Rows of network tiles, top to bottom, whose write boxes part the input grid without gap or overlap.

    Args:
        input_wh: the slide's width and height in input px.
        size: side of the network's input.
        halo: px on each side of a tile whose result is thrown away, except where the slide ends.

    An image that fits into one tile is one tile: no halo is wasted on what is not there.
    """
    columns = list(_spans(input_wh[0], size, halo))
    for read_y, write_y0, write_y1 in _spans(input_wh[1], size, halo):
        yield [
            Tile(
                Box(read_x, read_y, read_x + size, read_y + size),
                Box(write_x0, write_y0, write_x1, write_y1),
            )
            for read_x, write_x0, write_x1 in columns
        ]


def tile_count(input_wh: tuple[int, int], size: int, halo: int) -> int:
    """How many tiles `tile_rows` makes."""
    across, down = (sum(1 for _ in _spans(length, size, halo)) for length in input_wh)
    return across * down


def _spans(length: int, size: int, halo: int) -> Iterator[tuple[int, int, int]]:
    """(read start, write start, write end) along one axis."""
    if length <= size:
        yield 0, 0, length
        return
    start, step = 0, size - 2 * halo
    while start < length:
        first = start == 0
        end = start + step + (halo if first else 0)
        if end + halo >= length:
            end = length
        yield (0 if first else start - halo), start, end
        start = end


def blocks(level0_wh: tuple[int, int], size: int, halo: int) -> Iterator[list[Block]]:
    """Rows of post-processing blocks, top to bottom; write boxes part the slide, read boxes add `halo` px."""
    width, height = level0_wh
    for y in range(0, height, size):
        row = []
        for x in range(0, width, size):
            write = Box(x, y, min(x + size, width), min(y + size, height))
            row.append(Block(write.grown(halo).clipped(width, height), write))
        yield row


def map_span(start: int, end: int, per_level0: float, length: int) -> tuple[int, int]:
    """Map px [a, b) needed to interpolate at the centres of level-0 px [start, end); `length` map px exist."""
    a = int(np.floor((start + 0.5) * per_level0 - 0.5))
    b = int(np.floor((end - 0.5) * per_level0 - 0.5)) + 2
    return max(a, 0), min(max(b, 1), length)

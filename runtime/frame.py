"""How a slide is cut: the network's tiles, the blocks of post-processing, and the bands that they make up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from nsam.runtime.card import ModelCard
from nsam.runtime.region import Region
from nsam.runtime.slides import Slide
from nsam.runtime.tiles import Block, Box, Grid, Tile, blocks, map_span, tile_count, tile_rows

#: Side of a block's write box, level-0 px: large against the halo, small against memory (1.1 GB less than 2048 on a
#: slide 60,000 px wide).
BLOCK_PX = 1024

#: What the maps of a row of tiles may take in memory, where a smaller tile would do; about three rows' are held.
ROW_BYTES = 200_000_000


@dataclass(frozen=True)
class Frame:
    """The cut of one slide, the same for every process that works on it.

    Attributes:
        grid: the slide's grids.
        card: the model's.
        mpp: µm per level-0 px.
        region: where nuclei are wanted.
        block_px: side of a post-processing block; the result does not depend on it.
    """

    grid: Grid
    card: ModelCard
    mpp: float
    region: Region
    block_px: int = BLOCK_PX

    @classmethod
    def of(
        cls, slide: Slide, card: ModelCard, mpp: float, region: Region | None = None, block_px: int = BLOCK_PX
    ) -> Frame:
        """The frame of an open slide; without a region, of all of it."""
        grid = Grid.of(slide.size_wh, mpp, card.input.mpp, card.output.stride)
        return cls(grid, card, mpp, region or Region.whole(slide.size_wh), block_px)

    @cached_property
    def halo(self) -> int:
        """Context of a block, level-0 px."""
        return math.ceil(self.card.post.block_halo_um / self.mpp)

    @cached_property
    def bands(self) -> list[list[Block]]:
        """Rows of blocks, top to bottom."""
        return list(blocks(self.grid.level0_wh, self.block_px, self.halo))

    @cached_property
    def tiles(self) -> list[list[Tile]]:
        """Rows of the network's tiles, top to bottom."""
        return list(tile_rows(self.grid.input_wh, self.tile_px, self.card.post.tile_halo_px))

    @cached_property
    def tile_px(self) -> int:
        """Side of the network's tiles, input px: the one that gives the network the fewest pixels.

        Large tiles throw less of their sides away, small ones fit a small image better. What is wanted of the slide
        does not count: a nucleus is the same with a mask and without.
        """
        told = self.card.input.size
        row_px = self.grid.map_wh[0] / self.card.output.stride
        bytes_each = 4 * (len(self.card.output.channels) + 1) * row_px
        sizes = [size for size in self.card.input.sizes if size <= told or size * bytes_each <= ROW_BYTES]
        halo = self.card.post.tile_halo_px
        return min(sizes, key=lambda size: size**2 * tile_count(self.grid.input_wh, size, halo))

    def wanted(self, row: list[Tile]) -> list[Tile]:
        """The tiles of a row that can change a nucleus in the region: the others are not worth a pass."""
        (width, height), (full_w, full_h) = self.grid.input_wh, self.grid.level0_wh

        def level0(box: Box) -> Box:
            x0, x1 = box.x0 * full_w // width, -(-box.x1 * full_w // width)
            return Box(x0, box.y0 * full_h // height, x1, -(-box.y1 * full_h // height))

        return [tile for tile in row if self.region.meets(level0(tile.write).grown(self.halo))]

    @cached_property
    def tiles_wanted(self) -> int:
        """How many of all tiles are worth a pass."""
        return sum(len(self.wanted(row)) for row in self.tiles)

    def map_rows(self, band: int) -> tuple[int, int]:
        """Map rows [top, bottom) that a band needs."""
        read = self.bands[band][0].read
        return map_span(read.y0, read.y1, self.grid.map_per_level0[1], self.grid.map_wh[1])

    def tile_rows(self, first: int, last: int) -> tuple[int, int]:
        """Rows [a, b) of tiles that the bands [first, last) need."""
        top, bottom = self.map_rows(first)[0], self.map_rows(last - 1)[1]
        spans = [self.written(row) for row in self.tiles]
        needed = [i for i, (y0, y1) in enumerate(spans) if y1 > top and y0 < bottom]
        return needed[0], needed[-1] + 1

    def written(self, row: list[Tile]) -> tuple[int, int]:
        """Map rows [y0, y1) that a row of tiles fills."""
        stride = self.card.output.stride
        return row[0].write.y0 // stride, -(-row[0].write.y1 // stride)

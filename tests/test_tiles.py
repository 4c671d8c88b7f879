"""Geometry: nothing is read too little, nothing is written twice or not at all."""

import numpy as np
import pytest

from nsam.runtime.tiles import blocks, tile_rows


@pytest.mark.parametrize("wh", [(1, 1), (64, 64), (65, 63), (200, 131), (127, 512), (48, 1000)])
@pytest.mark.parametrize("halo", [0, 8, 16])
def test_write_boxes_part_the_image_and_lie_inside_their_read_boxes(wh: tuple[int, int], halo: int) -> None:
    count = np.zeros((wh[1], wh[0]), int)
    for row in tile_rows(wh, 64, halo):
        for tile in row:
            assert (tile.read.width, tile.read.height) == (64, 64)
            w = tile.write
            count[w.y0 : w.y1, w.x0 : w.x1] += 1
            for start, end, low, high, length in (
                (w.x0, w.x1, tile.read.x0, tile.read.x1, wh[0]),
                (w.y0, w.y1, tile.read.y0, tile.read.y1, wh[1]),
            ):
                assert start - low >= halo or start == 0
                assert high - end >= halo or end == length
    assert (count == 1).all()


@pytest.mark.parametrize("wh", [(100, 100), (33, 257)])
def test_blocks_part_the_slide(wh: tuple[int, int]) -> None:
    count = np.zeros((wh[1], wh[0]), int)
    for row in blocks(wh, 32, 7):
        for block in row:
            count[block.write.y0 : block.write.y1, block.write.x0 : block.write.x1] += 1
            assert block.read == block.write.grown(7).clipped(*wh)
    assert (count == 1).all()

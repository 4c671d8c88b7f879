"""Geometry: nothing is read too little, nothing is written twice or not at all."""

import numpy as np
import pytest

from nsam.runtime.tiles import Grid, blocks, tile_rows


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


def test_maps_cover_the_slide_and_each_axis_has_its_own_scale() -> None:
    assert Grid.of((101, 78), 0.25, 0.25, 2).map_wh == (51, 39)
    assert Grid.of((1, 1), 0.1, 0.5, 2).input_wh == (1, 1)
    grid = Grid.of((3000, 6), 0.2, 0.25, 2)  # 4.8 px are 5
    assert grid.input_wh == (2400, 5)
    assert grid.map_per_level0 == (0.4, pytest.approx(5 / 12))

"""Geometry: nothing is read too little, nothing is written twice or not at all."""

import numpy as np
import pytest

from nsam.runtime.tiles import Box, Grid, blocks, interpolate, map_span, tile_rows


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


@pytest.mark.parametrize("mpp", [0.17, 0.25, 0.4989, 0.1])
def test_interpolated_parts_equal_the_whole_to_the_bit(mpp: float) -> None:
    rng = np.random.default_rng(0)
    grid = Grid.of((301, 233), mpp, 0.25, 2)
    maps = rng.normal(size=(2, grid.map_wh[1], grid.map_wh[0])).astype(np.float32)
    whole = interpolate(maps, (0, 0), Box(0, 0, 301, 233), grid)
    assert whole.shape == (2, 233, 301)
    for row in blocks((301, 233), 90, 11):
        for block in row:
            box = block.read
            x0, x1 = map_span(box.x0, box.x1, grid.map_per_level0[0], grid.map_wh[0])
            y0, y1 = map_span(box.y0, box.y1, grid.map_per_level0[1], grid.map_wh[1])
            part = interpolate(maps[:, y0:y1, x0:x1], (x0, y0), box, grid)
            np.testing.assert_array_equal(part, whole[:, box.y0 : box.y1, box.x0 : box.x1])


def test_interpolation_keeps_a_ramp_in_place() -> None:
    """Map px i covers level-0 px 2i and 2i + 1: its centre lies between them."""
    grid = Grid.of((40, 8), 0.25, 0.25, 2)
    ramp = np.tile((np.arange(20, dtype=np.float32) * 2 + 1)[None, None], (1, 4, 1))
    found = interpolate(ramp, (0, 0), Box(0, 0, 40, 8), grid)[0, 3]
    np.testing.assert_allclose(found[1:-1], np.arange(1, 39) + 0.5, rtol=1e-6)

"""From map px to level-0 px: the same from any block, in place, and with smooth borders."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nsam.runtime.level0 import carry, logit, nearest
from nsam.runtime.tiles import Box, Grid, blocks, map_span


@pytest.mark.parametrize("mpp", [0.17, 0.25, 0.4989, 0.1, 1.0])
def test_parts_equal_the_whole_to_the_bit(mpp: float) -> None:
    rng = np.random.default_rng(0)
    grid = Grid.of((301, 233), mpp, 0.25, 2)
    logits = rng.normal(size=grid.map_wh[::-1]).astype(np.float32)
    basins = (rng.integers(1, 5, logits.shape) * (logits > 0)).astype(np.int32)

    def carried(basins: NDArray[np.int32], logits: NDArray[np.float32], origin_xy: tuple[int, int], box: Box) -> Any:
        return *carry(basins, logits, 0.5, origin_xy, box, grid), nearest(logits, origin_xy, box, grid)

    whole = carried(basins, logits, (0, 0), Box(0, 0, 301, 233))
    for row in blocks((301, 233), 90, 11):
        for block in row:
            box = block.read
            x0, x1 = map_span(box.x0, box.x1, grid.map_per_level0[0], grid.map_wh[0])
            y0, y1 = map_span(box.y0, box.y1, grid.map_per_level0[1], grid.map_wh[1])
            part = carried(basins[y0:y1, x0:x1], logits[y0:y1, x0:x1], (x0, y0), box)
            for found, wanted in zip(part, whole, strict=True):
                np.testing.assert_array_equal(found, wanted[box.y0 : box.y1, box.x0 : box.x1])


def test_every_pixel_of_the_mask_and_no_other_has_a_label() -> None:
    rng = np.random.default_rng(1)
    grid = Grid.of((1500, 700), 0.17, 0.25, 2)
    logits = rng.normal(size=grid.map_wh[::-1]).astype(np.float32)
    basins = (rng.integers(1, 9, logits.shape) * (logits > logit(0.6))).astype(np.int32)
    labels, probability = carry(basins, logits, 0.6, (0, 0), Box(0, 0, 1500, 700), grid)
    assert (labels >= 0).all()
    clear = np.abs(probability - 0.6) > 1e-5
    np.testing.assert_array_equal((labels > 0)[clear], (probability > 0.6)[clear])


def test_logits_stay_in_place() -> None:
    """Map px i covers level-0 px 2i and 2i + 1: its centre lies between them."""
    grid = Grid.of((40, 8), 0.25, 0.25, 2)
    ramp = np.tile((np.arange(20, dtype=np.float32) * 2 - 19)[None] / 10, (4, 1))
    probability = carry(np.zeros(ramp.shape, np.int32), ramp, 0.5, (0, 0), Box(0, 0, 40, 8), grid)[1]
    wanted = (np.arange(1, 39) + 0.5 - 20) / 10
    np.testing.assert_allclose(probability[3, 1:-1], 1 / (1 + np.exp(-wanted)), rtol=1e-5)


def test_the_border_between_basins_is_straight_where_theirs_is_a_stair() -> None:
    """A diagonal border in map px of four level-0 px: each level-0 px lies within one of the line."""
    side = 20
    y, x = np.mgrid[:side, :side]
    basins = np.where(x + y < side, 1, 2).astype(np.int32)
    grid = Grid((4 * side, 4 * side), (side, side), 1)
    labels = carry(basins, np.full((side, side), 9, np.float32), 0.5, (0, 0), Box(0, 0, 4 * side, 4 * side), grid)[0]
    y, x = np.mgrid[: 4 * side, : 4 * side] + 0.5
    beyond = (x + y) / 4 - side  # map px past the line through the px centres' middle
    assert set(np.unique(labels)) == {1, 2}
    assert (labels[beyond < -0.3] == 1).all()
    assert (labels[beyond > 0.8] == 2).all()
    steps = np.abs(np.diff((labels == 1).sum(axis=1)[4:-4]))
    assert steps.max() <= 2  # nearest map px would step by four


def test_a_measurement_s_pixel_is_that_which_holds_it() -> None:
    grid = Grid((5, 4), (3, 4), 1)
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    found = nearest(values, (0, 0), Box(0, 0, 5, 4), grid)
    assert found.tolist() == values[:, [0, 0, 1, 2, 2]].tolist()


def test_logit_at_the_ends() -> None:
    assert [logit(p) for p in (0, 0.5, 1)] == [-np.inf, 0, np.inf]

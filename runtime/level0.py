"""From map px to level-0 px: probability interpolated, basins with smooth borders between them.

Positions come from the slide's own grid and each weight from its position alone, so a pixel has the same value to
the bit whichever block asks for it. (OpenCV's resize knows no origin, and its remap rounds.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.tiles import Box, Grid

_PART_PX = 1 << 18  # px at a time, so that intermediates stay in the cache
_Px = TypeVar("_Px", bound=NDArray[Any])
_SEVERAL = -1  # not one basin but several


def logit(probability: float) -> float:
    """log(p / (1 - p)), infinite at 0 and 1."""
    if 0 < probability < 1:
        return math.log(probability / (1 - probability))
    return math.copysign(math.inf, probability - 0.5)


def carry(
    basins: NDArray[np.int32],
    logits: NDArray[np.float32],
    threshold: float,
    origin_xy: tuple[int, int],
    box: Box,
    grid: Grid,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Labels and probability at the centres of the level-0 px of `box`.

    A pixel is nucleus where the logit, interpolated, passes that of `threshold`. It takes the basin that has the
    largest share of the bilinear weights of its four map px.

    Args:
        basins: (h, w) int32 from `separate`, a part of the slide's maps; every map px above `threshold` has a basin,
            or is to be dropped.
        logits: (h, w) float32 of the same part, the maps' first channel.
        threshold: probability above which a pixel is nucleus.
        origin_xy: where that part lies in the slide's maps.
        box: level-0 px wanted.
        grid: the slide's grid.

    Returns:
        labels (box.height, box.width) int32 and probability, float32.
    """
    rows = _taps(box.y0, box.y1, grid.map_per_level0[1], grid.map_wh[1], origin_xy[1])
    cols = _taps(box.x0, box.x1, grid.map_per_level0[0], grid.map_wh[0], origin_xy[0])
    labels = np.empty((box.height, box.width), np.int32)
    probability = np.empty((box.height, box.width), np.float32)
    least, step = logit(threshold), max(1, _PART_PX // box.width)
    for y in range(0, box.height, step):
        part = slice(y, y + step)
        needed = slice(rows.first[y], rows.second[part][-1] + 1)
        taps = _Taps(rows.first[part] - needed.start, rows.second[part] - needed.start, rows.weight[part])
        value = _interpolated(logits[needed], taps, cols, out=probability[part])
        np.multiply(_cells(basins[needed], taps, cols), value > least, out=labels[part])
        # 1 / (1 + exp(-x)) without overflow
        value *= 0.5
        np.tanh(value, out=value)
        value += 1
        value *= 0.5
    _vote(labels, basins, rows, cols)
    return labels, probability


def nearest(values: NDArray[np.float32], origin_xy: tuple[int, int], box: Box, grid: Grid) -> NDArray[np.float32]:
    """(box.height, box.width) float32: for each level-0 px of `box` the map px that it lies in; see `carry`."""
    rows, cols = (
        np.clip(((np.arange(start, end) + 0.5) * scale).astype(np.intp), 0, length - 1) - origin
        for start, end, scale, length, origin in (
            (box.y0, box.y1, grid.map_per_level0[1], grid.map_wh[1], origin_xy[1]),
            (box.x0, box.x1, grid.map_per_level0[0], grid.map_wh[0], origin_xy[0]),
        )
    )
    found: NDArray[np.float32] = np.take(values, cols, axis=1)[rows]
    return found


@dataclass(frozen=True)
class _Taps:
    """The two map px about each level-0 px along one axis, and the weight of the second."""

    first: NDArray[np.intp]
    second: NDArray[np.intp]
    weight: NDArray[np.float32]


def _taps(start: int, end: int, per_level0: float, length: int, origin: int) -> _Taps:
    position = np.clip((np.arange(start, end) + 0.5) * per_level0 - 0.5, 0, length - 1)
    first = np.floor(position).astype(np.intp)
    return _Taps(first - origin, np.minimum(first + 1, length - 1) - origin, (position - first).astype(np.float32))


def _interpolated(
    values: NDArray[np.float32], rows: _Taps, cols: _Taps, out: NDArray[np.float32]
) -> NDArray[np.float32]:
    # np.take: indexing columns would turn the order in memory round.
    across, left = np.take(values, cols.second, axis=1), np.take(values, cols.first, axis=1)
    across -= left
    across *= cols.weight
    across += left
    upper = across[rows.first]
    np.subtract(across[rows.second], upper, out=out)
    out *= rows.weight[:, None]
    out += upper
    return out


def _cells(basins: NDArray[np.int32], rows: _Taps, cols: _Taps) -> NDArray[np.int32]:
    """The one basin among each pixel's four map px, 0 if there is none, `_SEVERAL` if there are several."""
    highest = _of_four(np.maximum, basins)
    lowest = _of_four(np.minimum, (basins - 1).view(np.uint32)).view(np.int32) + 1  # 0, made the largest, never wins
    cells = np.where(lowest == highest, highest, _SEVERAL)
    cells *= highest > 0
    found: NDArray[np.int32] = np.take(cells, cols.first, axis=1)[rows.first]
    return found


def _of_four(choose: np.ufunc, px: _Px) -> _Px:
    """The choice among px (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1), as far as they exist."""
    result: _Px = px.copy()
    choose(result[:, :-1], px[:, 1:], out=result[:, :-1])
    choose(result[:-1], result[1:], out=result[:-1])
    return result


def _vote(labels: NDArray[np.int32], basins: NDArray[np.int32], rows: _Taps, cols: _Taps) -> None:
    """Where a label is `_SEVERAL`, put the basin with the largest share of the bilinear weights."""
    at = np.flatnonzero(labels == _SEVERAL)
    y, x = np.divmod(at, labels.shape[1])
    ys, xs = (rows.first[y], rows.second[y]), (cols.first[x], cols.second[x])
    wy, wx = (1 - rows.weight[y], rows.weight[y]), (1 - cols.weight[x], cols.weight[x])
    taps = [(i, j) for i in (0, 1) for j in (0, 1)]
    candidates = [basins[ys[i], xs[j]] for i, j in taps]
    weights = [wy[i] * wx[j] for i, j in taps]
    most, chosen = np.zeros(at.size, np.float32), np.zeros(at.size, np.int32)
    for candidate in candidates:
        share = sum(w * (other == candidate) for w, other in zip(weights, candidates, strict=True))
        # Equal shares go to the higher label: labels follow the raster order of their peaks in every block.
        better = (candidate > 0) & ((share > most) | ((share == most) & (candidate > chosen)))
        most, chosen = np.where(better, share, most), np.where(better, candidate, chosen)
    labels.ravel()[at] = chosen

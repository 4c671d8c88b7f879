"""The outline of a nucleus, simplified for GeoJSON.

Rings are closed and wound as RFC 7946 wants it, by the numbers: the exterior counterclockwise where y grows upwards,
which is clockwise on a screen, where y grows downwards; holes the other way.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nsam.runtime.measure import Nucleus

#: To look for crossings takes memory by the square of the points; nuclei have some forty.
_MOST_POINTS = 2000


def simplified_rings(nucleus: Nucleus, tolerance_px: float = 0.5) -> list[NDArray[np.float64]]:
    """The exterior ring, then one for each hole, of few points; they neither touch nor cross themselves or another.

    The outline goes through the middles of the pixels' borders, as marching squares do at half the height; there a
    slope is a line and no staircase. Then Douglas-Peucker drops what lies within the tolerance of a line, holes as
    narrow as that, too. Where rings would cross, nothing is dropped: at .5 px, none of half a million ragged shapes.

    Args:
        nucleus: whose outline.
        tolerance_px: level-0 px.

    Returns:
        (N, 2) float64 each, N >= 4, level-0 px, first = last point.
    """
    # Twice the coordinates, for then they are whole.
    middles = [ring + _after(ring) for ring in _unit_steps(nucleus.mask)]
    exterior, *holes = [_points(cv2.approxPolyDP(ring, 2 * tolerance_px, True)) for ring in middles]
    simple = [exterior, *(hole for hole in holes if len(hole) > 2)]
    clear = len(simple) == 1 and _starlike(exterior)
    if len(exterior) < 3 or (not clear and (sum(map(len, simple)) > _MOST_POINTS or _cross(simple))):
        simple = middles
    return [_closed(ring / 2 + nucleus.bbox_xywh[:2]) for ring in simple]


def _unit_steps(mask: NDArray[np.bool_]) -> list[NDArray[np.int32]]:
    """Open rings along pixel borders with a point at each pixel corner, the largest exterior first, then its holes."""
    # With each pixel doubled, its two columns stand for its left and right border (rows alike), and a contour's
    # diagonal steps between pixels fall on one corner.
    doubled = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    wanted = [0]
    if len(contours) > 1:
        parents = tree.reshape(-1, 4)[:, 3]
        largest = max(np.flatnonzero(parents < 0).tolist(), key=lambda i: cv2.contourArea(contours[i]))
        wanted = [largest, *np.flatnonzero(parents == largest).tolist()]
    rings = []
    for i in wanted:
        ring = ((_points(contours[i]) + 1) >> 1)[::-1]  # OpenCV goes the other way round
        moved = ring != _before(ring)
        rings.append(ring[moved[:, 0] | moved[:, 1]])
    return rings


def _starlike(ring: NDArray[np.int32]) -> bool:
    """Whether an open ring goes once around its middle and never back: such a ring, as most are, crosses nothing."""
    x, y = (ring - ring.sum(axis=0) // len(ring)).T
    next_x, next_y = _after(x), _after(y)
    return bool((x * next_y > y * next_x).all()) and np.count_nonzero((y < 0) & (next_y >= 0)) == 1


def _cross(rings: list[NDArray[np.int32]]) -> bool:
    """Whether any two edges of open rings touch, other than neighbours in their common point."""
    start = np.concatenate(rings)
    end = np.concatenate([_after(ring) for ring in rings])
    (dx, dy), (x, y), (end_x, end_y) = (end - start).T[..., None], start.T, end.T
    # On which side of edge i (rows) edge j (columns) begins and ends; each lies within a box, so 32 bits hold it.
    constant = dy * x[:, None] - dx * y[:, None]
    begins, ends = dx * y - dy * x + constant, dx * end_y - dy * end_x + constant
    straddles = (begins <= 0) & (ends >= 0) | (begins >= 0) & (ends <= 0)
    meet = straddles & straddles.T
    if np.count_nonzero(meet) == 3 * len(start):  # each itself and its two neighbours
        return False
    # Collinear edges straddle each other however far apart.
    low, high = np.minimum(start, end), np.maximum(start, end)
    meet &= np.all((low[:, None] <= high) & (low <= high[:, None]), axis=2)
    neighbours = np.all(start[:, None] == end, axis=2)
    return bool((meet & ~neighbours & ~neighbours.T & ~np.eye(len(start), dtype=bool)).any())


def _points(contour: Any) -> NDArray[np.int32]:
    """OpenCV's (N, 1, 2) -> (N, 2)."""
    return np.asarray(contour, np.int32).reshape(-1, 2)


def _before(ring: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.concatenate([ring[-1:], ring[:-1]])


def _after(ring: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.concatenate([ring[1:], ring[:1]])


def _closed(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([ring, ring[:1]])

"""Label image -> nuclei with their measurements, in level-0 coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

#: A line's length over that of the steps along pixels and their diagonals that follow it, in the mean over all
#: directions (Kulpa 1977, CGIP 6: 434).
_KULPA = math.pi / 8 * (1 + math.sqrt(2))


class Nucleus(NamedTuple):
    """One nucleus. Coordinates are level-0 px with pixel (0, 0) covering [0, 1) x [0, 1); sizes are µm."""

    id: int  # its value in the label image; 1, 2, … in raster order of the first pixel
    first_yx: tuple[int, int]  # topmost, then leftmost pixel
    bbox_xywh: tuple[int, int, int, int]
    centroid_xy: tuple[float, float]
    area_px: int
    area_um2: float
    perimeter_um: float
    major_um: float  # axes of the ellipse with the same second moments
    minor_um: float
    eccentricity: float
    solidity: float  # area over that of the convex hull of its pixels' squares
    haematoxylin: float  # mean optical density over its pixels, see `stains.haematoxylin`
    probability: float  # mean of the network's nucleus probability over its pixels
    mask: NDArray[np.bool_]  # (h, w) of the bounding box
    cut: bool = False  # larger than the halo of its block: a part of it may be missing


def measure(
    labels: NDArray[np.int32],
    probability: NDArray[np.float32],
    haematoxylin: NDArray[np.float32],
    origin_xy: tuple[int, int],
    mpp: float,
    min_area_um2: float = 0.0,
    min_probability: float = 0.0,
) -> list[Nucleus]:
    """Measure each label of a label image.

    Args:
        labels: (H, W) int32, 0 = background. Of a label in several pieces (8-connected) the largest is the nucleus.
        probability: (H, W) float32 in 0..1, the nucleus probability at the same pixels.
        haematoxylin: (H, W) float32, its optical density at the same pixels.
        origin_xy: level-0 position of pixel (0, 0).
        mpp: µm per level-0 px.
        min_area_um2: smaller labels, and smaller largest pieces, are left out.
        min_probability: so are those of a lower mean probability.

    Returns:
        Nuclei in the order of their labels; ids are the labels.
    """
    nuclei: list[Nucleus] = []
    for row in _table(labels, probability, haematoxylin):
        if row.area * mpp**2 < min_area_um2 or row.probability < min_probability:
            continue
        x, y = row.x, row.y
        mask = labels[y : y + row.height, x : x + row.width] == row.label
        outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        if len(outlines) > 1:
            piece = _largest_piece(mask) * np.int32(row.label)
            seen, stain = (of[y : y + row.height, x : x + row.width] for of in (probability, haematoxylin))
            corner = (x + origin_xy[0], y + origin_xy[1])
            nuclei += measure(piece, seen, stain, corner, mpp, min_area_um2, min_probability)
            continue
        hull_px = cv2.contourArea(cv2.convexHull(outlines[0])) + row.width + row.height - 1
        nuclei.append(
            Nucleus(
                id=row.label,
                first_yx=(y + origin_xy[1], x + int(mask[0].argmax()) + origin_xy[0]),
                bbox_xywh=(x + origin_xy[0], y + origin_xy[1], row.width, row.height),
                centroid_xy=(row.mean_x + 0.5 + x + origin_xy[0], row.mean_y + 0.5 + y + origin_xy[1]),
                area_px=row.area,
                area_um2=row.area * mpp**2,
                # Through the border pixels' centres, plus a half pixel's circle around it.
                perimeter_um=(_KULPA * cv2.arcLength(outlines[0], True) + math.pi) * mpp,
                major_um=row.major * mpp,
                minor_um=row.minor * mpp,
                eccentricity=row.eccentricity,
                # The hull of squares is that of their centres widened by a square.
                solidity=row.area / hull_px,
                haematoxylin=row.haematoxylin,
                probability=row.probability,
                mask=mask,
            )
        )
    return nuclei


class _Row(NamedTuple):
    """What follows from sums over a label's pixels; px, means from the bounding box's corner."""

    label: int
    x: int
    y: int
    width: int
    height: int
    area: int
    mean_x: float
    mean_y: float
    major: float
    minor: float
    eccentricity: float
    probability: float
    haematoxylin: float


def _table(
    labels: NDArray[np.int32], probability: NDArray[np.float32], haematoxylin: NDArray[np.float32]
) -> Iterator[_Row]:
    """A row for each label, ascending. Sums go over runs, rows of pixels of one label: some twenty times fewer."""
    begins = np.ones(labels.shape, np.bool_)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=begins[:, 1:])
    begin = np.flatnonzero(begins)
    value = labels.ravel()[begin]
    length = np.diff(begin, append=labels.size)
    if not begin.size:
        return
    sums = [np.add.reduceat(of.ravel(), begin) for of in (probability, haematoxylin)]
    kept = np.flatnonzero(value)
    # A stable sort by label: every label's runs one after the other, in raster order.
    kept = kept[np.argsort(value[kept], kind="stable")]
    value, length = value[kept], length[kept]
    y, x = np.divmod(begin[kept], labels.shape[1])
    first = np.flatnonzero(np.diff(value, prepend=0))
    if first.size == 0:
        return

    def total(term: NDArray[Any]) -> NDArray[Any]:
        result: NDArray[Any] = np.add.reduceat(term, first)
        return result

    area = total(length)
    x0, y0 = np.minimum.reduceat(x, first), y[first]
    width, height = np.maximum.reduceat(x + length, first) - x0, np.maximum.reduceat(y, first) + 1 - y0
    # Moments about each nucleus's own corner: integers, so exact wherever the block lies.
    of = np.repeat(np.arange(first.size), np.diff(first, append=value.size))
    a, y = x - x0[of], y - y0[of]
    along = length * a + length * (length - 1) // 2  # sum of x over the run
    squares = length * a * (a + length - 1) + (length - 1) * length * (2 * length - 1) // 6
    mean_x, mean_y = total(along) / area, total(length * y) / area
    var_x = total(squares) / area - mean_x**2
    var_y = total(length * y * y) / area - mean_y**2
    cov = total(along * y) / area - mean_x * mean_y
    spread = np.sqrt((var_x - var_y) ** 2 + 4 * cov**2)
    major, minor = (np.maximum(var_x + var_y + sign * spread, 0) / 2 for sign in (1, -1))
    eccentricity = np.sqrt(1 - np.divide(minor, major, out=np.ones_like(major), where=major > 0))
    axes = (4 * np.sqrt(major), 4 * np.sqrt(minor), eccentricity)
    means = (total(of[kept].astype(np.float64)) / area for of in sums)
    columns = [value[first], x0, y0, width, height, area, mean_x, mean_y, *axes, *means]
    yield from map(_Row._make, zip(*(column.tolist() for column in columns), strict=True))


def _largest_piece(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest of its 8-connected pieces; the first of equal ones."""
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    largest: NDArray[np.bool_] = pieces == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    return largest

"""Label image -> nuclei with their measurements, in level-0 coordinates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Nucleus:
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

    def renumbered(self, new_id: int) -> Nucleus:
        """The same nucleus under another id."""
        return replace(self, id=new_id)


def measure(
    labels: NDArray[np.int32],
    probability: NDArray[np.float32],
    haematoxylin: NDArray[np.float32],
    origin_xy: tuple[int, int],
    mpp: float,
) -> list[Nucleus]:
    """Measure each label of a label image.

    Args:
        labels: (H, W) int32, 0 = background.
        probability: (H, W) float32 in 0..1, the nucleus probability at the same pixels.
        haematoxylin: (H, W) float32, its optical density at the same pixels.
        origin_xy: level-0 position of pixel (0, 0).
        mpp: µm per level-0 px.

    Returns:
        Nuclei in the order of their labels; ids are the labels.
    """
    # A stable sort by label visits every nucleus's pixels once, in raster order.
    rows, cols = np.nonzero(labels)
    if rows.size == 0:
        return []
    values = labels[rows, cols]
    order = np.argsort(values, kind="stable")
    rows, cols, values = rows[order], cols[order], values[order]
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    areas = np.diff(np.r_[starts, values.size])
    probabilities, densities = (
        np.add.reduceat(values_of[rows, cols].astype(np.float64), starts) / areas
        for values_of in (probability, haematoxylin)
    )
    x_min, x_max = np.minimum.reduceat(cols, starts), np.maximum.reduceat(cols, starts)
    y_min, y_max = rows[starts], np.maximum.reduceat(rows, starts)
    # Moments about each nucleus's own corner: integers, so exact wherever the block lies.
    which = np.repeat(np.arange(starts.size), areas)
    x, y = cols - x_min[which], rows - y_min[which]
    sums = {
        name: np.add.reduceat(term, starts).astype(np.float64)
        for name, term in {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}.items()
    }
    mean_x, mean_y = sums["x"] / areas, sums["y"] / areas
    var_x = sums["xx"] / areas - mean_x**2
    var_y = sums["yy"] / areas - mean_y**2
    cov = sums["xy"] / areas - mean_x * mean_y
    spread = np.sqrt((var_x - var_y) ** 2 + 4 * cov**2)
    major, minor = ((var_x + var_y + sign * spread) / 2 for sign in (1, -1))
    minor = np.maximum(minor, 0)
    eccentricity = np.sqrt(1 - np.divide(minor, major, out=np.ones_like(major), where=major > 0))

    nuclei = []
    for i, start in enumerate(starts):
        box = (int(x_min[i]), int(y_min[i]), int(x_max[i] - x_min[i] + 1), int(y_max[i] - y_min[i] + 1))
        value = int(values[start])
        mask = labels[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] == value
        perimeter_px, hull_px = _outline(mask)
        nuclei.append(
            Nucleus(
                id=value,
                first_yx=(int(rows[start]) + origin_xy[1], int(cols[start]) + origin_xy[0]),
                bbox_xywh=(box[0] + origin_xy[0], box[1] + origin_xy[1], box[2], box[3]),
                centroid_xy=(
                    float(mean_x[i]) + 0.5 + box[0] + origin_xy[0],
                    float(mean_y[i]) + 0.5 + box[1] + origin_xy[1],
                ),
                area_px=int(areas[i]),
                area_um2=float(areas[i]) * mpp**2,
                perimeter_um=perimeter_px * mpp,
                major_um=4 * float(np.sqrt(major[i])) * mpp,
                minor_um=4 * float(np.sqrt(minor[i])) * mpp,
                eccentricity=float(eccentricity[i]),
                solidity=float(areas[i]) / hull_px,
                haematoxylin=float(densities[i]),
                probability=float(probabilities[i]),
                mask=mask,
            )
        )
    return nuclei


def _outline(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Perimeter and area of the convex hull, px.

    The perimeter goes through the border pixels' centres, plus a half pixel's circle around it. The hull of squares is
    that of their centres widened by a square, so its area is the centres' hull's plus its width, height and 1.
    """
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    length = sum(cv2.arcLength(contour, True) for contour in contours)
    hull = cv2.contourArea(cv2.convexHull(np.concatenate(contours)))
    return float(length) + float(np.pi), float(hull) + sum(mask.shape) - 1

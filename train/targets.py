"""Label map -> what the network should say, at its output stride."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def inner_distance(labels: NDArray[np.int32]) -> NDArray[np.float32]:
    """Per nucleus: Euclidean distance to its border over the largest one in it; 0 outside, 1 at the centre.

    Args:
        labels: (H, W) int32; ids may have gaps, nuclei may touch, and may have several pieces.

    Returns:
        (H, W) float32 in 0..1.
    """
    distance = np.zeros(labels.shape, np.float32)
    for value, box in _boxes(labels):
        # One pixel of background around the box, so that its edge counts as a border.
        mask = np.pad(labels[box] == value, 1).astype(np.uint8)
        depth = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
        # OpenCV's root differs in the last bit from run to run; the squares are whole numbers.
        depth = np.sqrt(np.rint(depth**2))
        inside = mask[1:-1, 1:-1] > 0
        distance[box][inside] = depth[inside] / depth.max()
    return distance


def _boxes(labels: NDArray[np.int32]) -> list[tuple[int, tuple[slice, slice]]]:
    """(label, bounding box) of each nucleus; scipy's find_objects, but for ids with large gaps."""
    rows, cols = np.nonzero(labels)
    if rows.size == 0:
        return []
    values, inverse = np.unique(labels[rows, cols], return_inverse=True)
    bounds = [np.full(values.size, fill) for fill in (labels.shape[0], -1, labels.shape[1], -1)]
    np.minimum.at(bounds[0], inverse, rows)
    np.maximum.at(bounds[1], inverse, rows)
    np.minimum.at(bounds[2], inverse, cols)
    np.maximum.at(bounds[3], inverse, cols)
    return [
        (int(value), (slice(int(y0), int(y1) + 1), slice(int(x0), int(x1) + 1)))
        for value, y0, y1, x0, x1 in zip(values, *bounds, strict=True)
    ]


def make_targets(labels: NDArray[np.int32], channels: tuple[str, ...], stride: int) -> NDArray[np.float32]:
    """Targets of each channel, averaged over stride x stride px: a border pixel gets its share of nucleus.

    Args:
        labels: (H, W) int32, sides multiples of `stride`.
        channels: of `nucleus`, `distance`.
        stride: px of the input for one px of output.

    Returns:
        (C, H/stride, W/stride) float32 in 0..1.
    """
    makers = {"nucleus": lambda: (labels > 0).astype(np.float32), "distance": lambda: inner_distance(labels)}
    size = (labels.shape[1] // stride, labels.shape[0] // stride)
    return np.stack([cv2.resize(makers[name](), size, interpolation=cv2.INTER_AREA) for name in channels])

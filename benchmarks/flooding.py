"""The slow reference for `nsam.runtime.watershed`: everything at level-0 px, flooding by a queue.

Seeds are the h-maxima of the smoothed distance (Soille 1999), and flooding from them runs down the distance (Vincent &
Soille 1991).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import watershed

from nsam.runtime.card import OutputSpec, PostSpec
from nsam.runtime.tiles import Grid


def flooded(
    maps: NDArray[np.float32], output: OutputSpec, post: PostSpec, grid: Grid, mpp: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Labels (H, W) int32 and probability of a slide whose maps (C, h, w) float32 have a `distance` channel."""
    width, height = grid.level0_wh
    x = (np.arange(width, dtype=np.float32) + 0.5) * grid.map_per_level0[0] - 0.5
    y = (np.arange(height, dtype=np.float32) + 0.5) * grid.map_per_level0[1] - 0.5
    at = [a.astype(np.float32) for a in np.meshgrid(x, y)]
    logits, distance = (
        cv2.remap(maps[i], *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        for i in (0, output.channels.index("distance"))
    )
    probability = 1 / (1 + np.exp(-logits))
    mask = probability > post.nucleus_threshold
    level = np.rint(np.clip(distance, 0, 2) * 1000).astype(np.uint16)
    level = cv2.GaussianBlur(level, (0, 0), max(0.3, post.smooth_um / mpp)) * mask
    cut = _reconstructed(cv2.subtract(level, round(post.seed_prominence * 1000)), level)
    tops = cut > _reconstructed(cv2.subtract(cut, 1), cut)
    seeds = cv2.connectedComponents(tops.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)[1]
    labels: Any = watershed(-level.astype(np.float64), seeds, mask=mask)
    areas = np.bincount(labels.ravel())
    means = np.bincount(labels.ravel(), probability.ravel()) / np.maximum(areas, 1)
    labels[((areas * mpp**2 < post.min_area_um2) | (means < post.min_probability))[labels]] = 0
    return labels, probability


def _reconstructed(marker: Any, level: Any) -> Any:
    """Geodesic reconstruction by dilation."""
    while True:
        risen = cv2.min(cv2.dilate(marker, np.ones((3, 3), np.uint8)), level)
        if np.array_equal(risen, marker):
            return marker
        marker = risen

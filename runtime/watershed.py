"""Maps -> label image: threshold, seeds, flooding. Local operations only, so blocks with a halo agree."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import watershed

from nsam.runtime.card import OutputSpec, PostSpec


def sigmoid(logit: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / (1 + exp(-x)) without overflow, float32."""
    result: NDArray[np.float32] = 0.5 * (1 + np.tanh(0.5 * logit))
    return result


def separate(
    maps: NDArray[np.float32], output: OutputSpec, post: PostSpec, mpp: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Separate nuclei in the maps of a region.

    A pixel is nucleus where its probability passes `post.nucleus_threshold`. Seeds are the components of the
    distance above `post.seed_threshold` inside it; flooding from them runs down the distance (Vincent & Soille
    1991). A nucleus that reached no seed is dropped, as is one smaller than `post.min_area_um2`.
    Without a `distance` channel the Euclidean distance inside the mask serves, scaled by its local maximum.

    Args:
        maps: (C, H, W) float32 as in the card's `output`.
        output: the card's channels.
        post: thresholds.
        mpp: µm per pixel of `maps`.

    Returns:
        labels (H, W) int32, 0 = background, ids without order; probability (H, W) float32.
    """
    probability = sigmoid(maps[0])
    mask = probability > post.nucleus_threshold
    given = "distance" in output.channels
    distance = maps[output.channels.index("distance")] if given else _relative_depth(mask, mpp)
    seeds = _components((distance > post.seed_threshold) & mask)
    # Flooding in 1/1000 steps: integer levels make ties, and so the result, independent of the block's origin.
    level = np.clip(-distance * 1000, -32767, 32767).astype(np.int16)
    flooded: Any = watershed(level, seeds, mask=mask)  # type: ignore[no-untyped-call]
    labels: NDArray[np.int32] = flooded.astype(np.int32, copy=False)
    return without_small(labels, post.min_area_um2 / mpp**2), probability


def _components(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    labels: Any = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)[1]
    result: NDArray[np.int32] = labels
    return result


def _relative_depth(mask: NDArray[np.bool_], mpp: float) -> NDArray[np.float32]:
    """Depth inside the mask over the depth of the widest part near by (6 µm): about 1 at each nucleus's middle."""
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
    reach = 2 * max(1, round(3 / mpp)) + 1
    widest = cv2.dilate(depth, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach)))
    relative = (depth / np.maximum(widest, 1)).astype(np.float32)
    smooth: Any = cv2.GaussianBlur(relative, (0, 0), max(0.5, 0.3 / mpp))
    result: NDArray[np.float32] = smooth
    return result


def without_small(labels: NDArray[np.int32], min_area_px: float) -> NDArray[np.int32]:
    """Labels without those of fewer pixels than `min_area_px`."""
    areas = np.bincount(labels.ravel())
    keep = np.where(areas >= min_area_px, np.arange(areas.size), 0).astype(np.int32)
    keep[0] = 0
    result: NDArray[np.int32] = keep[labels]
    return result

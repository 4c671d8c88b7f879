"""Maps -> label image: threshold, seeds, flooding. Local operations only, so blocks with a halo agree."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import watershed

from nsam.runtime.card import OutputSpec, PostSpec

_STEPS = 1000  # levels for a distance of 1
_TOP = 2.0  # a distance beyond is noise
_REACH_UM = 10.0  # half of the widest nucleus, and less than a block's halo


def sigmoid(logit: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / (1 + exp(-x)) without overflow, float32."""
    result: NDArray[np.float32] = 0.5 * (1 + np.tanh(0.5 * logit))
    return result


def separate(
    maps: NDArray[np.float32], output: OutputSpec, post: PostSpec, mpp: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Separate nuclei in the maps of a region.

    A pixel is nucleus where its probability passes `post.nucleus_threshold`. Seeds are the peaks of the smoothed
    distance that stand out by `post.seed_prominence` (h-maxima, Soille 1999); flooding from them runs down the
    distance (Vincent & Soille 1991). A nucleus without a seed is dropped, as is one below `post.min_area_um2`.
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
    # In whole steps, smoothing, ties, and so the result, do not depend on the block's origin.
    level = np.rint(np.clip(distance, 0, _TOP) * _STEPS).astype(np.uint16)
    level = np.asarray(cv2.GaussianBlur(level, (0, 0), max(0.3, post.smooth_um / mpp)), np.uint16)
    level[~mask] = 0
    seeds = _peaks(level, max(1, round(post.seed_prominence * _STEPS)), math.ceil(_REACH_UM / mpp))
    flooded: Any = watershed(_depth(level, seeds), seeds, mask=mask)  # type: ignore[no-untyped-call]
    labels: NDArray[np.int32] = flooded.astype(np.int32, copy=False)
    return without_small(labels, post.min_area_um2 / mpp**2), probability


def _peaks(level: NDArray[np.uint16], prominence: int, reach: int) -> NDArray[np.int32]:
    """Labels of the peaks from which every way to higher ground leads down by `prominence` or more.

    They are the regional maxima of what is left of the level after geodesic reconstruction from `prominence` below
    it. Ways longer than `reach` px are not followed, so that the answer is local.
    """
    cut = _reconstruct(cv2.subtract(level, prominence), level, reach)
    tops = cut > _reconstruct(cv2.subtract(cut, 1), cut, reach)
    labels: Any = cv2.connectedComponents(tops.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)[1]
    result: NDArray[np.int32] = labels
    return result


def _reconstruct(marker: Any, level: Any, reach: int) -> Any:
    """Geodesic reconstruction by dilation: `marker` spreads under `level`, `reach` px at most."""
    square = np.ones((3, 3), np.uint8)
    for _ in range(reach):
        risen = cv2.min(cv2.dilate(marker, square), level)
        if np.array_equal(risen, marker):
            break
        marker = risen
    return marker


def _depth(level: NDArray[np.uint16], seeds: NDArray[np.int32]) -> NDArray[np.float64]:
    """-level, where equal seed pixels differ by less than a step in raster order.

    skimage floods equals in the order of their discovery, but seeds have none: a heap's whim would decide, and another
    block would decide otherwise.
    """
    depth = -level.astype(np.float64)
    at = np.flatnonzero(seeds)
    depth.ravel()[at] += np.arange(at.size) / (at.size + 1)
    return depth


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

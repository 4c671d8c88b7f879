"""Maps -> basins, one for each nucleus, at the maps' own px. Local operations only, so blocks with a halo agree."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nsam.runtime.card import OutputSpec, PostSpec
from nsam.runtime.level0 import logit

_STEPS = 1000  # levels for a distance of 1
_TOP = 2.0  # a distance beyond is noise
_DEEPEST = 0xFFFF  # of 16 bits
_DEPTH_MPP = 0.3  # µm per px, at most, where depth inside the mask is measured
_REACH_UM = 20.0  # peaks farther apart are never one nucleus; less than a block's halo
#: Variance, map px², that smoothing adds because level-0 px lie between map px. Interpolating the distance there
#: does the same, and `smooth_um` was so defined.
_BETWEEN_PX2 = 1 / 8


def separate(maps: NDArray[np.float32], output: OutputSpec, post: PostSpec, mpp: float) -> NDArray[np.int32]:
    """Separate nuclei in the maps of a region, at the maps' own scale; `level0.carry` brings them to the slide's.

    A pixel is nucleus where its probability passes `post.nucleus_threshold`. Every such pixel belongs to the peak of
    the smoothed distance that steepest ascent leads to; a peak that does not stand out by `post.seed_prominence`
    joins the one behind its highest saddle (a watershed merged by persistence: Chazal et al., ToMATo, 2013). That
    is flooding from the h-maxima (Soille 1999), without a queue. A nucleus whose peak is lower is dropped.
    Without a `distance` channel the Euclidean distance inside the mask serves, scaled by its local maximum.

    Args:
        maps: (C, h, w) float32 as in the card's `output`.
        output: the card's channels.
        post: thresholds.
        mpp: µm per px of `maps`.

    Returns:
        (h, w) int32, 0 = background, ids in raster order of the peaks.
    """
    least = logit(post.nucleus_threshold)
    given = "distance" in output.channels
    distance = maps[output.channels.index("distance")] if given else _relative_depth(maps[0], least, mpp)
    # In whole steps, smoothing and ties, and so the result, do not depend on the block's origin.
    level = np.rint(np.clip(distance, 0, _TOP) * np.float32(_STEPS)).astype(np.uint16)
    sigma = float(np.hypot(post.smooth_um / mpp, np.sqrt(_BETWEEN_PX2)))
    level = np.asarray(cv2.GaussianBlur(level, (0, 0), sigma), np.uint16)
    level *= maps[0] > least
    return _basins(level, max(1, round(post.seed_prominence * _STEPS)), _REACH_UM / mpp)


def _basins(level: NDArray[np.uint16], prominence: int, reach: float) -> NDArray[np.int32]:
    """Label the pixels above 0 by the peak, higher than `prominence`, to which they belong."""
    edged = np.pad(level, 1)  # every pixel has eight neighbours
    width = edged.shape[1]
    flat = edged.ravel()
    at = np.flatnonzero(flat)
    # Rank 0, 1, … of a pixel among those above 0.
    rank = np.empty(flat.size, np.int32)
    rank[at] = np.arange(at.size, dtype=np.int32)
    up = rank[at + _ascent(edged, at)]
    peaks = np.flatnonzero(up == np.arange(at.size))
    up = _ends(up)
    number = np.empty(at.size, np.int32)
    number[peaks] = np.arange(1, peaks.size + 1)
    basin = np.zeros(flat.size, np.int32)
    basin[at] = number[up]
    heights = np.append(np.uint16(0), flat[at[peaks]])
    pairs, saddles = _saddles(basin, flat, at, width, heights, prominence)
    y, x = np.divmod(at[peaks], width)
    keep = _join(heights.tolist(), [0, *y.tolist()], [0, *x.tolist()], pairs, saddles, prominence, reach)
    labels: NDArray[np.int32] = keep[basin.reshape(edged.shape)[1:-1, 1:-1]]
    return labels


def _ends(to: NDArray[Any]) -> NDArray[Any]:
    """Where each way i -> to[i] -> to[to[i]] … ends, at an i that is its own `to[i]`."""
    while not np.array_equal(further := to[to], to):
        to = further
    return to


def _ascent(edged: NDArray[np.uint16], at: NDArray[np.intp]) -> NDArray[np.intp]:
    """Steps in the flat array from pixels `at` to the highest of their neighbours and themselves.

    Among equals the later in raster order counts as the higher: a total order has neither ties nor circles.
    """
    height, width = edged.shape
    around = [(dy, dx) for dy in (0, 1, 2) for dx in (0, 1, 2)]  # in raster order
    coded = edged << 4  # room for the place among the nine; _TOP * _STEPS * 16 fits
    best = np.zeros_like(edged)
    inner = best[1:-1, 1:-1]
    for place, (dy, dx) in enumerate(around):
        np.maximum(inner, coded[dy : dy + height - 2, dx : dx + width - 2] | np.uint16(place), out=inner)
    steps = np.array([(dy - 1) * width + dx - 1 for dy, dx in around])
    found: NDArray[np.intp] = steps[best.ravel()[at] & 15]
    return found


def _saddles(
    basin: NDArray[np.int32],
    level: NDArray[np.uint16],
    at: NDArray[np.intp],
    width: int,
    heights: NDArray[np.uint16],
    prominence: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (N, 2) of touching basins and their highest saddle (N,), highest first.

    Left out are those over whose saddle both peaks stand out: a basin that others have joined is no lower.
    """
    found = []
    own = basin[at]
    for step in (1, width - 1, width, width + 1):
        other = basin[at + step]
        border = np.flatnonzero((other != own) & (other > 0))
        here, a, b = at[border], own[border], other[border]
        saddle = np.minimum(level[here], level[here + step])
        shallow = np.flatnonzero(np.minimum(heights[a], heights[b]) - saddle < prominence)
        low, high = (choose(a, b)[shallow].astype(np.int64) for choose in (np.minimum, np.maximum))
        found.append((low << 40) | (high << 16) | (_DEEPEST - saddle[shallow]))
    # One number for first basin, second basin, depth: sorted, each pair begins with its highest saddle.
    codes = np.sort(np.concatenate(found))
    pairs, depths = codes >> 16, codes & _DEEPEST
    first = np.flatnonzero(np.diff(pairs, prepend=-1))
    first = first[np.argsort(depths[first], kind="stable")]
    pairs = pairs[first]
    return np.stack([pairs >> 24, pairs & 0xFFFFFF], axis=1), _DEEPEST - depths[first]


def _join(
    height: list[int],
    y: list[int],
    x: list[int],
    pairs: NDArray[np.int64],
    saddles: NDArray[np.int64],
    prominence: int,
    reach: float,
) -> NDArray[np.int32]:
    """The label of each basin 0, 1, …: that of the peak which it joins, or 0; in the peaks' order."""
    parent = list(range(len(height)))

    def root(basin: int) -> int:
        while parent[basin] != basin:
            parent[basin] = basin = parent[parent[basin]]
        return basin

    for (a, b), saddle in zip(pairs.tolist(), saddles.tolist(), strict=True):
        low, high = root(a), root(b)
        if (height[low], low) > (height[high], high):
            low, high = high, low
        if height[low] - saddle < prominence and (y[low] - y[high]) ** 2 + (x[low] - x[high]) ** 2 <= reach**2:
            parent[low] = high
    roots = _ends(np.array(parent))
    stands = (roots == np.arange(roots.size)) & (np.array(height) > prominence)
    labels: NDArray[np.int32] = np.where(stands, np.cumsum(stands), 0)[roots].astype(np.int32)
    return labels


def _relative_depth(logits: NDArray[np.float32], least: float, mpp: float) -> NDArray[np.float32]:
    """Depth inside the mask over the depth of the widest part near by (6 µm): about 1 at each nucleus's middle.

    Measured on px of .3 µm or less, as whole map px are coarse against the neck between two nuclei.
    """
    height, width = logits.shape
    finer = math.ceil(mpp / _DEPTH_MPP)
    mpp /= finer
    fine = cv2.resize(logits, (width * finer, height * finer), interpolation=cv2.INTER_LINEAR)
    depth = cv2.distanceTransform((fine > least).astype(np.uint8), cv2.DIST_L2, 5)
    reach = 2 * max(1, round(3 / mpp)) + 1
    widest = cv2.dilate(depth, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach)))
    relative = (depth / np.maximum(widest, 1)).astype(np.float32)
    smooth = cv2.GaussianBlur(relative, (0, 0), max(0.5, 0.3 / mpp))
    return np.asarray(cv2.resize(smooth, (width, height), interpolation=cv2.INTER_AREA), np.float32)

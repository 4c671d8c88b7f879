"""Dice, AJI, AJI+, PQ = DQ x SQ and F1 of label images, from one sparse table of overlaps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lap
import numpy as np
from numpy.typing import NDArray

#: Metrics that `Score` gives, in the order in which tables print them.
NAMES = ("dice", "aji", "aji_plus", "pq", "sq", "dq", "f1")


@dataclass(frozen=True)
class Score:
    """Sums from which each metric follows; scores add up, and pooling over images is adding them."""

    foreground_true: int = 0
    foreground_predicted: int = 0
    foreground_both: int = 0
    aji_intersection: int = 0
    aji_union: int = 0
    aji_plus_intersection: int = 0
    aji_plus_union: int = 0
    matched: int = 0  # pairs with IoU > .5
    matched_iou: float = 0.0
    count_true: int = 0
    count_predicted: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    @property
    def dice(self) -> float:
        """2|A∩B| / (|A|+|B|) of the foregrounds; 1 when both are empty."""
        return _ratio(2 * self.foreground_both, self.foreground_true + self.foreground_predicted)

    @property
    def aji(self) -> float:
        """Aggregated Jaccard index (Kumar et al., IEEE TMI 2017); predictions may be used twice."""
        return _ratio(self.aji_intersection, self.aji_union)

    @property
    def aji_plus(self) -> float:
        """AJI+ (Graham et al., HoVer-Net, 2019): one-to-one pairs of the largest total IoU."""
        return _ratio(self.aji_plus_intersection, self.aji_plus_union)

    @property
    def dq(self) -> float:
        """Detection quality: F1 of pairs with IoU > .5 (Kirillov et al., CVPR 2019)."""
        return _ratio(2 * self.matched, self.count_true + self.count_predicted)

    @property
    def sq(self) -> float:
        """Segmentation quality: mean IoU of those pairs; 1 when there was nothing to find, 0 without a pair."""
        return _ratio(self.matched_iou, self.matched) if self.matched else float(self.dq == 1)

    @property
    def pq(self) -> float:
        """Panoptic quality DQ x SQ."""
        return self.dq * self.sq

    @property
    def f1(self) -> float:
        """F1 of detection at IoU > .5: the same as DQ, under the name that counting papers use."""
        return self.dq

    def as_dict(self) -> dict[str, float]:
        """All metrics by name."""
        return {name: getattr(self, name) for name in NAMES}


def score(truth: NDArray[Any], predicted: NDArray[Any]) -> Score:
    """Compare a predicted label image with the true one.

    Args:
        truth: (H, W) integers, 0 = background; ids may have gaps, a nucleus may have several pieces.
        predicted: the same shape.

    Raises:
        ValueError: shapes differ, or a label image is no integer array.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"`predicted` must have the shape of `truth` {truth.shape}, has {predicted.shape}")
    for name, image in (("truth", truth), ("predicted", predicted)):
        if not np.issubdtype(image.dtype, np.integer):
            raise ValueError(f"`{name}` must hold integer labels, is {image.dtype}")
    t_flat, p_flat = _compact(truth), _compact(predicted)
    t_area, p_area = np.bincount(t_flat), np.bincount(p_flat)
    t_is, p_is = np.arange(t_area.size) > 0, np.arange(p_area.size) > 0
    both = (t_flat > 0) & (p_flat > 0)
    pairs, overlap = np.unique(t_flat[both] * p_area.size + p_flat[both], return_counts=True)
    t, p = np.divmod(pairs, p_area.size)
    union = t_area[t] + p_area[p] - overlap
    iou = overlap / union

    def aggregated(pairs: NDArray[np.intp]) -> tuple[int, int]:
        """Intersection and union over the chosen pairs; what is in none of them adds its area to the union."""
        missed, unused = t_is.copy(), p_is.copy()
        missed[t[pairs]] = False
        unused[p[pairs]] = False
        return int(overlap[pairs].sum()), int(union[pairs].sum() + t_area[missed].sum() + p_area[unused].sum())

    aji, aji_plus = aggregated(_best_of_each(t, iou)), aggregated(_one_to_one(t, p, iou))
    matched = iou > 0.5
    return Score(
        foreground_true=int(t_area[t_is].sum()),
        foreground_predicted=int(p_area[p_is].sum()),
        foreground_both=int(overlap.sum()),
        aji_intersection=aji[0],
        aji_union=aji[1],
        aji_plus_intersection=aji_plus[0],
        aji_plus_union=aji_plus[1],
        matched=int(matched.sum()),
        matched_iou=float(iou[matched].sum()),
        count_true=int(t_is.sum()),
        count_predicted=int(p_is.sum()),
    )


def _compact(labels: NDArray[Any]) -> NDArray[np.intp]:
    """Flat labels without gaps: 0 stays 0, the others become 1, 2, … in ascending order."""
    flat = labels.ravel()
    if flat.size and flat.min() >= 0 and flat.max() <= flat.size:  # a lookup, ten times as fast as sorting
        used = np.bincount(flat) > 0
        used[0] = False
        lookup: NDArray[np.intp] = np.where(used, np.cumsum(used), 0)
        compact: NDArray[np.intp] = lookup[flat]
        return compact
    ids, inverse = np.unique(np.append(flat, 0), return_inverse=True)
    order = np.where(ids == 0, 0, np.arange(ids.size) + (ids < 0))
    return order[inverse.ravel()[:-1]]


def mean_and_pooled(scores: Iterable[Score]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics averaged over images, each counting the same, and metrics of all images pooled as one."""
    scores = list(scores)
    mean = {name: float(np.mean([getattr(s, name) for s in scores])) for name in NAMES}
    return mean, sum(scores, Score()).as_dict()


def _ratio(numerator: float, denominator: float) -> float:
    """Nothing true and nothing predicted is a perfect score."""
    return numerator / denominator if denominator else 1.0


def _best_of_each(t: NDArray[np.intp], iou: NDArray[np.float64]) -> NDArray[np.intp]:
    """For each true nucleus that is touched, the pair of highest IoU."""
    order = np.lexsort((-iou, t))
    chosen: NDArray[np.intp] = order[np.r_[True, np.diff(t[order]) != 0][: order.size]]
    return chosen


def _one_to_one(t: NDArray[np.intp], p: NDArray[np.intp], iou: NDArray[np.float64]) -> NDArray[np.intp]:
    """Pairs in which each nucleus occurs once at most, of the largest total IoU."""
    rows, cols = np.unique(t, return_inverse=True)[1], np.unique(p, return_inverse=True)[1]
    if not iou.size:
        return np.zeros(0, np.intp)
    cost = np.ones((rows.max() + 1, cols.max() + 1))
    cost[rows, cols] -= iou
    index = np.full(cost.shape, -1, np.intp)
    index[rows, cols] = np.arange(iou.size)
    _, col_of_row, _ = lap.lapjv(cost, extend_cost=True)
    paired = np.flatnonzero(col_of_row >= 0)
    chosen: NDArray[np.intp] = index[paired, col_of_row[paired]]
    return chosen[chosen >= 0]

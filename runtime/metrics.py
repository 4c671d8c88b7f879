"""Dice, AJI, AJI+, PQ = DQ x SQ and F1 of label images, from one sparse table of overlaps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

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
    t_ids, t_flat = np.unique(truth, return_inverse=True)
    p_ids, p_flat = np.unique(predicted, return_inverse=True)
    t_flat, p_flat = t_flat.ravel(), p_flat.ravel()
    t_area, p_area = np.bincount(t_flat), np.bincount(p_flat)
    pair, overlap = np.unique(t_flat.astype(np.int64) * p_ids.size + p_flat, return_counts=True)
    t, p = pair // p_ids.size, pair % p_ids.size
    t_is, p_is = t_ids != 0, p_ids != 0
    inside = t_is[t] & p_is[p]
    t, p, overlap = t[inside], p[inside], overlap[inside]
    union = t_area[t] + p_area[p] - overlap
    iou = overlap / union

    matched = iou > 0.5
    aji = _aji(t, p, overlap, union, iou, t_area, p_area, t_is, p_is)
    plus = _aji_plus(t, p, overlap, union, iou, t_area, p_area, t_is, p_is)
    return Score(
        foreground_true=int(t_area[t_is].sum()),
        foreground_predicted=int(p_area[p_is].sum()),
        foreground_both=int(overlap.sum()),
        aji_intersection=aji[0],
        aji_union=aji[1],
        aji_plus_intersection=plus[0],
        aji_plus_union=plus[1],
        matched=int(matched.sum()),
        matched_iou=float(iou[matched].sum()),
        count_true=int(t_is.sum()),
        count_predicted=int(p_is.sum()),
    )


def mean_and_pooled(scores: Iterable[Score]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics averaged over images, each counting the same, and metrics of all images pooled as one."""
    scores = list(scores)
    mean = {name: float(np.mean([getattr(s, name) for s in scores])) for name in NAMES}
    return mean, sum(scores, Score()).as_dict()


def _ratio(numerator: float, denominator: float) -> float:
    """Nothing true and nothing predicted is a perfect score."""
    return numerator / denominator if denominator else 1.0


def _aji(t, p, overlap, union, iou, t_area, p_area, t_is, p_is) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    # For each true nucleus the prediction of highest IoU: sort by (nucleus, -IoU) and take each first.
    order = np.lexsort((-iou, t))
    best = order[np.flatnonzero(np.r_[True, np.diff(t[order]) != 0])] if order.size else order
    missed, unused = t_is.copy(), p_is.copy()
    missed[t[best]] = False
    unused[p[best]] = False
    return int(overlap[best].sum()), int(union[best].sum() + t_area[missed].sum() + p_area[unused].sum())


def _aji_plus(t, p, overlap, union, iou, t_area, p_area, t_is, p_is) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    table = np.zeros((t_area.size, p_area.size))
    table[t, p] = iou
    rows, cols = linear_sum_assignment(table, maximize=True)
    chosen = set(zip(rows[table[rows, cols] > 0].tolist(), cols[table[rows, cols] > 0].tolist(), strict=True))
    best = np.array([i for i, pair in enumerate(zip(t.tolist(), p.tolist(), strict=True)) if pair in chosen], int)
    missed, unused = t_is.copy(), p_is.copy()
    missed[t[best]] = False
    unused[p[best]] = False
    return int(overlap[best].sum()), int(union[best].sum() + t_area[missed].sum() + p_area[unused].sum())

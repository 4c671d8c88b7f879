"""Separation: peaks that stand out start a nucleus, and those that do not, do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nsam.runtime.card import OutputSpec, PostSpec
from nsam.runtime.watershed import separate, without_small

POST = PostSpec(seed_prominence=0.1, smooth_um=0.1, min_area_um2=0.0)


def two_bumps(saddle: float) -> np.ndarray:
    """A ridge of height 1 along x with a dip to `saddle` in its middle; (2, 30, 80) float32."""
    x = np.linspace(-1, 1, 80)
    along = np.where(np.abs(x) < 0.5, saddle + (1 - saddle) * (2 * np.abs(x)), 2 * (1 - np.abs(x)))
    across = np.clip(1.2 - np.abs(np.linspace(-1.5, 1.5, 30)), 0, 1)
    distance = np.minimum.outer(across, along)
    return np.stack([np.where(distance > 0.05, 5.0, -5.0), distance]).astype(np.float32)


@pytest.mark.parametrize(("saddle", "count"), [(0.5, 2), (0.8, 2), (0.93, 1), (1.0, 1)])
def test_a_dip_of_the_prominence_divides(saddle: float, count: int) -> None:
    labels, probability = separate(two_bumps(saddle), OutputSpec(), POST, 0.25)
    assert len(np.unique(labels)) - 1 == count
    assert probability.shape == labels.shape
    if count == 2:
        left, right = labels[15, 20], labels[15, 60]
        assert left != right
        assert abs(int((labels[15] == left).sum()) - int((labels[15] == right).sum())) <= 2


def test_smoothing_removes_peaks_of_noise() -> None:
    maps = two_bumps(1.0)
    maps[1] += np.random.default_rng(0).normal(0, 0.15, maps[1].shape).astype(np.float32)
    rough = separate(maps, OutputSpec(), POST, 0.25)[0]
    smooth = separate(maps, OutputSpec(), replace(POST, smooth_um=0.6), 0.25)[0]
    assert len(np.unique(rough)) > 5
    assert len(np.unique(smooth)) == 2


def test_nothing_above_the_threshold_is_nothing() -> None:
    maps = two_bumps(1.0)
    maps[0] = -5
    assert separate(maps, OutputSpec(), POST, 0.25)[0].max() == 0
    maps[0], maps[1] = 5, -1  # a mask without any distance has no seed
    assert separate(maps, OutputSpec(), POST, 0.25)[0].max() == 0


def test_small_nuclei_are_dropped_and_ids_stay() -> None:
    labels = np.array([[1, 1, 0, 3], [1, 1, 0, 3]], np.int32)
    assert without_small(labels, 3).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert without_small(labels, 2).tolist() == labels.tolist()

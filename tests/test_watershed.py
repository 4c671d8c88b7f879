"""Separation: peaks that stand out start a nucleus, and those that do not, do not; flooding agrees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from flooding import flooded
from numpy.typing import NDArray
from skimage.morphology import h_maxima

import nsam.runtime
from nsam.runtime.card import OutputSpec, PostSpec
from nsam.runtime.frame import Frame
from nsam.runtime.metrics import Score, mean_and_pooled, score
from nsam.runtime.pipeline import assemble, map_rows, separate_bands
from nsam.runtime.slides import ArraySlide
from nsam.runtime.watershed import _basins, separate
from nsam.train.data import find_samples, read_sample

POST = PostSpec(seed_prominence=0.1, smooth_um=0.05, min_area_um2=0.0)


def two_bumps(saddle: float) -> np.ndarray:
    """A ridge of height 1 along x with a dip to `saddle` in its middle; (2, 30, 80) float32."""
    x = np.linspace(-1, 1, 80)
    along = np.where(np.abs(x) < 0.5, saddle + (1 - saddle) * (2 * np.abs(x)), 2 * (1 - np.abs(x)))
    across = np.clip(1.2 - np.abs(np.linspace(-1.5, 1.5, 30)), 0, 1)
    distance = np.minimum.outer(across, along)
    return np.stack([np.where(distance > 0.05, 5.0, -5.0), distance]).astype(np.float32)


@pytest.mark.parametrize(("saddle", "count"), [(0.5, 2), (0.8, 2), (0.93, 1), (1.0, 1)])
def test_a_dip_of_the_prominence_divides(saddle: float, count: int) -> None:
    labels = separate(two_bumps(saddle), OutputSpec(), POST, 0.25)
    assert len(np.unique(labels)) - 1 == count
    if count == 2:
        left, right = labels[15, 20], labels[15, 60]
        assert left != right
        assert abs(int((labels[15] == left).sum()) - int((labels[15] == right).sum())) <= 2


def test_smoothing_removes_peaks_of_noise() -> None:
    maps = two_bumps(1.0)
    maps[1] += np.random.default_rng(0).normal(0, 0.15, maps[1].shape).astype(np.float32)
    rough = separate(maps, OutputSpec(), POST, 0.25)
    smooth = separate(maps, OutputSpec(), replace(POST, smooth_um=0.6), 0.25)
    assert len(np.unique(rough)) > 5
    assert len(np.unique(smooth)) == 2


def test_nothing_above_the_threshold_is_nothing() -> None:
    maps = two_bumps(1.0)
    maps[0] = -5
    assert separate(maps, OutputSpec(), POST, 0.25).max() == 0
    maps[0], maps[1] = 5, -1  # a mask without any distance has no peak
    assert separate(maps, OutputSpec(), POST, 0.25).max() == 0


def test_a_plateau_is_one_nucleus_and_peaks_far_apart_are_two() -> None:
    level = np.zeros((40, 60), np.uint16)
    level[5:35, 5:55] = 700
    assert np.unique(_basins(level, 100, 1000)).tolist() == [0, 1]
    level[20, 10] = level[20, 50] = 710
    assert np.unique(_basins(level, 100, 1000)).tolist() == [0, 1]
    assert np.unique(_basins(level, 100, 30)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("prominence", [20, 100, 300])
def test_nuclei_are_as_many_as_the_h_maxima_and_hold_one_each(prominence: int) -> None:
    rng = np.random.default_rng(prominence)
    level = cv2.GaussianBlur(rng.normal(0, 4000, (150, 220)), (0, 0), 2).clip(0, 2000).astype(np.uint16)
    labels = _basins(level, prominence, np.inf)
    # Theirs must stand out by the height, over the ground too; ours over the ground by more.
    count, peaks = cv2.connectedComponents(h_maxima(level, prominence).astype(np.uint8), connectivity=8)
    wanted = [np.unique(labels[(peaks == i) & (level > prominence)]).tolist() for i in range(1, count)]
    wanted = [found for found in wanted if found]
    assert sorted(wanted) == [[i] for i in range(1, labels.max() + 1)]
    assert len(wanted) > 20


def test_flooding_at_full_resolution_gives_the_same(data_dir: Path) -> None:
    """The default model's maps of real images: AJI and PQ of both ways; `benchmarks/separation.py` has all images."""
    engine = nsam.runtime.load(device="cpu", threads=1)
    card = engine.card
    scores: dict[str, list[Score]] = {"fast": [], "slow": [], "between": []}
    for source, every in (("nuinsseg", 110), ("tnbc", 12)):
        for sample in find_samples(data_dir / source)[::every]:
            image, truth = read_sample(sample)
            slide = ArraySlide(image, sample.image)
            frame = Frame.of(slide, card, sample.mpp)
            maps = np.concatenate(list(map_rows(slide, engine, frame)), axis=1)
            fast = np.concatenate([s.labels for s in assemble(separate_bands(iter([maps]), frame), frame)])
            slow = flooded(maps, card.output, card.post, frame.grid, sample.mpp)[0]
            for name, pair in {"fast": (truth, fast), "slow": (truth, slow), "between": (slow, fast)}.items():
                scores[name].append(score(*pair))
    fast, slow, between = (mean_and_pooled(scores[name])[0] for name in scores)
    for metric in ("dice", "aji", "pq"):
        assert fast[metric] == pytest.approx(slow[metric], abs=0.006), metric
        assert between[metric] > 0.97, metric


def discs(shape: tuple[int, int], *discs_yxr: tuple[float, float, float]) -> NDArray[np.float32]:
    """(1, h, w): a logit of 5 inside discs, -5 outside."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    inside = np.any([(y - cy) ** 2 + (x - cx) ** 2 <= r**2 for cy, cx, r in discs_yxr], axis=0)
    return np.where(inside, 5, -5).astype(np.float32)[None]


@pytest.mark.parametrize("mpp", [0.17, 0.25, 0.5, 1.0])
def test_a_mask_alone_divides_nuclei_that_touch(mpp: float) -> None:
    """Without a distance channel: two discs of 4 µm with a neck are two, a large one is one, and a small one stays."""
    output, post = OutputSpec(("nucleus",), ("logit",)), PostSpec(seed_prominence=0.15, smooth_um=0.3)

    def count(*discs_um: tuple[float, float, float]) -> int:
        side = round(60 / mpp)
        maps = discs((side, side), *(tuple(np.array(disc) / mpp) for disc in discs_um))
        labels = separate(maps, output, post, mpp)
        assert ((labels > 0) == (maps[0] > 0)).mean() > 0.999
        return len(np.unique(labels)) - 1

    assert count((20, 20, 4), (20, 27, 4)) == 2
    assert count((20, 20, 4), (20, 21, 4)) == 1
    assert count((20, 20, 10), (45, 45, 2)) == 2

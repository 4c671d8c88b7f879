"""The thresholds of post-processing, searched on inner validation images."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from nsam.runtime.card import PostSpec
from nsam.runtime.metrics import score
from nsam.runtime.pipeline import map_rows
from nsam.runtime.slides import ArraySlide
from nsam.runtime.tiles import Box, Grid, interpolate
from nsam.runtime.watershed import separate, without_small
from nsam.train.data import Sample, read_sample
from nsam.train.evaluate import TorchEngine

NUCLEUS_THRESHOLDS = (0.45, 0.5, 0.55, 0.6, 0.65)
SEED_PROMINENCES = (0.06, 0.1, 0.15)
SMOOTH_UM = (0.35, 0.5, 0.7)
MIN_AREAS_UM2 = (4.0, 8.0, 12.0)


def choose_post(samples: list[Sample], engine: TorchEngine) -> tuple[PostSpec, float]:
    """Thresholds of the highest mean of AJI and PQ over the images, by exhaustive search.

    Args:
        samples: inner validation images; never test images.
        engine: the trained network.

    Returns:
        The thresholds and what they reached.
    """
    card = engine.card
    floods = list(itertools.product(NUCLEUS_THRESHOLDS, SEED_PROMINENCES, SMOOTH_UM))
    reached = np.zeros((len(floods), len(MIN_AREAS_UM2)))
    for sample in samples:
        image, truth = read_sample(sample)
        slide = ArraySlide(image, sample.image)
        grid = Grid.of(slide.size_wh, sample.mpp, card.input.mpp, card.output.stride)
        maps = np.concatenate(list(map_rows(slide, engine, grid, batch=4)), axis=1)
        maps = interpolate(maps, (0, 0), Box(0, 0, *slide.size_wh), grid)
        for i, flood in enumerate(floods):
            post = _with(card.post, *flood, 0.0)
            # Nuclei are dropped after flooding, so one flood serves all areas.
            labels = separate(maps, card.output, post, sample.mpp)[0]
            for j, area in enumerate(MIN_AREAS_UM2):
                found = score(truth, without_small(labels, area / sample.mpp**2))
                reached[i, j] += (found.aji + found.pq) / 2 / len(samples)
    best, smallest = np.unravel_index(reached.argmax(), reached.shape)
    return _with(card.post, *floods[best], MIN_AREAS_UM2[smallest]), float(reached.max())


def _with(post: PostSpec, nucleus: float, prominence: float, smooth: float, area: float) -> PostSpec:
    return replace(post, nucleus_threshold=nucleus, seed_prominence=prominence, smooth_um=smooth, min_area_um2=area)

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

NUCLEUS_THRESHOLDS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
SEED_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
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
    reached = np.zeros((len(NUCLEUS_THRESHOLDS), len(SEED_THRESHOLDS), len(MIN_AREAS_UM2)))
    for sample in samples:
        image, truth = read_sample(sample)
        slide = ArraySlide(image, sample.image)
        grid = Grid.of(slide.size_wh, sample.mpp, card.input.mpp, card.output.stride)
        maps = np.concatenate(list(map_rows(slide, engine, grid, batch=4)), axis=1)
        maps = interpolate(maps, (0, 0), Box(0, 0, *slide.size_wh), grid)
        for (i, nucleus), (j, seed) in itertools.product(enumerate(NUCLEUS_THRESHOLDS), enumerate(SEED_THRESHOLDS)):
            post = replace(card.post, nucleus_threshold=nucleus, seed_threshold=seed, min_area_um2=0.0)
            # Nuclei are dropped after flooding, so one flood serves all areas.
            labels = separate(maps, card.output, post, sample.mpp)[0]
            for k, area in enumerate(MIN_AREAS_UM2):
                found = score(truth, without_small(labels, area / sample.mpp**2))
                reached[i, j, k] += (found.aji + found.pq) / 2 / len(samples)
    i, j, k = np.unravel_index(reached.argmax(), reached.shape)
    post = replace(
        card.post,
        nucleus_threshold=NUCLEUS_THRESHOLDS[i],
        seed_threshold=SEED_THRESHOLDS[j],
        min_area_um2=MIN_AREAS_UM2[k],
    )
    return post, float(reached.max())

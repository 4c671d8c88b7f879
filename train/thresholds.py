"""The thresholds of post-processing, searched on inner validation images."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from nsam.runtime.card import PostSpec
from nsam.runtime.frame import Frame
from nsam.runtime.metrics import score
from nsam.runtime.pipeline import assemble, map_rows, separate_bands
from nsam.runtime.slides import ArraySlide
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
    choices = [
        replace(card.post, nucleus_threshold=nucleus, seed_prominence=prominence, smooth_um=smooth, min_area_um2=area)
        for nucleus, prominence, smooth, area in itertools.product(
            NUCLEUS_THRESHOLDS, SEED_PROMINENCES, SMOOTH_UM, MIN_AREAS_UM2
        )
    ]
    reached = np.zeros(len(choices))
    for sample in samples:
        image, truth = read_sample(sample)
        slide = ArraySlide(image, sample.image)
        frame = Frame.of(slide, card, sample.mpp)
        rows = list(map_rows(slide, engine, frame))
        for i, post in enumerate(choices):
            chosen = Frame.of(slide, replace(card, post=post), sample.mpp)
            strips = assemble(separate_bands(iter(rows), chosen), chosen)
            found = score(truth, np.concatenate([strip.labels for strip in strips]))
            reached[i] += (found.aji + found.pq) / 2 / len(samples)
    return choices[reached.argmax()], float(reached.max())

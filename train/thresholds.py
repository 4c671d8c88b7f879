"""The thresholds of post-processing, searched on inner validation images."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from nsam.runtime.card import PostSpec
from nsam.runtime.frame import Frame
from nsam.runtime.metrics import score
from nsam.runtime.pipeline import assemble, map_rows, separate_bands
from nsam.runtime.slides import ArraySlide, read_input
from nsam.runtime.tiles import Box
from nsam.train.augment import random_look
from nsam.train.data import Sample, read_sample
from nsam.train.evaluate import TorchEngine

#: Fields of `PostSpec` and what is tried for each.
CHOICES: dict[str, tuple[float, ...]] = {
    "nucleus_threshold": (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7),
    "min_probability": (0.0, 0.6, 0.65, 0.7, 0.75, 0.775, 0.8, 0.825, 0.85, 0.875),
    "seed_prominence": (0.06, 0.1, 0.15, 0.2, 0.25),
    "smooth_um": (0.2, 0.35, 0.5, 0.7),
    "min_area_um2": (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0),
}
ROUNDS = 3


def choose_post(samples: list[Sample], engine: TorchEngine, looks: bool = False) -> tuple[PostSpec, float]:
    """Thresholds of the highest mean of AJI and PQ, one after the other until none can be bettered.

    Args:
        samples: inner validation images; never test images.
        engine: the trained network.
        looks: whether each image is also seen as another laboratory might show it: thresholds that fit one look too
            closely drop the nuclei of another.

    Returns:
        The thresholds and what they reached; the engine's own where no image has a nucleus.
    """
    card = engine.card
    seen = []
    for i, sample in enumerate(samples):
        image, truth = read_sample(sample)
        slide = ArraySlide(image, sample.image)
        frame = Frame.of(slide, card, sample.mpp)
        seen.append((slide, sample.mpp, list(map_rows(slide, engine, frame)), truth))
        if looks:  # at the network's scale, as in training: noise and blur of finer px would hardly reach the network
            shrunk = read_input(slide, Box(0, 0, *frame.grid.input_wh), frame.grid)
            other = ArraySlide(random_look(shrunk, np.random.default_rng(i)), sample.image)
            rows = list(map_rows(other, engine, Frame.of(other, card, card.input.mpp)))
            seen.append((slide, sample.mpp, rows, truth))

    if not any(truth.any() for *_, truth in seen):
        return card.post, 0.0  # whatever finds nothing would be best

    @cache  # later rounds come back to what was tried
    def reached(post: PostSpec) -> float:
        total = 0.0
        for slide, mpp, rows, truth in seen:
            frame = Frame.of(slide, replace(card, post=post), mpp)
            strips = assemble(separate_bands(iter(rows), frame), frame)
            found = score(truth, np.concatenate([strip.labels for strip in strips]))
            total += (found.aji + found.pq) / 2 / len(seen)
        return total

    best, most = card.post, reached(card.post)
    for _ in range(ROUNDS):
        before = best
        for name, values in CHOICES.items():
            for value in values:
                post = replace(best, **{name: value})
                if post != best and (now := reached(post)) > most:
                    best, most = post, now
        if best == before:
            break
    return best, most

"""Scores with the runtime's own pipeline; thresholds chosen on the inner validation images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nsam.runtime.card import ModelCard, PostSpec
from nsam.runtime.metrics import Score, mean_and_pooled, score
from nsam.runtime.pipeline import map_rows, segment_slide
from nsam.runtime.slides import ArraySlide
from nsam.runtime.tiles import Box, Grid, interpolate
from nsam.runtime.watershed import separate
from nsam.train.data import Sample, read_sample
from nsam.train.settings import Settings

NUCLEUS_THRESHOLDS = (0.4, 0.45, 0.5, 0.55, 0.6)
SEED_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
MIN_AREAS_UM2 = (4.0, 8.0, 12.0)


class TorchEngine:
    """The runtime's `Engine`, run by torch in fp32: the network under training passes through what ships."""

    def __init__(self, model: nn.Module, card: ModelCard, device: torch.device) -> None:
        self.card = card
        self.device = f"{device} (torch {torch.__version__})"
        self._model = model
        self._device = device

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, S, S, 3) uint8 -> (N, C, S/stride, S/stride) float32."""
        maps: NDArray[np.float32] = self._model(torch.from_numpy(images).to(self._device)).cpu().numpy()
        return maps


def draft_card(settings: Settings, post: PostSpec | None = None) -> ModelCard:
    """The card of a model under training; export completes it."""
    post = replace(post or PostSpec(), tile_halo_px=settings.tile_halo)
    return ModelCard("nsam", "0", "Apache-2.0", input=settings.input, output=settings.output, post=post)


def with_post(engine: TorchEngine, post: PostSpec) -> TorchEngine:
    """The same engine under other thresholds."""
    return TorchEngine(engine._model, replace(engine.card, post=post), engine._device)


def score_samples(samples: Iterable[Sample], engine: Any) -> Iterator[tuple[Sample, Score]]:
    """Each sample's score at its native resolution, through `segment_slide`."""
    for sample in samples:
        image, truth = read_sample(sample)
        strips = segment_slide(ArraySlide(image, sample.image), engine, sample.mpp)
        yield sample, score(truth, np.concatenate([strip.labels for strip in strips]))


def choose_post(
    samples: list[Sample], engine: TorchEngine, on_progress: Callable[[int, int], None] | None = None
) -> tuple[PostSpec, float]:
    """Thresholds of the highest mean of AJI and PQ over the images, by exhaustive search.

    Args:
        samples: inner validation images; never test images.
        engine: the trained network.
        on_progress: called with (images done, images in all).

    Returns:
        The thresholds and what they reached.
    """
    card = engine.card
    grid_of = list(itertools.product(NUCLEUS_THRESHOLDS, SEED_THRESHOLDS, MIN_AREAS_UM2))
    reached = np.zeros(len(grid_of))
    for done, sample in enumerate(samples):
        image, truth = read_sample(sample)
        slide = ArraySlide(image, sample.image)
        grid = Grid.of(slide.size_wh, sample.mpp, card.input.mpp, card.output.stride)
        maps = np.concatenate(list(map_rows(slide, engine, grid, batch=4)), axis=1)
        maps = interpolate(maps, (0, 0), Box(0, 0, *slide.size_wh), grid)
        for i, (nucleus, seed, area) in enumerate(grid_of):
            post = replace(card.post, nucleus_threshold=nucleus, seed_threshold=seed, min_area_um2=area)
            found = score(truth, separate(maps, card.output, post, sample.mpp)[0])
            reached[i] += (found.aji + found.pq) / 2 / len(samples)
        if on_progress:
            on_progress(done + 1, len(samples))
    nucleus, seed, area = grid_of[int(reached.argmax())]
    post = replace(card.post, nucleus_threshold=nucleus, seed_threshold=seed, min_area_um2=area)
    return post, float(reached.max())


def report(scored: list[tuple[Sample, Score]]) -> dict[str, Any]:
    """Metrics as `metrics.json` holds them: per image mean, pooled, by group, counts, and each image."""
    mean, pooled = mean_and_pooled(s for _, s in scored)
    groups = sorted({sample.group for sample, _ in scored})
    return {
        "images": len(scored),
        "nuclei_true": sum(s.count_true for _, s in scored),
        "nuclei_predicted": sum(s.count_predicted for _, s in scored),
        "mean": mean,
        "pooled": pooled,
        "groups": {g: mean_and_pooled(s for sample, s in scored if sample.group == g)[0] for g in groups},
        "per_image": {sample.name: s.as_dict() for sample, s in scored},
    }

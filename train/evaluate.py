"""Scores with the runtime's own pipeline; thresholds chosen on the inner validation images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nsam.runtime.card import ModelCard, PostSpec
from nsam.runtime.engines import Engine
from nsam.runtime.metrics import Score, mean_and_pooled, score
from nsam.runtime.pipeline import segment_slide
from nsam.runtime.slides import ArraySlide
from nsam.train.checkpoint import load_fold
from nsam.train.data import Sample, read_sample
from nsam.train.settings import Settings


class TorchEngine(Engine):
    """The runtime's `Engine`, run by torch in fp32: the network under training passes through what ships."""

    def __init__(self, model: nn.Module, card: ModelCard, device: torch.device) -> None:
        self.card = card
        self.precision = "torch"
        self.device = f"{device} (torch {torch.__version__})"
        self._model = model
        self._device = device

    @classmethod
    def of_fold(cls, fold_dir: Path, device: torch.device) -> TorchEngine:
        """The best network of a run's fold."""
        model, settings = load_fold(fold_dir)
        return cls(model.to(device), draft_card(settings), device)

    def with_post(self, post: PostSpec) -> TorchEngine:
        """The same network under other thresholds."""
        return TorchEngine(self._model, replace(self.card, post=post), self._device)

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, S, S, 3) uint8 -> (N, C, S/stride, S/stride) float32."""
        maps: NDArray[np.float32] = self._model(torch.from_numpy(images).to(self._device)).cpu().numpy()
        return maps


def draft_card(settings: Settings, post: PostSpec | None = None) -> ModelCard:
    """The card of a model under training; export completes it."""
    post = replace(post or PostSpec(), tile_halo_px=settings.tile_halo)
    return ModelCard("nsam", "0", "Apache-2.0", input=settings.input, output=settings.output, post=post)


def score_samples(samples: Iterable[Sample], engine: Any) -> Iterator[tuple[Sample, Score]]:
    """Each sample's score at its native resolution, through `segment_slide`."""
    for sample in samples:
        image, truth = read_sample(sample)
        yield sample, score(truth, segment_sample(image, sample, engine))


def segment_sample(image: NDArray[np.uint8], sample: Sample, engine: Any) -> NDArray[np.int32]:
    """Labels (H, W) of a sample's image, on the path of `nsam-infer`."""
    strips = segment_slide(ArraySlide(image, sample.image), engine, sample.mpp)
    return np.concatenate([strip.labels for strip in strips])


def score_with_progress(samples: list[Sample], engine: Any, say: Callable[[str], None]) -> list[tuple[Sample, Score]]:
    """All of `score_samples`, with a line for every twenty."""
    scored = []
    for pair in score_samples(samples, engine):
        scored.append(pair)
        if len(scored) % 20 == 0:
            say(f"test {len(scored)}/{len(samples)}")
    return scored


def report(scored: list[tuple[Sample, Score]]) -> dict[str, Any]:
    """Metrics as `metrics.json` holds them: per image mean, pooled, by group, counts, and each image."""
    mean, pooled = mean_and_pooled(s for _, s in scored) if scored else ({}, {})
    groups = sorted({sample.group for sample, _ in scored})
    return {
        "images": len(scored),
        "nuclei_true": sum(s.count_true for _, s in scored),
        "nuclei_predicted": sum(s.count_predicted for _, s in scored),
        "mean": mean,
        "pooled": pooled,
        "groups": {g: mean_and_pooled(s for sample, s in scored if sample.group == g)[0] for g in groups},
        "per_image": {sample.name: {"group": sample.group, **s.as_dict()} for sample, s in scored},
    }

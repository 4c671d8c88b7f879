"""Endless random views of the training images; view number i depends on the seed and i alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nsam.train.augment import random_look, random_scale, random_view
from nsam.train.data import Sample, read_sample
from nsam.train.settings import Settings
from nsam.train.targets import make_targets

#: Targets are made on a wider crop: a nucleus cut by the crop's edge keeps its true centre.
MARGIN = 32


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Index -> (image uint8 (S, S, 3), targets float32 (C, S/stride, S/stride)).

    Images are held in memory. Since a view is a function of its index, workers and resuming change nothing.
    """

    def __init__(self, samples: list[Sample], settings: Settings, length: int) -> None:
        self._settings = settings
        self._length = length
        self._scales = [sample.mpp / settings.mpp for sample in samples]
        self._images = [read_sample(sample) for sample in samples]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        s = self._settings
        epoch, place = divmod(index, len(self._images))
        which = np.random.default_rng((s.seed, epoch)).permutation(len(self._images))[place]
        rng = np.random.default_rng((s.seed, 1 << 20, index))
        image, labels = self._images[which]
        scale = self._scales[which] * random_scale(rng, s.scale_low, s.scale_high)
        size = s.crop + 2 * MARGIN
        image, labels = random_view(image, labels, size, scale, rng, turn=s.turn)
        inner = slice(MARGIN, -MARGIN)
        image = np.ascontiguousarray(image[inner, inner])
        if s.look:
            image = random_look(image, rng)
        edge = MARGIN // s.stride
        targets = make_targets(labels, s.channels, s.stride)[:, edge:-edge, edge:-edge]
        return torch.from_numpy(image), torch.from_numpy(np.ascontiguousarray(targets))


def batches(views: Views, batch: int, first_step: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of views from `first_step` on, in the order of their indices."""
    return iter(
        DataLoader(
            views,
            batch_size=batch,
            sampler=range(first_step * batch, len(views)),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )
    )

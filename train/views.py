"""Endless random views of the training images; view number i depends on the seed and i alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nsam.train.augment import random_look, random_scale, random_view
from nsam.train.data import Sample, read_sample
from nsam.train.parallel import ALONE, Group
from nsam.train.settings import Settings
from nsam.train.targets import make_targets


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Index -> (image uint8 (S, S, 3), targets float32 (C, S/stride, S/stride)).

    Images and their targets, made once at native scale, are held in memory: 1.3 MB for 512 x 512. Since a view is a
    function of its index, workers and resuming change nothing.
    """

    def __init__(self, samples: list[Sample], settings: Settings, length: int) -> None:
        self._settings = settings
        self._length = length
        self._scales = [sample.mpp / settings.mpp for sample in samples]
        self._images = []
        for sample in samples:
            image, labels = read_sample(sample)
            targets = make_targets(labels, settings.channels, stride=1).transpose(1, 2, 0)
            self._images.append((image, np.rint(targets * 255).astype(np.uint8)))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        s = self._settings
        epoch, place = divmod(index, len(self._images))
        which = np.random.default_rng((s.seed, epoch)).permutation(len(self._images))[place]
        rng = np.random.default_rng((s.seed, 1 << 20, index))
        scale = self._scales[which] * random_scale(rng, s.scale_low, s.scale_high)
        image, targets = random_view(*self._images[which], s.crop, s.stride, scale, rng, turn=s.turn)
        if rng.random() < s.look:
            image = random_look(image, rng)
        channels = np.ascontiguousarray(targets.transpose(2, 0, 1), np.float32) / 255
        return torch.from_numpy(image), torch.from_numpy(channels)


def batches(
    views: Views, batch: int, first_step: int, workers: int, group: Group = ALONE
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of each batch of views from `first_step` on, in the order of their indices."""
    share = batch // group.size
    return iter(
        DataLoader(
            views,
            batch_size=share,
            sampler=[
                first + i
                for first in range(first_step * batch + group.rank * share, len(views), batch)
                for i in range(share)
            ],
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )
    )

"""BCE and soft Dice for the nucleus channel, squared error for the distance inside nuclei and a thin ring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsam.train.parallel import ALONE, Group

RING_PX = 3  # output px around a nucleus where its distance must be 0
DISTANCE = 6.0  # weight of that term: its errors are some .1 and are squared
TOUCHING = 4.0  # by which a border between two nuclei outweighs other px: the nucleus channel does not show it


def map_losses(
    maps: Tensor, targets: Tensor, channels: tuple[str, ...], dice: bool, group: Group = ALONE
) -> dict[str, Tensor]:
    """Loss terms by name; training minimises their sum.

    Ratios are of sums over the whole batch, whichever process has which part of it.

    Args:
        maps: (N, C, h, w) float32, as the network gives them.
        targets: the same shape, from `targets.make_targets`.
        channels: names of C.
        dice: whether soft Dice joins the BCE.
        group: the processes that share the batch.
    """
    terms = {}
    for i, name in enumerate(channels):
        if name == "nucleus":
            terms["bce"] = F.binary_cross_entropy_with_logits(maps[:, i], targets[:, i])
            if dice:
                terms["dice"] = soft_dice(maps[:, i].sigmoid(), targets[:, i], group)
        elif name == "distance":
            near = F.max_pool2d((targets[:, 0:1] > 0).float(), 2 * RING_PX + 1, 1, RING_PX)[:, 0]
            amid = -F.max_pool2d(-targets[:, 0:1], 3, 1, 1)[:, 0]  # 1 where all px around are nucleus
            weight = near * (1 + TOUCHING * amid * (1 - targets[:, i]) ** 4)
            # Squared: where a border may be in several places, the mean of them is a valley; their median is none.
            error = (maps[:, i] - targets[:, i]) ** 2
            terms["distance"] = DISTANCE * group.sum((error * weight).sum()) / group.sum(near.sum()).clamp(min=1)
    return terms


def soft_dice(probability: Tensor, target: Tensor, group: Group = ALONE) -> Tensor:
    """1 - Dice over the whole batch (Milletari et al., V-Net, 2016): crops without nuclei do no harm."""
    both, either = group.sum(torch.stack([(probability * target).sum(), probability.sum() + target.sum()]))
    return 1 - (2 * both + 1) / (either + 1)


def total(terms: dict[str, Tensor]) -> Tensor:
    """Sum of the terms."""
    return torch.stack(list(terms.values())).sum()

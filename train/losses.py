"""BCE and soft Dice for the nucleus channel, smooth L1 for the distance inside nuclei and a thin ring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsam.train.parallel import ALONE, Group

RING_PX = 3  # output px around a nucleus where its distance must be 0


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
            error = F.smooth_l1_loss(maps[:, i], targets[:, i], beta=0.1, reduction="none")
            terms["distance"] = 2 * group.sum((error * near).sum()) / group.sum(near.sum()).clamp(min=1)
    return terms


def soft_dice(probability: Tensor, target: Tensor, group: Group = ALONE) -> Tensor:
    """1 - Dice over the whole batch (Milletari et al., V-Net, 2016): crops without nuclei do no harm."""
    both, either = group.sum(torch.stack([(probability * target).sum(), probability.sum() + target.sum()]))
    return 1 - (2 * both + 1) / (either + 1)


def total(terms: dict[str, Tensor]) -> Tensor:
    """Sum of the terms."""
    return torch.stack(list(terms.values())).sum()

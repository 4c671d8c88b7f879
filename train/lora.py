"""LoRA (Hu et al., ICLR 2022): a frozen weight W becomes W + (alpha / rank) B A, with only A and B trained.

It is a parametrisation of the weight: modules and their forward stay as they are, and folding it in is one call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """W -> W + scale * B A. B starts at zero, so a new adapter changes nothing."""

    def __init__(self, out_features: int, in_features: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out, in)."""
        return weight + self.scale * (self.b @ self.a)


def add_lora(module: nn.Module, rank: int = 4, alpha: float = 4.0) -> list[str]:
    """Put LoRA on every `Linear` inside `module` and freeze their own weights.

    The whole of an attention's qkv is adapted: in TinyViT its rows are interleaved per head, so taking slices
    of it for q and v would adapt the wrong ones.

    Args:
        module: for MobileSAM the stages of the encoder.
        rank: inner dimension; `alpha / rank` scales the update.

    Returns:
        Names of the adapted layers within `module`.

    Raises:
        ValueError: rank below 1, or `module` has LoRA already.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, is {rank}")
    if has_lora(module):
        raise ValueError("`module` has LoRA already; merge it before adding another")
    names = []
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            layer.requires_grad_(False)
            update = LowRank(layer.out_features, layer.in_features, rank, alpha)
            parametrize.register_parametrization(layer, "weight", update.to(layer.weight.device))
            names.append(name)
    return names


def has_lora(module: nn.Module) -> bool:
    """Whether any layer of `module` carries LoRA."""
    return any(isinstance(m, LowRank) for m in module.modules())


def merge_lora(module: nn.Module) -> int:
    """Fold LoRA into the weights, in float64, and remove it; returns the number of layers merged.

    Raises:
        ValueError: there is none left to merge: a second merge would be a mistake of the caller.
    """
    if not has_lora(module):
        raise ValueError("`module` has no LoRA; it was merged before, or never had any")
    merged = 0
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            update = layer.parametrizations.weight[0]
            base = layer.parametrizations.weight.original
            folded = base.double() + update.scale * (update.b.double() @ update.a.double())
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            with torch.no_grad():
                layer.weight.copy_(folded.to(layer.weight.dtype))
            merged += 1
    return merged

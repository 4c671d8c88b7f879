"""Optimiser, schedule and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from nsam.train.settings import Settings


def make_optimiser(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Adam or AdamW: B of LoRA at `lora_plus` times the rate, vectors and embeddings without decay."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_b = ".parametrizations." in name and name.endswith(".b")
            decays = parameter.ndim > 1 and "attention_biases" not in name and "embed" not in name
            key = (settings.lr * (settings.lora_plus if is_b else 1), settings.weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
    options = [{"params": members, "lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()]
    cls = torch.optim.AdamW if settings.optimiser == "adamw" else torch.optim.Adam
    return cls(options, fused=True)  # one pass over the weights, and with loss scaling the host waits for no step


def make_schedule(optimiser: torch.optim.Optimizer, settings: Settings, steps: int) -> LambdaLR:
    """Linear warm-up over a share of the steps, then half a cosine to zero, or constant."""
    warmup = max(1, round(settings.warmup * steps)) if settings.warmup else 0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if not settings.cosine:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimiser, factor)


class Ema:
    """Exponential moving average of trainable weights and running statistics; young averages forget faster."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._updates = 0
        self.shadow = {name: value.detach().clone() for name, value in _averaged(model)} if decay else {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step of the model in."""
        if not self._decay:
            return
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        pairs = [(self.shadow[name], value) for name, value in _averaged(model)]
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)
        self.shadow["updates"] = torch.tensor(self._updates)

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Go on from a saved average."""
        self.shadow = shadow
        self._updates = int(shadow["updates"]) if shadow else 0

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model is in eval mode and has the averaged weights."""
        own = {name: value.detach().clone() for name, value in _averaged(model)} if self._decay else {}
        self._put(model, self.shadow)
        # Leaving and entering eval mode makes TinyViT forget attention biases that it looked up before.
        model.train().eval()
        try:
            yield
        finally:
            self._put(model, own)
            model.train()

    @staticmethod
    @torch.no_grad()
    def _put(model: nn.Module, values: dict[str, Tensor]) -> None:
        for name, value in _averaged(model):
            if name in values:
                value.copy_(values[name])


def _averaged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            yield name, buffer

"""One step of training: forward, backward, optimiser, in the working precision; and all that it changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nsam.train.checkpoint import load_trained
from nsam.train.losses import map_losses, total
from nsam.train.model import NucleusNet
from nsam.train.optim import Ema, make_optimiser, make_schedule
from nsam.train.parallel import ALONE, Group
from nsam.train.settings import Settings


class TrainState:
    """A network under training with its optimiser, schedule, loss scaling and moving average.

    Args:
        model: as `checkpoint.build_model` makes it, on the device where it is to be trained.
        settings: those of its fold.
        steps: the length of the schedule.
        group: the processes that train it together.
    """

    def __init__(self, model: NucleusNet, settings: Settings, steps: int, group: Group = ALONE) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.dtype = autocast_dtype(settings.precision, device)
        self.ema = Ema(model, settings.ema)
        self._settings, self._group = settings, group
        self._optimiser = make_optimiser(model, settings)
        self._schedule = make_schedule(self._optimiser, settings, steps)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self._network = group.spread(model)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def step(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Learn from a batch; returns the terms of its loss, on the device.

        Args:
            images: (N, S, S, 3) uint8.
            targets: (N, C, S/stride, S/stride) float32.
        """
        train_mode(self.model, self._settings)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            maps = self._network(images)
        terms = map_losses(maps, targets, self._settings.channels, self._settings.dice, self._group)
        self._optimiser.zero_grad(set_to_none=True)
        self._scaler.scale(total(terms)).backward()
        self._scaler.unscale_(self._optimiser)
        if self._settings.clip:
            nn.utils.clip_grad_norm_(trainable(self.model), self._settings.clip)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._schedule.step()
        self.ema.update(self.model)
        return {name: term.detach() for name, term in terms.items()}

    def is_finite(self) -> bool:
        """Whether all trained weights are numbers."""
        return all(bool(part.isfinite().all()) for part in trainable(self.model))

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from, to the bit."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "ema": self.ema.shadow,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any], source: str) -> None:
        """Go on from `state_dict`'s; `source` names it in errors.

        Raises:
            ModelError: weights are of another architecture.
        """
        load_trained(self.model, state["model"], source)
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self.ema.load(state["ema"])
        torch.set_rng_state(state["rng"].cpu())


def train_mode(model: nn.Module, settings: Settings) -> None:
    """Training mode; BatchNorm keeps the statistics of its base, if there is one.

    Those of a batch differ from those of a slide: its few crops come from several laboratories. A trained network
    had a BCE of .155 by its batches' own statistics and .144 by the running ones, which are what inference uses.
    """
    model.train()
    if settings.base != "none":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def trainable(model: nn.Module) -> list[Tensor]:
    """The parameters under training."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Working precision: `auto` is fp16 on CUDA, bf16 on a CPU with AVX512-BF16 or AMX, else fp32."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.float16
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]

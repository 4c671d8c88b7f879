"""One step of training: forward, backward, optimiser, in the working precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsam.train.losses import map_losses, total
from nsam.train.parallel import ALONE, Group
from nsam.train.settings import Settings


def take_step(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    settings: Settings,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype,
    group: Group = ALONE,
) -> dict[str, Tensor]:
    """Forward, backward and one step of the optimiser on a batch; returns the terms of its loss, on the device.

    Args:
        network: as `Group.spread` gives it.
        images: (N, S, S, 3) uint8.
        targets: (N, C, S/stride, S/stride) float32.
        settings, optimiser, scaler, group: those of `fit`.
        dtype: working precision, from `autocast_dtype`.
    """
    train_mode(network, settings)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        maps = network(images)
    terms = map_losses(maps, targets, settings.channels, settings.dice, group)
    optimiser.zero_grad(set_to_none=True)
    scaler.scale(total(terms)).backward()
    scaler.unscale_(optimiser)
    if settings.clip:
        nn.utils.clip_grad_norm_(trainable(network), settings.clip)
    scaler.step(optimiser)
    scaler.update()
    return {name: term.detach() for name, term in terms.items()}


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

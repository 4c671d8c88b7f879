"""One training in several processes, as torchrun starts them: each takes a share of every batch."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

#: Others wait while the first process validates, or chooses thresholds.
PATIENCE = timedelta(hours=4)


@dataclass(frozen=True)
class Group:
    """The processes that train together. The first one validates, speaks and writes."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def spread(self, model: nn.Module) -> nn.Module:
        """The model to call while training: its gradients are the mean over the processes.

        Unused parts, such as the IoU head, need a static graph.
        """
        if self.size == 1:
            return model
        # Of depthwise filters (256, 1, 3, 3): a side of 1 has any stride, and the memory is the same.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view", UserWarning)
        return DistributedDataParallel(model, static_graph=True)

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all processes' parts; its gradient is right once `spread` has taken the mean of theirs."""
        total: Tensor = _Sum.apply(part) if self.size > 1 else part
        return total

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of all processes' values, for all."""
        if self.size == 1:
            return values
        together = torch.tensor(list(values.values()), dtype=torch.float64, device=_place())
        dist.all_reduce(together)
        return dict(zip(values, (together / self.size).tolist(), strict=True))

    def agrees(self, flag: bool) -> bool:
        """The first process's answer, for all."""
        if self.size == 1:
            return flag
        answer = torch.tensor([int(flag)], device=_place())
        dist.broadcast(answer, 0)
        return bool(answer.item())


ALONE = Group()


class _Sum(torch.autograd.Function):
    """Each process's part -> the sum of all, and back: each part counts in every process's sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return _summed(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


def _summed(part: Tensor) -> Tensor:
    whole = part.detach().clone()
    dist.all_reduce(whole)
    return whole


def _place() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def join(device: torch.device) -> Group:
    """The group that torchrun made, or this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Group(dist.get_rank(), size)

"""One training in several processes, as torchrun starts them: each takes a share of every batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
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
        return DistributedDataParallel(model, static_graph=True) if self.size > 1 else model

    def agrees(self, flag: bool) -> bool:
        """The first process's answer, for all."""
        if self.size == 1:
            return flag
        answer = torch.tensor([int(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(answer, 0)
        return bool(answer.item())


ALONE = Group()


def join(device: torch.device) -> Group:
    """The group that torchrun made, or this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Group(dist.get_rank(), size)

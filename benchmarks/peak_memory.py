"""The most memory that this process has had; standard library only, for peers' environments have nothing else."""

from __future__ import annotations

import resource


def peak_mb() -> float:
    """MB (10^6 bytes) of this process until now; Linux counts KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

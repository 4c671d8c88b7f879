"""The part of a slide's maps that is in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class MapStrip:
    """A window over rows of maps that arrive top to bottom, from map row `top` on."""

    def __init__(self, rows: Iterator[NDArray[np.float32]], top: int) -> None:
        self._source = rows
        self._top = top
        self._maps: NDArray[np.float32] | None = None

    def rows(self, top: int, bottom: int) -> NDArray[np.float32]:
        """Map rows [top, bottom); rows above `top` are forgotten."""
        parts = [] if self._maps is None else [self._maps[:, max(0, top - self._top) :]]
        first = max(top, self._top) if parts else self._top
        end = first + (parts[0].shape[1] if parts else 0)
        while end < bottom:
            parts.append(next(self._source))
            end += parts[-1].shape[1]
        self._maps = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        self._top = first
        return self._maps[:, top - first : bottom - first]

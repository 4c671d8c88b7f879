"""The part of a slide's maps that is in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class MapStrip:
    """A window over maps that arrive top to bottom in pieces of a few rows, from map row `top` on.

    Pieces are kept as they come and never joined: on a wide slide a copy of them would be hundreds of megabytes.
    """

    def __init__(self, pieces: Iterator[NDArray[np.float32]], top: int) -> None:
        self.top = self._bottom = self._end = top
        self._source = pieces
        self._held: deque[tuple[int, NDArray[np.float32]]] = deque()  # first row, (C, h, map width)

    def advance(self, top: int, bottom: int) -> None:
        """Wait for map rows [top, bottom), neither above those of before; rows above `top` are forgotten."""
        self.top, self._bottom = top, bottom
        while self._held and self._held[0][0] + self._held[0][1].shape[1] <= top:
            self._held.popleft()
        while self._end < bottom:
            piece = next(self._source)
            if self._end + piece.shape[1] > top:
                self._held.append((self._end, piece))
            self._end += piece.shape[1]

    def columns(self, left: int, right: int) -> NDArray[np.float32]:
        """(C, bottom - top, right - left): a copy of part of the rows last waited for, the first of them `top`."""
        parts = [piece[:, max(0, self.top - y) : self._bottom - y, left:right] for y, piece in self._held]
        return np.concatenate(parts, axis=1)

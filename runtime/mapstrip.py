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
        self._source = pieces
        self._end = top
        self._held: deque[tuple[int, NDArray[np.float32]]] = deque()  # first row, (C, h, map width)

    def advance(self, top: int, bottom: int) -> None:
        """Wait for map rows up to `bottom`; those above `top` are forgotten."""
        while self._held and self._held[0][0] + self._held[0][1].shape[1] <= top:
            self._held.popleft()
        while self._end < bottom:
            piece = next(self._source)
            if self._end + piece.shape[1] > top:
                self._held.append((self._end, piece))
            self._end += piece.shape[1]

    def part(self, top: int, bottom: int, left: int, right: int) -> NDArray[np.float32]:
        """(C, bottom - top, right - left): a copy of rows that are held."""
        parts = [
            piece[:, max(0, top - first) : bottom - first, left:right]
            for first, piece in self._held
            if first < bottom and first + piece.shape[1] > top
        ]
        return np.concatenate(parts, axis=1)

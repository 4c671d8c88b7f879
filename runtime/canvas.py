"""Nuclei of bands that come top to bottom -> strips of the label image, ids in raster order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.measure import Nucleus


@dataclass(frozen=True)
class Strip:
    """Finished rows of a slide; strips come top to bottom without gap or overlap.

    Attributes:
        y0: first level-0 row.
        labels: (h, W) int32 of those rows, 0 = background.
        nuclei: those whose first pixel lies in these rows, ids ascending.
    """

    y0: int
    labels: NDArray[np.int32]
    nuclei: list[Nucleus]


class Canvas:
    """Label rows that are not yet finished, and the nuclei waiting for their id."""

    def __init__(self, width: int) -> None:
        self.y0 = 0
        self._labels = np.zeros((0, width), np.int32)
        self._waiting: list[Nucleus] = []
        self._next_id = 1

    def add(self, nuclei: list[Nucleus]) -> None:
        self._waiting += nuclei

    def finish(self, y1: int) -> Strip:
        """Number and paint all nuclei that begin above `y1`, and let go of the rows above it."""
        ready = sorted((n for n in self._waiting if n.first_yx[0] < y1), key=lambda n: n.first_yx)
        self._waiting = [n for n in self._waiting if n.first_yx[0] >= y1]
        ready = [n.renumbered(self._next_id + i) for i, n in enumerate(ready)]
        self._next_id += len(ready)
        end = max([y1, *(n.bbox_xywh[1] + n.bbox_xywh[3] for n in ready)])
        missing = end - self.y0 - len(self._labels)
        if missing > 0:
            self._labels = np.pad(self._labels, ((0, missing), (0, 0)))
        for nucleus in ready:
            x, y, w, h = nucleus.bbox_xywh
            window = self._labels[y - self.y0 : y - self.y0 + h, x : x + w]
            window[nucleus.mask & (window == 0)] = nucleus.id
        strip = Strip(self.y0, self._labels[: y1 - self.y0], ready)
        self._labels = self._labels[y1 - self.y0 :]
        self.y0 = y1
        return strip

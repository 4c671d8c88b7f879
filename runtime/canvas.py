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
        doubled: nuclei that were left out, for more than half of each is another's already.
    """

    y0: int
    labels: NDArray[np.int32]
    nuclei: list[Nucleus]
    doubled: int = 0


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
        """Number and paint all nuclei that begin above `y1`, and let go of the rows above it.

        Two blocks may see a clump that is wider than their halo differently, and each own a part of it.
        """
        ready = sorted((n for n in self._waiting if n.first_yx[0] < y1), key=lambda n: n.first_yx)
        self._waiting = [n for n in self._waiting if n.first_yx[0] >= y1]
        end = max([y1, *(n.bbox_xywh[1] + n.bbox_xywh[3] for n in ready)])
        missing = end - self.y0 - len(self._labels)
        if missing > 0:
            self._labels = np.pad(self._labels, ((0, missing), (0, 0)))
        painted = []
        for nucleus in ready:
            x, y, w, h = nucleus.bbox_xywh
            window = self._labels[y - self.y0 : y - self.y0 + h, x : x + w]
            free = nucleus.mask & (window == 0)
            taken = nucleus.area_px - np.count_nonzero(free)
            if taken > nucleus.area_px / 2:
                continue
            window[free] = self._next_id
            painted.append(nucleus._replace(id=self._next_id, cut=nucleus.cut or taken > 0))
            self._next_id += 1
        strip = Strip(self.y0, self._labels[: y1 - self.y0], painted, len(ready) - len(painted))
        self._labels = self._labels[y1 - self.y0 :]
        self.y0 = y1
        return strip

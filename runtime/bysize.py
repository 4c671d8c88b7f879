"""One engine for each size of tile: a graph whose size is fixed when it is loaded runs faster than one left open."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nsam.runtime.engines import Engine


class BySize:
    """Engines of one file; that of a size is made when its first tile comes, the smallest size's at once.

    Args:
        make: an engine for a size.
        size: the smallest.
    """

    def __init__(self, make: Callable[[int], Engine], size: int) -> None:
        self._make = make
        self._engines = {size: make(size)}
        self.card = self._engines[size].card
        self.device = self._engines[size].device

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps of a batch of tiles of one size; see `Engine.run`."""
        size = images.shape[1]
        if size not in self._engines:
            self._engines[size] = self._make(size)
        return self._engines[size].run(images)

"""Test-time augmentation: the mean of the maps over turns and mirrorings of each tile."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nsam.runtime.engines import Engine


class Averaged:
    """An engine that looks at each tile in several ways; nuclei have no up, and both channels turn with the tile.

    Args:
        engine: the network; its card, precision and device stay.
        views: 1, 2 (as it is, half a turn), 4 (quarter turns) or 8 (those, mirrored too). Time grows likewise.

    Raises:
        ValueError: another number of views.
    """

    def __init__(self, engine: Engine, views: int) -> None:
        if views not in (1, 2, 4, 8):
            raise ValueError(f"`views` must be 1, 2, 4 or 8, is {views}")
        self.card = engine.card
        self.precision = engine.precision
        self.device = engine.device
        self._engine = engine
        turns = (0, 2) if views == 2 else range(min(views, 4))
        self._views = [(turn, mirror) for mirror in range(1 + (views == 8)) for turn in turns]

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Mean maps of a batch of tiles; see `Engine.run`."""
        return next(self.run_all([images]))

    def run_all(self, batches: Iterable[NDArray[np.uint8]]) -> Generator[NDArray[np.float32], None, None]:
        """Mean maps of each batch; see `Engine.run_all`."""
        with closing(self._engine.run_all(view for images in batches for view in self._seen(images))) as results:
            while seen := list(islice(results, len(self._views))):
                yield self._mean(seen)

    def _seen(self, images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        for turn, mirror in self._views:
            view = images[:, :, ::-1] if mirror else images
            yield np.ascontiguousarray(np.rot90(view, turn, (1, 2)))

    def _mean(self, results: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        mean = np.zeros_like(results[0])
        for maps, (turn, mirror) in zip(results, self._views, strict=True):
            maps = np.rot90(maps, -turn, (2, 3))
            mean += (maps[..., ::-1] if mirror else maps) / np.float32(len(self._views))
        return mean

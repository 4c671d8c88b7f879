"""Test-time augmentation: the mean of the maps over turns and mirrorings of each tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nsam.runtime.engines import Engine


class Averaged:
    """An engine that looks at each tile in several ways; nuclei have no up, and both channels turn with the tile.

    Args:
        engine: the network; its card and device stay.
        views: 1, 2 (as it is, half a turn), 4 (quarter turns) or 8 (those, mirrored too). Time grows likewise.

    Raises:
        ValueError: another number of views.
    """

    def __init__(self, engine: Engine, views: int) -> None:
        if views not in (1, 2, 4, 8):
            raise ValueError(f"`views` must be 1, 2, 4 or 8, is {views}")
        self.card = engine.card
        self.device = engine.device
        self._engine = engine
        turns = (0, 2) if views == 2 else range(min(views, 4))
        self._views = [(turn, mirror) for mirror in range(1 + (views == 8)) for turn in turns]

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Mean maps of a batch of tiles; see `Engine.run`."""
        mean: NDArray[np.float32] | None = None
        for turn, mirror in self._views:
            view = images[:, :, ::-1] if mirror else images
            maps = self._engine.run(np.ascontiguousarray(np.rot90(view, turn, (1, 2))))
            maps = np.rot90(maps, -turn, (2, 3))
            maps = (maps[..., ::-1] if mirror else maps) / np.float32(len(self._views))
            mean = maps if mean is None else mean + maps
        assert mean is not None
        return mean

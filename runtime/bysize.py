"""One engine for each size of tile, and tiles in streams: a CPU is better used by several tiles than by one.

A graph whose size is fixed when it is loaded runs faster than one left open.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nsam.runtime.engines import Engine


class BySize:
    """Engines of one file; that of a size is made when its first tile comes, that of `size` at once.

    Args:
        make: an engine for a size and a number of streams, which share its threads.
        size: the one in which rates are told.
        streams: batches that run at the same time.
        keep: whether the engines for other sizes stay while many batches of one size are run.
    """

    def __init__(self, make: Callable[[int, int], Engine], size: int, streams: int = 1, keep: bool = True) -> None:
        self._make = make
        self._streams = streams
        self._keep = keep
        self._engines = {(size, 1): make(size, 1)}
        self.card = self._engines[size, 1].card
        self.precision = self._engines[size, 1].precision
        self.device = self._engines[size, 1].device

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps of a batch of tiles of one size; see `Engine.run`."""
        return self._of(images.shape[1], 1).run(images)

    def run_all(self, batches: Iterable[NDArray[np.uint8]]) -> Generator[NDArray[np.float32], None, None]:
        """Maps of each batch; see `Engine.run_all`."""
        rest = iter(batches)
        first = list(islice(rest, 2))
        if len(first) < 2:  # one alone is done soonest by all threads
            yield from map(self.run, first)
            return
        key = first[0].shape[1], self._streams
        if not self._keep:
            self._engines = {known: engine for known, engine in self._engines.items() if known == key}
        run = self._of(*key).run
        if self._streams == 1:
            yield from map(run, chain(first, rest))
            return
        with ThreadPoolExecutor(self._streams, "nsam-infer") as pool:
            running: deque[Future[NDArray[np.float32]]] = deque()
            for images in chain(first, rest):
                running.append(pool.submit(run, images))
                if len(running) > self._streams:  # one waits, so that no stream does
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def _of(self, size: int, streams: int) -> Engine:
        if (size, streams) not in self._engines:
            self._engines[size, streams] = self._make(size, streams)
        return self._engines[size, streams]

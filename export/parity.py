"""Proof, link by link, that a chain of models says the same on real tissue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nsam.runtime.card import ModelCard
from nsam.runtime.engines import Engine
from nsam.runtime.errors import ModelError
from nsam.runtime.metrics import mean_and_pooled
from nsam.runtime.slides import open_slide, read_input
from nsam.runtime.tiles import Box, Grid
from nsam.train.data import Sample
from nsam.train.evaluate import score_samples

MAPS_GATE = 1e-4  # links that only rewrite fp32 arithmetic
METRICS_GATE = 0.002  # links that change numbers: what matters is the nuclei
MEAN_GATE = 1e-2  # of the maps of any one tile, in any batch and size: images alone would not tell of a wrong one
BATCHES = (1, 2, 5)
TASK_METRICS = ("dice", "aji", "pq")
_NO_NUMBER = 1e9
#: Below it the two pictures of a worst tile are one.
VISIBLE = 1e-3


@dataclass(frozen=True)
class Link:
    """How far two neighbours in the chain lie apart."""

    before: str
    after: str
    max: float  # of |difference| over all maps, the logit as a probability
    p999: float
    mean: float
    worst_mean: float  # of the tile, of any size and in any batch, whose maps differ most
    worst_tile: int  # of `card.input.size`, the one with the largest difference
    metrics: dict[str, float]  # |difference| of Dice, AJI and PQ, mean of the images
    gate: str
    passed: bool

    def __str__(self) -> str:
        tasks = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        verdict = "passed" if self.passed else "FAILED"
        return f"{self.before} -> {self.after}: |difference| of maps {self.max:.2e}, of {tasks}; {self.gate}: {verdict}"


class Chain:
    """Engines that were run over the same tiles and images, and the links between them."""

    def __init__(
        self,
        tiles: NDArray[np.uint8],
        larger: Sequence[NDArray[np.uint8]],
        samples: Sequence[Sample],
        pictures: Path,
        *,
        force: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            tiles: (N, S, S, 3) uint8, real tissue, of `card.input.size`.
            larger: the same in the other sizes, a tile of each.
            samples: labelled images for Dice, AJI and PQ.
            pictures: folder for the worst tile of each link that can be seen to differ.
            force: a failed gate is kept in the links and raises nothing.
            say: takes a line for each link.
        """
        self.tiles = tiles
        self.batches = sorted({min(batch, len(tiles)) for batch in BATCHES})
        self._larger = larger
        self.samples = samples
        self.links: list[Link] = []
        self._pictures = pictures
        self._force = force
        self._say = say
        self._maps: dict[str, list[NDArray[np.float32]]] = {}
        self._scores: dict[str, dict[str, float]] = {}

    def add(self, name: str, engine: Engine) -> None:
        """Run an engine over tiles, in batches of 1, 2 and 5, over one of each larger size, and over images."""
        self._maps[name] = [
            np.concatenate([engine.run(self.tiles[i : i + batch]) for i in range(0, len(self.tiles), batch)])
            for batch in self.batches
        ] + [engine.run(tiles) for tiles in self._larger]
        self._scores[name] = mean_and_pooled(score for _, score in score_samples(self.samples, engine))[0]

    def prove(self, before: str, after: str, engine: Engine, *, rewrites_only: bool) -> Link:
        """Run `engine` and compare it with `before`; a gate on the maps where it only rewrites fp32, else on the
        metrics and the mean of each tile.

        Raises:
            ModelError: the gate failed, and failing was not allowed.
        """
        link = self.measure(before, after, engine, rewrites_only=rewrites_only)
        self.keep(link)
        return link

    def measure(self, before: str, after: str, engine: Engine, *, rewrites_only: bool) -> Link:
        """`prove` without a verdict's consequences: for what may be left out."""
        self.add(after, engine)
        pairs = zip(self._maps[before], self._maps[after], strict=True)
        differences = [distances(a, b) for a, b in pairs]  # each (N, C, h, w)
        every = np.concatenate([part.ravel() for part in differences])
        of_tiles = np.max([part.max(axis=(1, 2, 3)) for part in differences[: len(self.batches)]], axis=0)
        largest, worst_mean = float(every.max()), max(float(part.mean(axis=(1, 2, 3)).max()) for part in differences)
        metrics = {n: abs(self._scores[before][n] - self._scores[after][n]) for n in TASK_METRICS}
        if rewrites_only:
            gate, passed = f"maps to {MAPS_GATE:g}", largest <= MAPS_GATE
        else:
            gate = f"metrics to {METRICS_GATE:g}, a tile's mean to {MEAN_GATE:g}"
            passed = max(metrics.values()) <= METRICS_GATE and worst_mean <= MEAN_GATE
        return Link(
            before,
            after,
            largest,
            float(np.quantile(every, 0.999)),
            float(every.mean()),
            worst_mean,
            int(of_tiles.argmax()),
            metrics,
            gate,
            passed,
        )

    def keep(self, link: Link) -> None:
        """Write a measured link down; raises as `prove`."""
        self.links.append(link)
        self._say(str(link))
        if link.max > VISIBLE:
            name = f"parity-{link.after.replace(' ', '-')}.jpg"
            picture = worst_picture(
                self.tiles[link.worst_tile], *(self._maps[n][0][link.worst_tile] for n in (link.before, link.after))
            )
            cv2.imwrite(str(self._pictures / name), picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
        if not link.passed and not self._force:
            raise ModelError(f"parity `{link.before} -> {link.after}` failed ({link}); --force keeps the files")

    def failed(self) -> dict[str, str]:
        """The links kept so far that failed their gate, by the name of their later end."""
        return {link.after: f"{link.before} -> {link.after}" for link in self.links if not link.passed}

    def maps(self, name: str) -> NDArray[np.float32]:
        """(N, C, h, w) of an engine, run one tile at a time."""
        return self._maps[name][0]


def distances(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """|difference| of maps (N, C, h, w), the logit as a probability; 1e9 where either is no number."""
    apart = np.abs(_activated(one) - _activated(other))
    return np.asarray(np.nan_to_num(apart, nan=_NO_NUMBER, posinf=_NO_NUMBER), np.float32)


def _activated(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Maps as post-processing reads them: the logit as a probability. A logit of 20 has its own rounding of 1e-5
    times that, and means the same.
    """
    activated = maps.copy()
    activated[:, 0] = _sigmoid(maps[:, 0])
    return activated


def _sigmoid(logit: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = 0.5 + 0.5 * np.tanh(0.5 * logit)
    return result


def real_tiles(samples: Sequence[Sample], card: ModelCard, size: int, count: int) -> NDArray[np.uint8]:
    """Tiles (count, size, size, 3) uint8 as the runtime reads them, from images spread evenly over `samples`; of few
    images several places each.
    """
    tiles = []
    images = spread(samples, count)
    for i in range(count):
        sample, (right, down) = images[i % len(images)], _place(i // len(images))
        with open_slide(sample.image) as slide:
            grid = Grid.of(slide.size_wh, sample.mpp, card.input.mpp, card.output.stride)
            width, height = grid.input_wh
            x, y = round(right * (width - size)), round(down * (height - size))
            tiles.append(read_input(slide, Box(x, y, x + size, y + size), grid))
    return np.stack(tiles)


def _place(index: int) -> tuple[float, float]:
    """Where an image's first, second, ... tile lies, as shares of the way to its right and lower ends."""
    corners = ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0))
    # Then Roberts' R2 sequence, which never comes back to a place and leaves no large gap.
    return corners[index] if index < len(corners) else (index * 0.7549 % 1, index * 0.5698 % 1)


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` of the samples, evenly; all of them where there are fewer."""
    places = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    return [samples[i] for i in places]


def worst_picture(
    tile: NDArray[np.uint8], before: NDArray[np.float32], after: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """(S, 4 S, 3) uint8 RGB: the tile, the nucleus probability of both, and their |difference|, white at .1."""
    size = (tile.shape[1], tile.shape[0])
    one, other = _sigmoid(before[0]), _sigmoid(after[0])
    panels = [tile]
    for values in (one, other, np.minimum(np.abs(one - other) * 10, 1)):
        grey = cv2.resize((values * 255).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        panels.append(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB))
    return np.concatenate(panels, axis=1)


def as_json(chain: Chain, **more: Any) -> dict[str, Any]:
    """What `parity.json` holds."""
    return {
        "tiles": len(chain.tiles),
        "batches": chain.batches,
        "images": len(chain.samples),
        "passed": all(link.passed for link in chain.links),
        "links": [asdict(link) for link in chain.links],
        **more,
    }

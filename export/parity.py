"""Proof, link by link, that a chain of models says the same on real tissue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.card import ModelCard
from nsam.runtime.engines import Engine
from nsam.runtime.metrics import mean_and_pooled
from nsam.runtime.slides import open_slide, read_input
from nsam.runtime.tiles import Box, Grid
from nsam.train.data import Sample
from nsam.train.evaluate import score_samples

MAPS_GATE = 1e-4  # links that only rewrite fp32 arithmetic
METRICS_GATE = 0.002  # links that change numbers: what matters is the nuclei
BATCHES = (1, 2, 5)
TASK_METRICS = ("dice", "aji", "pq")


@dataclass(frozen=True)
class Link:
    """How far two neighbours in the chain lie apart."""

    before: str
    after: str
    max: float  # of |difference| over all maps
    p999: float
    mean: float
    metrics: dict[str, float] | None  # |difference| of Dice, AJI and PQ, where the link changes numbers
    gate: float
    passed: bool


def real_tiles(samples: Sequence[Sample], card: ModelCard, count: int = 8) -> NDArray[np.uint8]:
    """Tiles (count, S, S, 3) uint8 as the runtime reads them, from images spread evenly over `samples`."""
    size = card.input.size
    chosen = [samples[i] for i in np.linspace(0, len(samples) - 1, count).round().astype(int)]
    tiles = []
    for sample in chosen:
        with open_slide(sample.image) as slide:
            grid = Grid.of(slide.size_wh, sample.mpp, card.input.mpp, card.output.stride)
            tiles.append(read_input(slide, Box(0, 0, size, size), grid))
    return np.stack(tiles)


def compare(
    before: tuple[str, Engine],
    after: tuple[str, Engine],
    tiles: NDArray[np.uint8],
    samples: Sequence[Sample] | None = None,
) -> Link:
    """Compare two engines on tiles in batches of 1, 2 and 5; with `samples`, by the task's metrics as well.

    Args:
        before, after: name and engine.
        tiles: (N, S, S, 3) uint8, real tissue.
        samples: labelled images; given, the gate is on Dice, AJI and PQ, else on the maps.
    """
    differences = np.concatenate(
        [
            np.abs(before[1].run(tiles[i : i + batch]) - after[1].run(tiles[i : i + batch])).ravel()
            for batch in BATCHES
            for i in range(0, len(tiles), batch)
        ]
    )
    largest = float(differences.max())
    if samples is None:
        metrics, gate, passed = None, MAPS_GATE, largest <= MAPS_GATE
    else:
        means = [mean_and_pooled(s for _, s in score_samples(samples, engine))[0] for _, engine in (before, after)]
        metrics = {name: abs(means[0][name] - means[1][name]) for name in TASK_METRICS}
        gate, passed = METRICS_GATE, max(metrics.values()) <= METRICS_GATE
    return Link(
        before[0],
        after[0],
        largest,
        float(np.quantile(differences, 0.999)),
        float(differences.mean()),
        metrics,
        gate,
        passed,
    )


def as_json(links: Sequence[Link], tiles: int, images: int) -> dict[str, Any]:
    """What `parity.json` holds."""
    return {
        "tiles": tiles,
        "batches": list(BATCHES),
        "images": images,
        "passed": all(link.passed for link in links),
        "links": [asdict(link) for link in links],
    }

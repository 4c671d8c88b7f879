"""The kernels beside the network on 1 Mpx of real tissue: `pytest benchmarks/kernels.py --benchmark-autosave`.

`--benchmark-compare` against an earlier run shows a regression. Medians in ms are ms/Mpx.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from nsam.runtime.card import ModelCard
from nsam.runtime.engines import load
from nsam.runtime.frame import Frame
from nsam.runtime.level0 import carry, nearest
from nsam.runtime.measure import Nucleus, measure
from nsam.runtime.metrics import score
from nsam.runtime.outlines import simplified_rings
from nsam.runtime.pipeline import map_rows
from nsam.runtime.sinks import geojson_sink
from nsam.runtime.slides import ArraySlide
from nsam.runtime.tiles import Box, Grid
from nsam.runtime.watershed import separate
from nsam.train.data import find_samples, read_sample

DATA = Path(os.environ.get("NSAM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SIDE = 1000


@dataclass(frozen=True)
class Field:
    """Four TNBC images side by side, cut to 1 Mpx, and all that the kernels make of them."""

    card: ModelCard
    grid: Grid
    mpp: float
    truth: NDArray[np.int32]
    maps: NDArray[np.float32]

    @property
    def box(self) -> Box:
        return Box(0, 0, SIDE, SIDE)

    def basins(self) -> NDArray[np.int32]:
        return separate(self.maps, self.card.output, self.card.post, self.mpp / self.grid.map_per_level0[0])

    def carried(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        return carry(self.basins(), self.maps[0], self.card.post.nucleus_threshold, (0, 0), self.box, self.grid)

    def nuclei(self) -> list[Nucleus]:
        stain = nearest(self.maps[-1], (0, 0), self.box, self.grid)
        return measure(*self.carried(), stain, (0, 0), self.mpp, self.card.post.min_area_um2)


@pytest.fixture(scope="module")
def field() -> Field:
    if not (DATA / "tnbc").is_dir():
        pytest.skip(f"no TNBC images in {DATA}; NSAM_DATA names the folder")
    cv2.setNumThreads(1)
    samples = find_samples(DATA / "tnbc")[::12][:4]
    images, labels = zip(*(read_sample(sample) for sample in samples), strict=True)
    apart = [np.where(part > 0, part + 10_000 * i, 0) for i, part in enumerate(labels)]
    image, truth = (
        np.concatenate([np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)])[:SIDE, :SIDE]
        for four in (images, apart)
    )
    engine = load(device="cpu", threads=1)
    slide = ArraySlide(np.ascontiguousarray(image), Path("tnbc"))
    frame = Frame.of(slide, engine.card, samples[0].mpp)
    maps = np.concatenate(list(map_rows(slide, engine, frame)), axis=1)
    return Field(engine.card, frame.grid, samples[0].mpp, truth.astype(np.int32), maps)


def test_separate(benchmark: Any, field: Field) -> None:
    assert benchmark(field.basins).max() > 100


def test_carry_to_level_0(benchmark: Any, field: Field) -> None:
    c, basins = field.card, field.basins()
    labels, _ = benchmark(carry, basins, field.maps[0], c.post.nucleus_threshold, (0, 0), field.box, field.grid)
    assert labels.shape == field.truth.shape


def test_measure(benchmark: Any, field: Field) -> None:
    labels, probability = field.carried()
    stain = nearest(field.maps[-1], (0, 0), field.box, field.grid)
    assert len(benchmark(measure, labels, probability, stain, (0, 0), field.mpp, field.card.post.min_area_um2)) > 100


def test_outlines_and_geojson(benchmark: Any, field: Field, tmp_path: Path) -> None:
    nuclei, path = field.nuclei(), tmp_path / "nuclei.geojson"

    def write() -> None:
        with geojson_sink(path, "field") as add:
            for nucleus in nuclei:
                add(nucleus, simplified_rings(nucleus))

    benchmark(write)
    assert path.stat().st_size > 100 * len(nuclei)


def test_metrics(benchmark: Any, field: Field) -> None:
    labels, _ = field.carried()
    assert benchmark(score, field.truth, labels).dice > 0.5

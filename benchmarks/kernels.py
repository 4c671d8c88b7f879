"""The kernels beside the network on 1 Mpx of real tissue: `pytest -n 0 benchmarks/kernels.py --benchmark-autosave`.

`--benchmark-compare` against an earlier run shows a regression. Medians in ms are ms/Mpx. Without `-n 0` setup.cfg
spreads tests over processes, and pytest-benchmark then measures nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from separation import Case

from nsam.runtime.engines import load
from nsam.runtime.metrics import score
from nsam.runtime.outlines import simplified_rings
from nsam.runtime.sinks import geojson_sink
from nsam.train.data import find_samples, read_sample

DATA = Path(os.environ.get("NSAM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SIDE = 1000


@pytest.fixture(scope="module")
def field() -> Case:
    """Four TNBC images side by side, cut to 1 Mpx."""
    if not (DATA / "tnbc").is_dir():
        pytest.skip(f"no TNBC images in {DATA}; NSAM_DATA names the folder")
    cv2.setNumThreads(1)
    samples = find_samples(DATA / "tnbc")[::12][:4]
    images, labels = zip(*(read_sample(sample) for sample in samples), strict=True)
    apart = [np.where(part > 0, part + 10_000 * i, 0) for i, part in enumerate(labels)]
    image, truth = (
        np.concatenate([np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)])[:SIDE, :SIDE].copy()
        for four in (images, apart)
    )
    return Case.of(image, truth.astype(np.int32), samples[0].mpp, load(device="cpu", threads=1))


def test_separate(benchmark: Any, field: Case) -> None:
    assert benchmark(field.basins).max() > 100


def test_carry_to_level_0(benchmark: Any, field: Case) -> None:
    labels, _ = benchmark(field.carried, field.basins())
    assert labels.shape == field.truth.shape


def test_measure(benchmark: Any, field: Case) -> None:
    assert len(benchmark(field.measured, *field.carried(field.basins()))) > 100


def test_outlines_and_geojson(benchmark: Any, field: Case, tmp_path: Path) -> None:
    nuclei, path = field.measured(*field.carried(field.basins())), tmp_path / "nuclei.geojson"

    def write() -> None:
        with geojson_sink(path, "field") as add:
            for nucleus in nuclei:
                add(nucleus, simplified_rings(nucleus))

    benchmark(write)
    assert path.stat().st_size > 100 * len(nuclei)


def test_metrics(benchmark: Any, field: Case) -> None:
    labels, _ = field.carried(field.basins())
    assert benchmark(score, field.truth, labels).dice > 0.5

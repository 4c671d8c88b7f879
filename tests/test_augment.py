"""Views of another laboratory are what the formulas say, however they are computed."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from nsam.train import augment


@pytest.fixture
def colours(noise: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Any, and black and white, whose logarithms and powers are at the ends."""
    noise[:10], noise[10:20] = 0, 255
    return noise


@pytest.mark.parametrize("seed", range(8))
def test_restain(colours: NDArray[np.uint8], seed: int) -> None:
    rng = np.random.default_rng(seed)
    gain, shift = rng.uniform(0.6, 1.5, 3), rng.normal(0, 0.03, 3)
    vectors = augment._STAIN_TO_OD + rng.normal(0, 0.06, (3, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    stains = -np.log((colours + 1.0) / 256) @ np.linalg.inv(augment._STAIN_TO_OD.astype(np.float64))
    wanted = 256 * np.exp(-np.maximum((stains * gain + shift) @ vectors, 0)) - 1
    assert np.abs(augment._restain(colours, np.random.default_rng(seed)) - wanted).max() < 0.05


@pytest.mark.parametrize("seed", range(8))
def test_relight(colours: NDArray[np.uint8], seed: int) -> None:
    x = colours.astype(np.float32)
    rng = np.random.default_rng(seed)
    light = x.astype(np.float64) / 255
    if rng.random() < 0.6:
        white = np.maximum(np.percentile(x[::4, ::4].reshape(-1, 3), 98, axis=0), 64)
        light *= (rng.uniform(180, 252) + rng.normal(0, 8, 3)) / white
    light = 255 * np.clip(light, 0, 1) ** augment.random_scale(rng, 0.65, 1.5)
    grey = light.mean(axis=2, keepdims=True)
    saturated = grey + rng.uniform(0.5, 1.5) * (light - grey)
    wanted = light.mean() + rng.uniform(0.7, 1.3) * (saturated - light.mean()) + rng.normal(0, 8)
    assert np.abs(augment._relight(x, np.random.default_rng(seed)) - wanted).max() < 0.05

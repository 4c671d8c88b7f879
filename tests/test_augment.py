"""Views of another laboratory are what the formulas say, however they are computed."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from nsam.train import augment
from nsam.train.augment import random_look, random_scale, random_view


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
    light = 255 * np.clip(light, 0, 1) ** random_scale(rng, 0.65, 1.5)
    grey = light.mean(axis=2, keepdims=True)
    saturated = grey + rng.uniform(0.5, 1.5) * (light - grey)
    wanted = light.mean() + rng.uniform(0.7, 1.3) * (saturated - light.mean()) + rng.normal(0, 8)
    assert np.abs(augment._relight(x, np.random.default_rng(seed)) - wanted).max() < 0.05


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.4])
def test_views_are_the_image_turned_mirrored_and_scaled(scale: float) -> None:
    """Of an image whose px say where they are: steps along a view's axes are steps of 1 / scale, at right angles."""
    y, x = np.mgrid[:250, :250].astype(np.uint8)
    coordinates = np.stack([x, y, x], axis=2)
    sides, angles = set(), []
    for seed in range(40):
        view, targets = random_view(coordinates, coordinates, 64, 2, scale, np.random.default_rng(seed))
        middle, right, below = (view[at][:2].astype(float) for at in ((32, 32), (32, 60), (60, 32)))
        along, down = (right - middle) / 28, (below - middle) / 28
        assert np.hypot(*along) == pytest.approx(1 / scale, rel=0.06)
        assert np.hypot(*down) == pytest.approx(1 / scale, rel=0.06)
        assert abs(along @ down) < 0.1
        sides.add(round(float(np.sign(along[0] * down[1] - along[1] * down[0]))))
        angles.append(math.atan2(along[1], along[0]))
        assert targets.shape == (32, 32, 3)
        inner = view[20:44, 20:44].reshape(12, 2, 12, 2, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(targets[10:22, 10:22], inner, atol=1.5)
    assert sides == {-1, 1}
    assert np.histogram(angles, 4, (-math.pi, math.pi))[0].min() > 3


def test_views_that_do_not_turn_lie_inside_the_image_and_anywhere_in_it() -> None:
    y, x = np.mgrid[:100, :250].astype(np.uint8)
    coordinates = np.stack([x, y, x], axis=2)
    views = [
        random_view(coordinates, coordinates, 64, 2, 2.0, np.random.default_rng(seed), turn=False)[0][..., :2]
        for seed in range(60)
    ]
    for view in views:
        np.testing.assert_allclose(np.diff(view[..., 0].astype(int), axis=1), 0.5, atol=0.5)
        np.testing.assert_allclose(np.diff(view[..., 1].astype(int), axis=0), 0.5, atol=0.5)
        assert int(view[0, -1, 0]) - int(view[0, 0, 0]) in (31, 32)
    for axis, side in ((0, 250), (1, 100)):
        assert min(int(view[..., axis].min()) for view in views) < 0.1 * side
        assert max(int(view[..., axis].max()) for view in views) > 0.9 * side


def test_beyond_the_edge_image_and_targets_are_mirrored_alike(noise: NDArray[np.uint8]) -> None:
    """A crop larger than the image."""
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    for seed in range(4):
        view, targets = random_view(smooth, smooth, 256, 1, 1.0, np.random.default_rng(seed))
        np.testing.assert_array_equal(view, targets)
        assert view.min() > 50


def test_what_a_smaller_view_cannot_show_does_not_alias() -> None:
    stripes = np.zeros((200, 200, 3), np.uint8)
    stripes[:, ::2] = 255
    for seed in range(10):
        view = random_view(stripes, stripes[..., :1], 64, 2, 0.5, np.random.default_rng(seed), turn=False)[0]
        assert np.abs(view.astype(int) - 127).max() < 15


def test_halving_is_as_likely_as_doubling() -> None:
    rng = np.random.default_rng(0)
    scales = np.array([random_scale(rng, 0.5, 2) for _ in range(2000)])
    assert 0.5 <= scales.min() < 0.51
    assert 1.98 < scales.max() <= 2
    assert np.median(scales) == pytest.approx(1, abs=0.05)


def test_another_look_keeps_glass_light_and_red_red() -> None:
    image = np.full((96, 96, 3), 250, np.uint8)
    image[:, 48:] = (200, 40, 60)
    for seed in range(200):
        view = random_look(image, np.random.default_rng(seed))
        assert view.shape == image.shape
        assert view.dtype == np.uint8
        glass, red = view[:, :40].astype(int), view[:, 56:].reshape(-1, 3).mean(axis=0)
        assert np.median(glass) > 100
        assert np.percentile(glass, 0.1) > np.median(glass) - 50  # noise, and no overflow
        assert red[0] > red[2]

"""Haematoxylin against scikit-image's colour deconvolution."""

import numpy as np
import pytest
from skimage.color import rgb2hed

from nsam.runtime.stains import haematoxylin

# skimage counts in units of log(1e-6)
DECADES = -np.log10(1e-6)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_equals_skimage(stride: int) -> None:
    images = np.random.default_rng(0).integers(1, 256, (2, 64, 32, 3), np.uint8)
    found = haematoxylin(images, stride)
    wanted = rgb2hed(images)[..., 0] * DECADES
    wanted = wanted.reshape(2, 64 // stride, stride, 32 // stride, stride).mean(axis=(2, 4))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_ends_of_the_scale() -> None:
    white, black, eosin = (np.full((1, 2, 2, 3), colour, np.uint8) for colour in (255, 0, (245, 150, 200)))
    assert haematoxylin(white, 1).max() == 0
    assert np.isfinite(haematoxylin(black, 1)).all()
    assert haematoxylin(eosin, 1).max() < 0.1
    blue = (255 * 10 ** -np.array([0.65, 0.70, 0.29])).round().astype(np.uint8)
    assert haematoxylin(np.broadcast_to(blue, (1, 2, 2, 3)).copy(), 1) == pytest.approx(1, abs=0.02)

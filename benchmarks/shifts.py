"""Simulated laboratories: a fixed set of changes that another stain, scanner or export makes to an image."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]

# Haematoxylin and eosin as optical densities of RGB: Ruifrok & Johnston 2001, by which an image is split into stains,
# the reference of M. Veta's code for Macenko et al. 2009, and a redder haematoxylin beside a paler eosin.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
_MACENKO = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]], np.float32)
_REDDER = np.array([[0.62, 0.63, 0.47], [0.16, 0.93, 0.33]], np.float32)


def restained(factors: tuple[float, float], vectors: NDArray[np.float32] | None = None) -> Change:
    """Other amounts of haematoxylin and eosin, or other dyes."""

    def change(x: NDArray[np.float32]) -> NDArray[np.float32]:
        amounts = -np.log((x + 1) / 256) @ np.linalg.inv(_STAINS)
        amounts[..., :2] *= np.float32(factors)
        dyes = _STAINS.copy()
        if vectors is not None:
            dyes[:2] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return 256 * np.exp(-np.maximum(amounts @ dyes, 0)) - 1

    return change


def lit(white: tuple[float, float, float]) -> Change:
    """The white of the lamp."""
    return lambda x: x * (np.float32(white) / 255)


def gamma(power: float) -> Change:
    """The camera's curve."""
    return lambda x: 255 * (x / 255) ** np.float32(power)


def saturated(factor: float) -> Change:
    """Colour strength around grey."""
    return lambda x: x.mean(axis=2, keepdims=True) * (1 - factor) + factor * x


def blurred(sigma_px: float) -> Change:
    """Out of focus."""
    return lambda x: cv2.GaussianBlur(x, (0, 0), sigma_px)


def noisy(deviation: float) -> Change:
    """A noisy sensor; the same noise in every run."""
    return lambda x: x + np.random.default_rng(0).normal(0, deviation, x.shape).astype(np.float32)


def compressed(quality: int) -> Change:
    """JPEG."""

    def change(x: NDArray[np.float32]) -> NDArray[np.float32]:
        code = cv2.imencode(".jpg", np.rint(x).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return cv2.imdecode(code, cv2.IMREAD_COLOR).astype(np.float32)

    return change


SHIFTS: dict[str, Change] = {
    "haematoxylin x .6": restained((0.6, 1.0)),
    "haematoxylin x 1.5": restained((1.5, 1.0)),
    "eosin x .5": restained((1.0, 0.5)),
    "eosin x 1.6": restained((1.0, 1.6)),
    "reference of Macenko": restained((1.0, 1.0), _MACENKO),
    "redder haematoxylin": restained((1.0, 1.0), _REDDER),
    "warm light": lit((255, 238, 210)),
    "cold light": lit((215, 230, 255)),
    "gamma .7": gamma(0.7),
    "gamma 1.4": gamma(1.4),
    "saturation x .5": saturated(0.5),
    "saturation x 1.6": saturated(1.6),
    "blur of 1.2 px": blurred(1.2),
    "noise of 12": noisy(12),
    "JPEG of quality 30": compressed(30),
}
#: Nuclei of another size, or a wrong scale: the image is resized, its stated µm/px is not.
SCALES = {"scale .7": 0.7, "scale 1.4": 1.4}


def shift(image: Image, change: Change) -> Image:
    """(H, W, 3) uint8 RGB in and out."""
    return np.clip(np.rint(change(image.astype(np.float32))), 0, 255).astype(np.uint8)


def rescale(image: Image, labels: NDArray[np.int32], factor: float) -> tuple[Image, NDArray[np.int32]]:
    """Image and labels `factor` times as large."""
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    flag = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    moved = cv2.resize(labels.astype(np.float64), size, interpolation=cv2.INTER_NEAREST_EXACT)
    return cv2.resize(image, size, interpolation=flag), moved.astype(np.int32)

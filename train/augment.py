"""Random views of a labelled image: geometry first, then stain, light and sharpness.

Slides differ between laboratories in stain, white point, contrast, noise and focus far more than NuInsSeg does
within itself, so the colours are moved well beyond what it shows.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

# Rows: haematoxylin, eosin and residual in optical density RGB (Ruifrok & Johnston 2001).
_STAIN_TO_OD = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
_OD_TO_STAIN = np.linalg.inv(_STAIN_TO_OD).astype(np.float32)
_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)  # optical density of each value of a channel


def random_view(
    image: NDArray[np.uint8],
    targets: NDArray[np.uint8],
    size: int,
    stride: int,
    scale: float,
    rng: np.random.Generator,
    turn: bool = True,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A crop of `size` px around a random point, turned, mirrored and scaled in one resampling.

    Args:
        image: (H, W, 3) uint8 RGB.
        targets: (H, W, C) uint8. A distance over the largest one in its nucleus keeps its value under all of this.
        size: side of the crop.
        stride: crop px for one px of the targets.
        scale: crop px for one image px.
        turn: whether to turn and mirror.

    Returns:
        (size, size, 3) and (size / stride, size / stride, C), uint8. Beyond the image's edge both are mirrored.
    """
    angle = rng.uniform(0, 2 * math.pi) if turn else 0.0
    flip = -1 if turn and rng.random() < 0.5 else 1
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    # The centre keeps the crop inside the image where it can be.
    reach = [min(side / 2, size / scale / 2) for side in (image.shape[1], image.shape[0])]
    centre = [rng.uniform(r, side - r) for r, side in zip(reach, (image.shape[1], image.shape[0]), strict=True)]
    matrix = np.array([[flip * cos, -sin, 0], [flip * sin, cos, 0]])
    matrix[:, 2] = np.array(centre) - matrix[:, :2] @ np.array([size / 2, size / 2])
    flags = cv2.WARP_INVERSE_MAP
    if scale < 1:  # what the crop cannot show must not alias
        image = cv2.GaussianBlur(image, (0, 0), 0.4 / scale)
    view = cv2.warpAffine(
        image, matrix, (size, size), flags=flags | cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    moved = cv2.warpAffine(
        targets, matrix, (size, size), flags=flags | cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    moved = cv2.resize(moved, (size // stride, size // stride), interpolation=cv2.INTER_AREA)
    return view, moved.reshape(size // stride, size // stride, -1)


def random_scale(rng: np.random.Generator, low: float, high: float) -> float:
    """Log-uniform in [low, high]: halving is as likely as doubling."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def random_look(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Another laboratory's and another scanner's view of the same tissue; (H, W, 3) uint8 RGB in and out."""
    x = _restain(image, rng) if rng.random() < 0.8 else image.astype(np.float32)
    if rng.random() < 0.6:
        x = _relight(x, rng)
    if rng.random() < 0.3:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.3, 1.3))
    elif rng.random() < 0.2:
        x += rng.uniform(0.3, 1.0) * (x - cv2.GaussianBlur(x, (0, 0), 1.5))
    if rng.random() < 0.3:
        x += rng.normal(0, rng.uniform(1, 10), (*x.shape[:2], 3 if rng.random() < 0.5 else 1))
    view = np.clip(x, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        quality = int(rng.integers(35, 95))
        code = cv2.imencode(".jpg", view, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        view = cv2.imdecode(code, cv2.IMREAD_COLOR)
    return view


def _restain(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
    """Jitter in stain space (Tellez et al. 2019), and stain vectors that are themselves a little turned."""
    gain = rng.uniform(0.6, 1.5, 3).astype(np.float32)
    shift = rng.normal(0, 0.03, 3).astype(np.float32)
    vectors = _STAIN_TO_OD + rng.normal(0, 0.06, (3, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # To stains, there gain and shift, and back, in one matrix; OpenCV's act on columns.
    moved = cv2.transform(_DENSITY[image], np.vstack([_OD_TO_STAIN * gain @ vectors, shift @ vectors]).T)
    return 256 * cv2.exp(-np.maximum(moved, 0)) - 1


def _relight(x: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """White point, gamma, contrast and saturation."""
    scale = np.full(3, 1 / 255)
    if rng.random() < 0.6:  # most tissue has light background: move it to where another scanner has it
        white = np.maximum(np.percentile(x[::4, ::4].reshape(-1, 3), 98, axis=0), 64)
        scale *= (rng.uniform(180, 252) + rng.normal(0, 8, 3)) / white
    x = 255 * cv2.pow(np.clip(x * scale.astype(np.float32), 0, 1), random_scale(rng, 0.65, 1.5))
    saturation, contrast, shift = rng.uniform(0.5, 1.5), rng.uniform(0.7, 1.3), rng.normal(0, 8)
    # Distances from each pixel's grey, and from the mean grey, are stretched; the last column shifts.
    colours = contrast * (saturation * np.eye(3) + (1 - saturation) / 3)
    middle = np.full((3, 1), (1 - contrast) * cv2.mean(cv2.transform(x, np.full((1, 3), 1 / 3)))[0] + shift)
    return cv2.transform(x, np.hstack([colours, middle]).astype(np.float32))

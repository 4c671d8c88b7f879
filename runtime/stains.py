"""How much haematoxylin a pixel holds, by colour deconvolution."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

#: Optical densities (R, G, B) of haematoxylin, eosin and DAB: Ruifrok & Johnston, Anal Quant Cytol Histol 23 (2001).
_RGB_OF_HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
#: What each of the 256 values of R, G and B adds to the haematoxylin: one look-up in place of a logarithm.
_SHARES = (
    -np.log10(np.maximum(np.arange(256), 1) / 255)[None, :, None] * np.linalg.inv(np.array(_RGB_OF_HED))[:, 0]
).astype(np.float32)


def haematoxylin(images: NDArray[np.uint8], stride: int) -> NDArray[np.float32]:
    """Optical density of haematoxylin, the mean over squares of `stride` px.

    White (255) is taken for glass. Values below 0, as an eosin redder than the matrix gives, count as 0.

    Args:
        images: (N, H, W, 3) uint8 RGB; H and W multiples of `stride`.
        stride: px along each side of a square.

    Returns:
        (N, H / stride, W / stride) float32, decadic; 0 = none.
    """
    size = images.shape[2] // stride, images.shape[1] // stride
    result = np.empty((len(images), size[1], size[0]), np.float32)
    for image, small in zip(images, result, strict=True):
        density = cv2.transform(cv2.LUT(image, _SHARES), np.ones((1, 3), np.float32))
        cv2.resize(np.maximum(density, 0), size, dst=small, interpolation=cv2.INTER_AREA)
    return result

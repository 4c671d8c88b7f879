"""Whatever a file holds -> (H, W, 3) uint8 RGB, by one rule for every reader."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.errors import InputError


def to_rgb8(image: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Grey or colour, with or without alpha, 8 or 16 bits -> RGB on white.

    16-bit values keep their top 8 bits: of 12 bits when none in the image passes 4095, as from a camera of
    12 bits, else of 16.

    Args:
        image: (H, W) grey, or (H, W, C) with C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha;
            bool, uint8 or uint16.
        name: what to call the image in errors.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        InputError: another shape or type; floats, say, whose white nobody knows.
    """
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 2, 3, 4):
        raise InputError(f"`{name}`: an image of 1 to 4 channels is wanted, its shape is {image.shape}")
    if image.dtype == np.bool_:
        image = image * np.uint8(255)
    elif image.dtype == np.uint16:
        image = (image >> (4 if image.max(initial=0) <= 4095 else 8)).astype(np.uint8)
    elif image.dtype != np.uint8:
        raise InputError(f"`{name}`: 8 or 16 bit pixels are wanted, its are {image.dtype}; save it as 8 bit RGB")
    if image.shape[2] in (2, 4):
        image = on_white(image[..., :-1], image[..., -1:])
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def on_white(colour: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Composite (H, W, C) uint8 with straight alpha (H, W, 1) uint8 on white, as glass is."""
    if alpha.min(initial=255) == 255:
        return colour
    weight = alpha.astype(np.uint16)
    return ((colour * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)

"""Whatever a file holds -> (H, W, 3) uint8 RGB, by one rule for every reader."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.errors import InputError


def to_rgb8(image: NDArray[Any], name: str, bits: int | None = None) -> NDArray[np.uint8]:
    """Grey or colour, with or without alpha, of up to 16 bits -> RGB on white.

    Args:
        image: (H, W) grey, or (H, W, C) with C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha;
            bool, uint8 or uint16.
        name: what to call the image in errors.
        bits: how many the file says a sample has. None and 16 are not believed, for cameras of fewer bits save 16:
            the brightest sample decides between 8, 10, 12, 14 and 16.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        InputError: another shape or type; floats, say, whose white nobody knows.
    """
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 2, 3, 4):
        raise InputError(f"`{name}`: an image of 1 to 4 channels is wanted, its shape is {image.shape}")
    colours = 3 if image.shape[2] > 2 else 1
    if image.dtype == np.bool_:
        image = image * np.uint8(255)
    elif image.dtype == np.uint16:
        parts = image[..., :colours], image[..., colours:]
        taken = [bits if bits and bits < 16 else _bits_taken(part) for part in parts]
        image = np.dstack([(part >> max(0, n - 8)).astype(np.uint8) for part, n in zip(parts, taken, strict=True)])
    elif image.dtype != np.uint8:
        raise InputError(f"`{name}`: 8 or 16 bit pixels are wanted, its are {image.dtype}; save it as 8 bit RGB")
    elif bits and bits < 8:
        image = (np.arange(256) * 255 // (2**bits - 1)).astype(np.uint8)[image]
    if image.shape[2] > colours:
        image = on_white(image[..., :-1], image[..., -1:])
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _bits_taken(samples: NDArray[np.uint16]) -> int:
    """Nothing that is shown on white glass leaves the upper two bits of all its samples empty."""
    brightest = int(samples.max(initial=0))
    return next(bits for bits in (8, 10, 12, 14, 16) if brightest < 1 << bits)


def on_white(colour: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Composite (H, W, C) uint8 with straight alpha (H, W, 1) uint8 on white, as glass is."""
    if alpha.min(initial=255) == 255:
        return colour
    weight = alpha.astype(np.uint16)
    return ((colour * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)

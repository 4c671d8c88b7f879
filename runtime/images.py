"""PNG and JPEG by Pillow, and the few TIFFs that it alone knows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nsam.runtime.errors import InputError, reading
from nsam.runtime.pixels import to_rgb8
from nsam.runtime.scales import NO_MPP, UM_PER_INCH, resolution_mpp
from nsam.runtime.slides import ArraySlide, Slide


def open_image(path: Path) -> Slide:
    """A PNG or JPEG, turned upright as its EXIF says.

    Raises:
        InputError: damaged, cut off, or pixels that `to_rgb8` refuses.
    """
    return ArraySlide(load_image(path, ("PNG", "JPEG")), path, *image_mpp(path))


def image_mpp(path: Path) -> tuple[float | None, str]:
    """mpp by the dots per inch of a PNG or JPEG, from its header alone.

    Raises:
        InputError: it is neither.
    """
    with _pillow(path, ("PNG", "JPEG")) as image:
        dpi = image.info.get("dpi")
    return resolution_mpp(dpi, UM_PER_INCH) if dpi else NO_MPP


@contextmanager
def _pillow(path: Path, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """An image opened by Pillow, of which only the header is read yet."""
    with reading(path), warnings.catch_warnings():
        # From 89 Mpx on it warns, and of damage that costs no pixel; errors are reported.
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=formats) as image:
                yield image
        except Image.DecompressionBombError as error:
            raise InputError(f"`{path}`: too large for one piece in memory; save it as a tiled TIFF") from error


def load_image(path: Path, formats: tuple[str, ...]) -> NDArray[np.uint8]:
    """An image by Pillow: (H, W, 3) uint8 RGB."""
    with _pillow(path, formats) as image:
        if image.format == "PNG" and image.mode in ("RGB", "RGBA") and _png_bits(path) == 16:
            return to_rgb8(_png_of_16_bits(path), str(path))  # Pillow cuts them to 8
        if image.format != "TIFF":
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            return to_rgb8(np.asarray(image).astype(np.uint16), str(path))
        if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
            return to_rgb8(np.asarray(image.convert("RGBA")), str(path))
        return to_rgb8(np.asarray(image.convert("RGB")), str(path))


def _png_bits(path: Path) -> int:
    """Bits a sample, from the header."""
    with path.open("rb") as stream:
        return stream.read(25)[24]


def _png_of_16_bits(path: Path) -> NDArray[np.uint16]:
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)  # on Windows imread knows ASCII only
    if pixels is None:
        raise InputError(f"`{path}`: cannot be read; the file is damaged or cut off")
    return np.asarray(
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB if pixels.shape[2] == 3 else cv2.COLOR_BGRA2RGBA), np.uint16
    )

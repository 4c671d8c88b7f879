"""Where a slide has tissue, told from glass and pen by colour at low resolution."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

#: Side of a mask px: small beside a cell's surroundings, and large enough that noise averages out.
RESOLUTION_UM = 4.0
#: Tissue is taken this much wider than it looks, for its rim may be pale.
GROW_UM = 32.0
#: Pen strokes are wider than this; smaller spots of their colours are pigment, blood or a fold.
PEN_UM = 100.0

_WHITE_AT_LEAST = 200  # an image darker than that throughout has no glass in it
_DARKER, _COLOURED = 0.88, 10  # share of white, and grey levels between channels: tissue from there on


def find_tissue(overview: NDArray[np.uint8], um_per_px: float) -> NDArray[np.bool_]:
    """Tissue, as a mask that rather takes in glass than leaves out a nucleus.

    Args:
        overview: (H, W, 3) uint8 RGB, the whole slide.
        um_per_px: its scale, about `RESOLUTION_UM`.

    Returns:
        (H, W) bool.
    """
    low, high = overview.min(axis=2), overview.max(axis=2)
    white = max(float(np.percentile(low, 99)), _WHITE_AT_LEAST)
    seen = ((low < _DARKER * white) | (high - low > _COLOURED)).astype(np.uint8)
    pen = _pen(overview, white, um_per_px)
    seen[pen > 0] = 0
    # Specks stay: dust costs a tile, a lonely cell would be lost.
    grown = cv2.dilate(seen, _disc(GROW_UM / um_per_px))
    tissue: NDArray[np.bool_] = (grown > 0) & (pen == 0)
    return tissue


def _pen(overview: NDArray[np.uint8], white: float, um_per_px: float) -> NDArray[np.uint8]:
    """Ink of blue, green, red and black pens, by optical densities that neither H&E nor DAB has."""
    density = -np.log10(np.clip(overview.astype(np.float32), 1, white) / white)
    red, green, blue = cv2.split(density)
    # Haematoxylin and eosin both take more of the green light than of the red.
    cold = (red > 1.25 * green + 0.05) & (red > 0.2)
    # Eosin lets blue pass, DAB takes more of the red.
    warm = (green > 0.4) & (blue > 0.7 * green) & (red < 0.25 * green)
    black = density.min(axis=2) > 0.9
    ink = (cold | warm | black).astype(np.uint8)
    # Beyond the edge there is no ink, or a spot there would pass for a stroke.
    stroke = cv2.morphologyEx(
        ink, cv2.MORPH_OPEN, _disc(PEN_UM / 2 / um_per_px), borderType=cv2.BORDER_CONSTANT, borderValue=0
    )
    # A stroke's rim is paler than the stroke.
    return np.asarray(cv2.dilate(stroke, _disc(PEN_UM / 4 / um_per_px)), np.uint8)


def _disc(radius_px: float) -> NDArray[np.uint8]:
    side = 2 * max(1, round(radius_px)) + 1
    kernel: NDArray[np.uint8] = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)).astype(np.uint8)
    return kernel

"""QuPath's GeoJSON -> label map, so that outlines drawn or corrected there are labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.draw import polygon

from nsam.runtime.errors import InputError


def read_annotations(path: Path, size_wh: tuple[int, int]) -> NDArray[np.int32]:
    """Outlines as QuPath exports them ("Export objects as GeoJSON"), and as nsam-infer writes them.

    Args:
        path: a FeatureCollection, a list of features, or one feature: Polygons or MultiPolygons in px of the image,
            where pixel (0, 0) covers [0, 1). A pixel belongs to the outline that its centre lies in; where outlines
            overlap, to the first.
        size_wh: width and height of the image.

    Returns:
        (H, W) int32, one id a feature, 0 = background.

    Raises:
        InputError: no GeoJSON, or a feature that outlines nothing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        features = content.get("features", [content]) if isinstance(content, dict) else content
        outlines = [_rings(feature["geometry"]) for feature in features]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"`{path}`: not GeoJSON of Polygons or MultiPolygons ({error}); in QuPath: File, Export objects as GeoJSON"
        ) from error
    labels = np.zeros((size_wh[1], size_wh[0]), np.int32)
    for value, rings in enumerate(outlines, 1):
        inside = np.zeros(labels.shape, bool)
        for ring in rings:  # a hole is a ring within a ring: what lies in both is outside
            rows, columns = polygon(ring[:, 1] - 0.5, ring[:, 0] - 0.5, labels.shape)  # type: ignore[no-untyped-call]
            inside[rows, columns] ^= True
        labels[inside & (labels == 0)] = value
    return labels


def _rings(geometry: dict[str, Any]) -> list[NDArray[np.float64]]:
    kind, coordinates = geometry["type"], geometry["coordinates"]
    if kind not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"a {kind} outlines no nucleus")
    polygons = [coordinates] if kind == "Polygon" else coordinates
    return [np.asarray(ring, float)[:, :2] for rings in polygons for ring in rings]

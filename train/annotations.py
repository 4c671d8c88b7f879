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
            overlap, to the first. Of a cell, the nucleus's outline is taken.
        size_wh: width and height of the image.

    Returns:
        (H, W) int32, one id a feature, 0 = background.

    Raises:
        InputError: no GeoJSON; a feature that outlines nothing, lies outside the image or encloses others; outlines
            of several planes of a stack.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        features = content.get("features", [content]) if isinstance(content, dict) else content
        geometries = [feature.get("nucleusGeometry") or feature["geometry"] for feature in features]
        outlines = [_rings(number, geometry) for number, geometry in enumerate(geometries, 1)]
        planes = {json.dumps(geometry.get("plane"), sort_keys=True) for geometry in geometries}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"`{path}`: not GeoJSON of Polygons or MultiPolygons ({error}); in QuPath: File, Export objects as GeoJSON"
        ) from error
    if len(planes) > 1:
        raise InputError(f"`{path}`: outlines of several planes ({', '.join(sorted(planes))}); export those of one")
    labels = np.zeros((size_wh[1], size_wh[0]), np.int32)
    middles = np.array([ring.mean(axis=0) for ring, *_ in outlines]).reshape(-1, 2)
    within = np.all((middles >= 0) & (middles < size_wh), axis=1)
    columns_at, rows_at = middles[within].astype(int).T
    for value, rings in enumerate(outlines, 1):
        points = np.concatenate(rings)
        low, high = points.min(axis=0), points.max(axis=0)
        if np.any(high <= 0) or np.any(low >= size_wh):
            raise InputError(
                f"`{path}`: feature {value} lies outside the image of {size_wh[0]} x {size_wh[1]} px; outlines must be "
                "in the image's own px, not the slide's"
            )
        x0, y0 = np.maximum(np.floor(low), 0).astype(int)
        x1, y1 = np.minimum(np.ceil(high), size_wh).astype(int)
        part = labels[y0:y1, x0:x1]
        inside = np.zeros(part.shape, bool)
        for ring in rings:  # a hole is a ring within a ring: what lies in both is outside
            y, x = ring[:, 1] - 0.5 - y0, ring[:, 0] - 0.5 - x0
            rows, columns = polygon(y, x, part.shape)  # type: ignore[no-untyped-call]
            inside[rows, columns] ^= True
        near = (columns_at >= x0) & (columns_at < x1) & (rows_at >= y0) & (rows_at < y1)
        enclosed = int(inside[rows_at[near] - y0, columns_at[near] - x0].sum()) - 1
        if enclosed > 1:
            raise InputError(f"`{path}`: feature {value} encloses {enclosed} others; delete what outlines no nucleus")
        part[inside & (part == 0)] = value
    return labels


def _rings(number: int, geometry: dict[str, Any]) -> list[NDArray[np.float64]]:
    kind, coordinates = geometry["type"], geometry["coordinates"]
    if kind not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"a {kind} outlines no nucleus")
    polygons = [coordinates] if kind == "Polygon" else coordinates
    rings = [np.asarray(ring, float) for rings in polygons for ring in rings]
    if not rings or any(r.ndim != 2 or len(r) < 3 or r.shape[1] < 2 or not np.isfinite(r).all() for r in rings):
        raise ValueError(f"feature {number} has no outline")
    return [ring[:, :2] for ring in rings]

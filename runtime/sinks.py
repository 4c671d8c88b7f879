"""Files that take one nucleus after the other: GeoJSON, CSV, and the overlay to look at."""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nsam.runtime.measure import Nucleus
from nsam.runtime.slides import Slide, read_overview

#: Takes a nucleus and its closed ring (N, 2) int32, level-0 px; called with ascending ids.
Add = Callable[[Nucleus, NDArray[np.int32]], None]

#: Ids follow from the slide's name and the nucleus's number, so a second run gives the same.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "nsam")
_OVERVIEW_PX = 2048
_OUTLINE_RGB = (0, 200, 60)  # green stands out from both stains
_FRACTION_BITS = 4  # OpenCV draws in 1/16 px

_CSV_COLUMNS = (
    "id",
    "x_px",
    "y_px",
    "x_um",
    "y_um",
    "area_um2",
    "perimeter_um",
    "major_um",
    "minor_um",
    "eccentricity",
    "probability",
)


@contextmanager
def geojson_sink(path: Path, slide_name: str) -> Iterator[Add]:
    """A FeatureCollection (RFC 7946) as QuPath imports it: a detection per nucleus, in level-0 px."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write('{"type": "FeatureCollection", "features": [')
        separator = "\n"

        def add(nucleus: Nucleus, ring: NDArray[np.int32]) -> None:
            nonlocal separator
            stream.write(separator + json.dumps(_feature(nucleus, ring, slide_name), ensure_ascii=False))
            separator = ",\n"

        yield add
        stream.write("\n]}\n")


def _feature(nucleus: Nucleus, ring: NDArray[np.int32], slide_name: str) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, f"{slide_name}#{nucleus.id}")),
        "geometry": {"type": "Polygon", "coordinates": [ring.tolist()]},
        "properties": {
            "objectType": "detection",
            "classification": {"name": "Nucleus"},
            "measurements": {
                "Nucleus id": nucleus.id,
                "Area µm^2": round(nucleus.area_um2, 3),
                "Perimeter µm": round(nucleus.perimeter_um, 3),
                "Major axis µm": round(nucleus.major_um, 3),
                "Minor axis µm": round(nucleus.minor_um, 3),
                "Eccentricity": round(nucleus.eccentricity, 4),
                "Probability": round(nucleus.probability, 4),
            },
        },
    }


@contextmanager
def csv_sink(path: Path, mpp: float) -> Iterator[Add]:
    """A row per nucleus; `_px` are level-0 px and `_um` µm, both from the slide's upper left corner."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_CSV_COLUMNS)

        def add(nucleus: Nucleus, ring: NDArray[np.int32]) -> None:
            x, y = nucleus.centroid_xy
            lengths = (x, y, x * mpp, y * mpp, nucleus.area_um2, nucleus.perimeter_um)
            axes = (nucleus.major_um, nucleus.minor_um)
            ratios = (nucleus.eccentricity, nucleus.probability)
            writer.writerow([nucleus.id, *(f"{v:.3f}" for v in lengths + axes), *(f"{v:.4f}" for v in ratios)])

        yield add


@contextmanager
def overlay_sink(path: Path, slide: Slide) -> Iterator[Add]:
    """A JPEG of the slide, its longer side at most 2048 px, with the outlines of the nuclei.

    Raises:
        InputError: the slide cannot be read.
    """
    canvas = read_overview(slide, _OVERVIEW_PX)
    scale = np.array(canvas.shape[1::-1]) / slide.size_wh

    def add(nucleus: Nucleus, ring: NDArray[np.int32]) -> None:
        # OpenCV counts from the middle of the first pixel, rings from its corner.
        points = np.rint((ring * scale - 0.5) * (1 << _FRACTION_BITS)).astype(np.int32)
        cv2.polylines(canvas, [points], True, _OUTLINE_RGB, 1, cv2.LINE_AA, _FRACTION_BITS)

    yield add
    # Through memory: Pillow takes a write that a full disk cut short for a success.
    jpeg = io.BytesIO()
    Image.fromarray(canvas).save(jpeg, "JPEG", quality=90)
    path.write_bytes(jpeg.getvalue())

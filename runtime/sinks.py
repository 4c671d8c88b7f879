"""Files that take one nucleus after the other: GeoJSON and tables."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.errors import OutputError
from nsam.runtime.measure import Nucleus

#: Takes a nucleus and its `simplified_rings`; called with ascending ids. Rings are empty where no output needs them.
Add = Callable[[Nucleus, list[NDArray[np.float64]]], None]

#: Ids follow from the slide's name and the nucleus's number, so a second run gives the same.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "nsam")
_ROW_GROUP = 65536  # rows that wait in memory for a Parquet file

_COLUMNS = (
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
    "solidity",
    "haematoxylin_od",
    "probability",
)


@contextmanager
def geojson_sink(
    path: Path,
    slide_name: str,
    origin_xy: tuple[int, int] = (0, 0),
    compressed: bool = False,
    kind: Literal["detection", "annotation"] = "detection",
) -> Iterator[Add]:
    """A FeatureCollection (RFC 7946) as QuPath imports it: an object per nucleus, in level-0 px.

    Args:
        path: to write.
        slide_name: from which the features' ids follow.
        origin_xy: the level-0 px from which QuPath counts; see `Slide.origin_xy`.
        compressed: as gzip, which QuPath opens as it is.
        kind: QuPath shows millions of detections, and lets nobody move their outlines; of annotations the reverse.
    """
    # No name and no time in the gzip header: the same nuclei are the same file.
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, 0) if compressed else raw as target,
        io.TextIOWrapper(target, encoding="utf-8", newline="\n") as stream,
    ):
        stream.write('{"type": "FeatureCollection", "features": [')
        separator, origin = "\n", np.array(origin_xy)

        def add(nucleus: Nucleus, rings: list[NDArray[np.float64]]) -> None:
            nonlocal separator
            rings = [ring - origin for ring in rings]
            stream.write(separator + json.dumps(_feature(nucleus, rings, slide_name, kind), ensure_ascii=False))
            separator = ",\n"

        yield add
        stream.write("\n]}\n")


def _feature(nucleus: Nucleus, rings: list[NDArray[np.float64]], slide_name: str, kind: str) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, f"{slide_name}#{nucleus.id}")),
        "geometry": {"type": "Polygon", "coordinates": [ring.tolist() for ring in rings]},
        "properties": {
            "objectType": kind,
            "classification": {"name": "Nucleus"},
            "measurements": {
                "Nucleus id": nucleus.id,
                "Area µm^2": round(nucleus.area_um2, 3),
                "Perimeter µm": round(nucleus.perimeter_um, 3),
                "Major axis µm": round(nucleus.major_um, 3),
                "Minor axis µm": round(nucleus.minor_um, 3),
                "Eccentricity": round(nucleus.eccentricity, 4),
                "Solidity": round(nucleus.solidity, 4),
                "Haematoxylin OD mean": round(nucleus.haematoxylin, 4),
                "Probability": round(nucleus.probability, 4),
            },
        },
    }


@contextmanager
def csv_sink(path: Path, mpp: float) -> Iterator[Add]:
    """A row per nucleus; `_px` are level-0 px and `_um` µm, both from the slide's upper left corner."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_COLUMNS)
        yield lambda nucleus, rings: writer.writerow(_row(nucleus, mpp))


def _row(nucleus: Nucleus, mpp: float) -> list[float]:
    """Values of `_COLUMNS`, rounded: 1/1000 of px and µm, 1/10000 of what has no unit."""
    x, y = nucleus.centroid_xy
    lengths = (x, y, x * mpp, y * mpp, nucleus.area_um2, nucleus.perimeter_um, nucleus.major_um, nucleus.minor_um)
    ratios = (nucleus.eccentricity, nucleus.solidity, nucleus.haematoxylin, nucleus.probability)
    return [nucleus.id, *(round(v, 3) for v in lengths), *(round(v, 4) for v in ratios)]


def check_parquet() -> None:
    """Know before the work whether Parquet can be written.

    Raises:
        OutputError: pyarrow is missing or broken.
    """
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise OutputError(
            f"`--outputs parquet`: needs pyarrow, which cannot be imported ({error}); pip install 'nsam[parquet]'"
        ) from error


@contextmanager
def parquet_sink(path: Path, mpp: float) -> Iterator[Add]:
    """The columns and values of the CSV as Parquet: `id` int32, the others float64."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(name, pyarrow.int32() if name == "id" else pyarrow.float64()) for name in _COLUMNS])
    rows: list[list[float]] = []

    def flush() -> None:
        columns: list[Sequence[float]] = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
        writer.write_table(pyarrow.table(dict(zip(_COLUMNS, columns, strict=True)), schema=schema))
        rows.clear()

    def add(nucleus: Nucleus, rings: list[NDArray[np.float64]]) -> None:
        rows.append(_row(nucleus, mpp))
        if len(rows) == _ROW_GROUP:
            flush()

    with path.open("wb") as stream, parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        yield add
        if rows:
            flush()

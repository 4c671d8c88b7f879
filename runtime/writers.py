"""Results of a slide, written while it is segmented; every file is whole or not there."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.canvas import Strip
from nsam.runtime.files import output_errors, part_of
from nsam.runtime.outlines import simplified_rings
from nsam.runtime.pictures import Density, overlay_sink, write_heatmap, write_thumbnail
from nsam.runtime.region import Region
from nsam.runtime.settings import DONE_NAME, OUTPUTS, THUMBNAIL_NAME
from nsam.runtime.sinks import Add, csv_sink, geojson_sink, parquet_sink
from nsam.runtime.slides import OVERVIEW_PX, Slide, read_overview
from nsam.runtime.tiffs import write_labels, write_pyramid

_OUTLINED = {"geojson", "geojson.gz", "annotations", "overlay"}
_BIN_UM2, _BINS = 5, 50  # of the histogram; the last bin holds all larger ones, too


def write_results(
    strips: Iterable[Strip],
    slide: Slide,
    mpp: float,
    folder: Path,
    outputs: Sequence[str],
    region: Region | None = None,
) -> dict[str, Any]:
    """Write a slide's results while its strips come in, and move them into place at the end.

    Earlier results stay until then. `slide.json`, which says that results are complete, is removed before the
    first file is moved; to write it anew is the caller's part.

    Args:
        strips: of the whole slide; consumed once.
        slide: the slide itself, for its size, its name and the pictures' background.
        mpp: µm per level-0 px.
        folder: made if need be.
        outputs: keys of `settings.OUTPUTS`; a thumbnail comes with them.
        region: where nuclei were wanted, for density and thumbnail; None: everywhere.

    Returns:
        `nuclei`, their number; `peak_per_mm2`, the highest density on a grid of 50 µm; `area_um2`: median (None
        without nuclei) and histogram of their areas; `cut_by_halo`: nuclei larger than a block's halo, and parts of
        such that were left out.

    Raises:
        OutputError: disk full, no permission and the like.
        Exception: whatever `strips` raises. Nothing half-written is left in either case.
    """
    parts = {name: part_of(folder / OUTPUTS[name]) for name in outputs}
    labels = part_of(folder / OUTPUTS["labels"])
    size_wh, name = slide.size_wh, slide.path.name
    areas, density, cut = array("d"), Density(size_wh, mpp, region), 0

    def feed(adds: Sequence[Add]) -> Iterator[Strip]:
        nonlocal cut
        for strip in strips:
            cut += strip.doubled
            for nucleus in strip.nuclei:
                rings = simplified_rings(nucleus) if outlined else []
                for add in adds:
                    add(nucleus, rings)
                density.add(nucleus)
                areas.append(nucleus.area_um2)
                cut += nucleus.cut
            yield strip

    outlined = not _OUTLINED.isdisjoint(outputs)
    overview = read_overview(slide, OVERVIEW_PX)
    sinks: dict[str, Callable[[Path], AbstractContextManager[Add]]] = {
        "geojson": lambda path: geojson_sink(path, name, slide.origin_xy),
        "geojson.gz": lambda path: geojson_sink(path, name, slide.origin_xy, compressed=True),
        "annotations": lambda path: geojson_sink(path, name, slide.origin_xy, kind="annotation"),
        "csv": lambda path: csv_sink(path, mpp),
        "parquet": lambda path: parquet_sink(path, mpp),
        "overlay": lambda path: overlay_sink(path, overview, size_wh),
    }
    with output_errors(folder), ExitStack() as cleanup:
        folder.mkdir(parents=True, exist_ok=True)
        thumbnail = part_of(folder / THUMBNAIL_NAME)
        for part in (*parts.values(), labels, thumbnail):
            cleanup.callback(part.unlink, missing_ok=True)
        with ExitStack() as files:
            adds = [files.enter_context(sinks[output](parts[output])) for output in outputs if output in sinks]
            fed = feed(adds)
            if "labels" in parts or "ometiff" in parts:
                write_labels(labels, fed, size_wh, mpp)
            else:
                for _ in fed:
                    pass
        if "ometiff" in parts:
            write_pyramid(parts["ometiff"], labels, mpp, name)
        if "heatmap" in parts:
            write_heatmap(parts["heatmap"], density)
        write_thumbnail(thumbnail, overview, density, region)
        (folder / DONE_NAME).unlink(missing_ok=True)
        for output, part in parts.items():
            os.replace(part, folder / OUTPUTS[output])
        os.replace(thumbnail, folder / THUMBNAIL_NAME)
    return {**_summary(np.frombuffer(areas), density), "cut_by_halo": cut}


def _summary(areas: NDArray[np.float64], density: Density) -> dict[str, Any]:
    bins = np.minimum(areas // _BIN_UM2, _BINS - 1).astype(int)
    return {
        "nuclei": areas.size,
        "peak_per_mm2": density.peak,
        "area_um2": {
            "median": float(np.median(areas)) if areas.size else None,
            "bin": _BIN_UM2,
            "histogram": np.bincount(bins, minlength=_BINS).tolist(),
        },
    }

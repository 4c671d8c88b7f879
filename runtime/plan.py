"""`--dry-run`: what a run would do, and about what it would cost."""

from __future__ import annotations

import time
from collections.abc import Iterator

import click
import numpy as np
from numpy.typing import NDArray

from nsam.runtime.engines import Engine
from nsam.runtime.inputs import find_slides
from nsam.runtime.job import Job
from nsam.runtime.outcome import Failed
from nsam.runtime.settings import Settings
from nsam.runtime.slides import level_for

_TRIAL_SECONDS = 2.0
#: Bytes of the outputs by their names, as measured on two slides.
_BYTES_PER_NUCLEUS = {"geojson": 720, "annotations": 720, "geojson.gz": 130, "csv": 90, "parquet": 60}
_BYTES_PER_PX = {"labels": 0.06, "ometiff": 0.07}
_BYTES_EACH = {"overlay": 900_000, "heatmap": 100_000}
_NUCLEI_PER_MM2 = 3000  # of H&E; lymphocytes reach three times as many


def dry_run(settings: Settings) -> int:
    """Tell of each slide its scale, level, tiles, and the time and disk that it will take; nothing is written.

    Returns:
        How many slides cannot be done.

    Raises:
        NsamError: no run could begin; inputs, model or device do not fit.
    """
    sources = find_slides(settings.inputs, settings.mask_dir)
    job = Job.of(settings)
    engine = job.engine()
    told = engine.card.input.size
    rate = tiles_per_second(engine, settings.batch)
    click.echo(f"device: {engine.device}, {rate:.2g} tiles of {told} px a second")
    tiles = failed = 0
    disk = seconds = 0.0
    for source in sources:
        try:
            with job.opened(source) as (slide, frame, mpp_source):
                wanted, area_px = frame.tiles_wanted, frame.region.area_px
                needed = wanted * (frame.tile_px / told) ** 2 / rate
                width, height = slide.size_wh
                level = level_for(slide, frame.grid)
        except Failed as failure:
            failed += 1
            click.echo(f"{source.path}: would fail ({failure.stage}): {failure.reason}", err=True)
            continue
        total = sum(map(len, frame.tiles))
        nuclei = area_px * frame.mpp**2 / 1e6 * _NUCLEI_PER_MM2
        size = sum(
            nuclei * _BYTES_PER_NUCLEUS.get(name, 0)
            + width * height * _BYTES_PER_PX.get(name, 0)
            + _BYTES_EACH.get(name, 0)
            for name in settings.outputs
        )
        tiles, disk, seconds = tiles + wanted, disk + size, seconds + needed
        click.echo(
            f"{source.path}: {width} x {height} px, {frame.mpp:.4g} µm/px ({mpp_source}), level {level}, "
            f"{wanted} of {total} tiles of {frame.tile_px} px, about {_duration(needed)} and {size / 1e6:.0f} MB"
        )
        for remark in job.too_coarse(frame.mpp):
            click.echo(f"{source.path}: {remark}")
    click.echo(
        f"{len(sources) - failed} slides, {failed} would fail; {tiles} tiles, "
        f"about {_duration(seconds)} and {disk / 1e6:.0f} MB"
    )
    return failed


def tiles_per_second(engine: Engine, batch: int) -> float:
    """The network's rate with many tiles of `card.input.size`, by a trial of two seconds."""
    images = np.full((batch, engine.card.input.size, engine.card.input.size, 3), 200, np.uint8)
    list(engine.run_all([images, images]))  # the first passes load and allocate
    begin = time.perf_counter()

    def batches() -> Iterator[NDArray[np.uint8]]:
        while time.perf_counter() - begin < _TRIAL_SECONDS:
            yield images

    tiles = sum(len(maps) for maps in engine.run_all(batches()))
    return tiles / (time.perf_counter() - begin)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

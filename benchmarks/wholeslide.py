"""A slide of 60,000 x 60,000 px of real tissue: time, memory, and what each stage takes beside the network."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from watching import Watch

from nsam.runtime.options import Command

MPP = 0.25
_TILE_PX = 512
_TRIAL_TILES = 48


@click.command(cls=Command)
@click.argument("tissue", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--side", type=click.IntRange(1), default=60_000, show_default=True, help="Of the slide, px.")
@click.option("--height", type=click.IntRange(1), help="Of the slide, px: memory follows the width. [default: SIDE]")
@click.option("--device", default="auto", show_default=True)
@click.option("--child", is_flag=True, hidden=True)
def main(tissue: Path, folder: Path, side: int, height: int | None, device: str, child: bool) -> None:
    """Make a pyramid of TISSUE (a slide of .5 µm/px, twice as large, mirrored again and again) in FOLDER; segment it.

    `alone` is the network on as many tiles, by its rate before and after the run with nothing beside it.
    """
    height = height or side
    slide = folder / f"mosaic-{side}-{height}.tif"
    if child:
        click.echo(json.dumps(run(slide, folder / "out", device)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not slide.exists():
        click.echo(f"writing {slide}")
        write_mosaic(tissue, slide, side, height)
    shutil.rmtree(folder / "out", ignore_errors=True)
    sizes = ["--side", str(side), "--height", str(height)]
    command = [sys.executable, __file__, str(tissue), str(folder), *sizes, "--device", device, "--child"]
    child_run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(child_run.stdout.splitlines()[-1])
    for name, value in figures.items():
        click.echo(f"{name:28} {value:,.4g}" if isinstance(value, float) else f"{name:28} {value}")


def run(slide: Path, out: Path, device: str) -> dict[str, Any]:
    """One run of `nsam-infer` in this process, with its stages watched."""
    from nsam.runtime import batch, pipeline
    from nsam.runtime.inputs import Source
    from nsam.runtime.job import Job
    from nsam.runtime.settings import Settings

    settings = Settings(inputs=(str(slide),), out=out, device=device)  # type: ignore[arg-type]
    job = Job.of(settings)
    engine = job.engine()
    with job.opened(Source(slide)) as (_, frame, _):
        size = frame.tile_px
    before = seconds_per_tile(engine, size, settings.batch)
    watch = Watch()
    watch.function(pipeline, "read_input", "read")
    watch.function(pipeline, "haematoxylin", "read")
    watch.function(pipeline, "block_nuclei", "separate and measure")
    begin, cpu_begin, own_begin = time.perf_counter(), time.process_time(), time.thread_time()
    if batch.run(settings):
        raise SystemExit("the run failed")
    seconds, cpu_all = time.perf_counter() - begin, time.process_time() - cpu_begin
    cpu = {name: stage.cpu_s for name, stage in watch.stages.items()}
    cpu["assemble and write, tissue mask"] = time.thread_time() - own_begin
    cpu["network"] = cpu_all - sum(cpu.values())
    after = seconds_per_tile(engine, size, settings.batch)
    done = json.loads((out / slide.stem / "slide.json").read_text(encoding="utf-8"))
    tiles = done["tiles"] - done["tiles_skipped"]
    alone = tiles * (before + after) / 2
    written = sum(path.stat().st_size for path in (out / slide.stem).iterdir())
    return {
        "device": engine.device,
        "tiles": f"{tiles} of {done['tiles']}, of {size} px",
        "nuclei": done["nuclei"],
        "cut_by_halo": done["cut_by_halo"],
        "mm2 in the region": done["region_mm2"],
        "seconds": seconds,
        "mm2/s": done["region_mm2"] / seconds,
        "network alone, seconds": alone,
        "beyond it": seconds / alone - 1,
        "network before, after, ms": f"{1000 * before:.1f}, {1000 * after:.1f}",
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "results, MB": written / 1e6,
        **{f"CPU: {name}": f"{value:.1f} s, {value / cpu_all:.1%}" for name, value in cpu.items()},
    }


def seconds_per_tile(engine: Any, size: int, batch: int) -> float:
    """Of the network with nothing beside it, tiles in batches as in a run."""
    batch = engine.card.input.scaled(batch, size)
    passes = max(2, engine.card.input.scaled(_TRIAL_TILES, size) // batch)
    images = np.random.default_rng(0).integers(120, 250, (batch, size, size, 3), dtype=np.uint8)
    list(engine.run_all([images, images]))
    begin = time.perf_counter()
    list(engine.run_all(images for _ in range(passes)))
    return (time.perf_counter() - begin) / (passes * batch)


def write_mosaic(tissue: Path, path: Path, width: int, height: int) -> None:
    """A tiled pyramid, JPEG, levels 1, 4 and 16."""
    from nsam.runtime.slides import open_slide

    with open_slide(tissue) as slide:
        image = slide.read_region(0, 0, 0, *slide.size_wh).copy()
    image = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for level, shrink in enumerate((1, 4, 16)):
            small = cv2.resize(image, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
            shape = (-(-height // shrink), -(-width // shrink), 3)
            tif.write(
                tiles_of(small, shape[1], shape[0]),
                shape=shape,
                dtype=np.uint8,
                tile=(_TILE_PX, _TILE_PX),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                resolution=(1e4 / MPP / shrink, 1e4 / MPP / shrink),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
                subifds=2 if level == 0 else None,
                maxworkers=1,
            )


def tiles_of(image: NDArray[np.uint8], width: int, height: int) -> Iterator[NDArray[np.uint8]]:
    """Tiles of the mosaic, row by row: the image, mirrored at each of its sides."""

    def indices(start: int, length: int) -> NDArray[np.intp]:
        index = np.arange(start, start + _TILE_PX) % (2 * length)
        return np.minimum(index, 2 * length - 1 - index)

    for y in range(0, height, _TILE_PX):
        for x in range(0, width, _TILE_PX):
            yield image[indices(y, image.shape[0])][:, indices(x, image.shape[1])]


if __name__ == "__main__":
    main()

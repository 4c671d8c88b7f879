"""A slide of 60,000 x 60,000 px of real tissue: time, memory, and what each stage takes beside the network."""

from __future__ import annotations

import json
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
from peak_memory import peak_mb
from watching import Watch

from nsam.runtime.card import sha256_of
from nsam.runtime.errors import InputError, OutputError
from nsam.runtime.files import output_errors, part_of
from nsam.runtime.options import Command, device_option
from nsam.runtime.slides import open_slide

MPP = 0.25
_TISSUE_MPP = 2 * MPP
_MPP_DIFFERS = 0.1
_TILE_PX = 512
_TRIAL_TILES = 48


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("tissue", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--side", type=click.IntRange(1), default=60_000, help="Of the slide, px.")
@click.option("--height", type=click.IntRange(1), help="Of the slide, px: memory follows the width. [default: SIDE]")
@device_option
@click.option("--child", type=click.Path(path_type=Path), hidden=True, help="The mosaic, in the process that runs it.")
def main(tissue: Path, folder: Path, side: int, height: int | None, device: str, child: Path | None) -> None:
    """Make a pyramid of TISSUE (a slide of .5 µm/px, twice as large, mirrored again and again) in FOLDER; segment it.

    A pyramid that is there already is taken; results are written into FOLDER/wholeslide-out, in place of the last ones.
    `alone` is the network on as many tiles, by its rate before and after the run with nothing beside it.
    """
    out = folder / "wholeslide-out"
    if child:
        click.echo(json.dumps(run(child, out, device)))
        return
    height = height or side
    check_scale(tissue)
    clear(out)
    slide = folder / f"mosaic-{side}-{height}-{sha256_of(tissue)[:8]}.tif"
    if not slide.exists():
        click.echo(f"writing {slide}")
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_mosaic(read_tissue(tissue), slide, side, height)
    command = [sys.executable, __file__, str(tissue), str(folder), "--device", device, "--child", str(slide)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode < 0:
        raise click.ClickException(f"the run was killed by signal {-done.returncode}, by too little memory mostly")
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    figures = json.loads(done.stdout.splitlines()[-1])
    for name, value in figures.items():
        click.echo(f"{name:28} {value:,.4g}" if isinstance(value, float) else f"{name:28} {value}")


def clear(out: Path) -> None:
    """Remove what an earlier run has left.

    Raises:
        OutputError: it is not of nsam-infer, or cannot be removed.
    """
    if not out.exists():
        return
    if not (out / "run.json").is_file():
        raise OutputError(f"`{out}`: would be removed, but no run has made it (it has no run.json); move it away")
    with output_errors(out):
        shutil.rmtree(out)


def run(slide: Path, out: Path, device: str) -> dict[str, Any]:
    """One run of `nsam-infer` in this process, with its stages watched."""
    from nsam.runtime import batch, pipeline
    from nsam.runtime.job import Job
    from nsam.runtime.settings import Settings

    settings = Settings(inputs=(str(slide),), out=out, device=device)  # type: ignore[arg-type]
    job = Job.of(settings)
    engine = job.engine()
    size = tile_px(job, slide)
    before = seconds_per_tile(engine, size, settings.batch)
    watch = Watch()
    watch.function(pipeline, "read_input", "read")
    watch.function(pipeline, "haematoxylin", "read")
    watch.function(pipeline, "block_nuclei", "separate and measure")
    begin, cpu_begin, own_begin = time.perf_counter(), time.process_time(), time.thread_time()
    if batch.run(settings):
        sys.exit(1)  # it has said why
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
        "peak memory, MB": peak_mb(),
        "results, MB": written / 1e6,
        **{f"CPU: {name}": f"{value:.1f} s, {value / cpu_all:.1%}" for name, value in cpu.items()},
    }


def tile_px(job: Any, slide: Path) -> int:
    """Side of the network's tiles in a job's run over a slide."""
    from nsam.runtime.inputs import Source
    from nsam.runtime.outcome import Failed

    try:
        with job.opened(Source(slide)) as (_, frame, _):
            return int(frame.tile_px)
    except Failed as failure:
        raise click.ClickException(failure.reason) from failure


def seconds_per_tile(engine: Any, size: int, batch: int) -> float:
    """Of the network with nothing beside it, tiles in batches as in a run."""
    batch = engine.card.input.scaled(batch, size)
    passes = max(2, engine.card.input.scaled(_TRIAL_TILES, size) // batch)
    images = np.random.default_rng(0).integers(120, 250, (batch, size, size, 3), dtype=np.uint8)
    list(engine.run_all([images, images]))
    begin = time.perf_counter()
    list(engine.run_all(images for _ in range(passes)))
    return (time.perf_counter() - begin) / (passes * batch)


def check_scale(tissue: Path) -> None:
    """Refuse tissue whose scale is known and another than what mosaics are labelled by.

    Raises:
        InputError: it is, or it cannot be opened.
    """
    with open_slide(tissue) as slide:
        mpp = slide.mpp
    if mpp and abs(mpp / _TISSUE_MPP - 1) > _MPP_DIFFERS:
        raise InputError(f"`{tissue}`: tissue of about {_TISSUE_MPP} µm/px is wanted, it has {mpp:g}; pass another")


def read_tissue(tissue: Path) -> NDArray[np.uint8]:
    """All of it, (H, W, 3) RGB."""
    with open_slide(tissue) as slide:
        return slide.read_region(0, 0, 0, *slide.size_wh).copy()


def write_mosaic(image: NDArray[np.uint8], path: Path, width: int, height: int) -> None:
    """A tiled pyramid of tissue, JPEG, levels 1, 4 and 16; `path` appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    image = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    part = part_of(path)
    with output_errors(path), tifffile.TiffWriter(part, bigtiff=True) as tif:
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
    part.replace(path)


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

"""One slide from end to end as nsam-infer does it: what each stage takes, who waits for whom, and the bottleneck.

Each moment of a thread counts for one stage. Wall seconds hold waiting for a core or for Python's lock, CPU seconds do
not. Those of `inference` are what the other stages leave of the process's, for it works in a library's own threads.
"""

from __future__ import annotations

import json
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
from common_options import json_option
from watching import Watch

from nsam.runtime import engines, job, pipeline, writers
from nsam.runtime.bands import BandStore
from nsam.runtime.inputs import Source
from nsam.runtime.options import Command, device_option, names_of, precision_option
from nsam.runtime.outcome import Failed
from nsam.runtime.settings import OUTPUTS, Settings

#: Part of the pipeline, each in a thread of its own (`separate`: in `--workers`), and its stages.
PARTS = {
    "read": ("decode, resize", "haematoxylin", "stack a batch"),
    "infer": ("inference", "fill the maps"),
    "separate": ("gather the maps", "separate", "carry to level 0", "measure", "choose those owned"),
    "write": (
        *("open", "tissue mask", "overview", "keep bands", "assemble", "outlines"),
        *(f"write {name}" for name in OUTPUTS),
        *("density", "thumbnail", "slide.json", "rest"),
    ),
}
READERS, TILES, MAPS_FULL, MAPS, NUCLEI = WAITS = (
    "readers for the network, its queue full",
    "network for tiles",
    "network for the separation, its queue full",
    "separation for maps",
    "writing for the separation",
)


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("slide", type=click.Path(path_type=Path, exists=True))
@click.option("--mpp", type=float, help="Scale of the slide, µm/px. [default: from its metadata]")
@click.option("--model", type=click.Path(path_type=Path), help="A folder made by nsam-export. [default: nsam's own]")
@device_option
@precision_option
@click.option("--threads", type=click.IntRange(1), help="CPU threads of the network. [default: all cores]")
@click.option("--workers", type=click.IntRange(1), help="Threads that separate nuclei. [default: half the cores]")
@click.option("--batch", type=click.IntRange(1), default=Settings.batch, help="Tiles a pass of the network.")
@click.option("--outputs", callback=names_of(OUTPUTS), default=",".join(Settings.outputs), help="What to write.")
@json_option
def main(slide: Path, json_path: Path | None, **options: Any) -> None:
    """Segment SLIDE into a temporary folder, the network loaded and warm, and show where the time goes."""
    with tempfile.TemporaryDirectory() as out:
        figures = run(slide, Settings(inputs=(str(slide),), out=Path(out), **options))
    show(figures)
    if json_path:
        json_path.write_text(json.dumps({"slide": slide.name, **figures}, indent=1) + "\n", encoding="utf-8")


def run(slide: Path, settings: Settings) -> dict[str, Any]:
    """All figures of one run."""
    work = job.Job.of(settings)
    engine = work.engine()
    try:
        with work.opened(Source(slide)) as (_, frame, _):
            size, tiles = frame.tile_px, frame.tiles_wanted
    except Failed as failure:
        raise click.ClickException(failure.reason) from failure
    images = np.zeros((engine.card.input.scaled(settings.batch, size), size, size, 3), np.uint8)
    list(engine.run_all([images] * min(tiles, 2)))  # one tile alone is run by another engine than many
    import_module("nsam.runtime.readers")  # late in the runtime: the first slide alone would pay for it
    watch = Watch()
    attach(watch, engine)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        with watch.stage("rest"):
            done = work.segment(Source(slide), settings.out / "slide", lambda done, total: None)
    except Failed as failure:
        raise click.ClickException(failure.reason) from failure
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert done is not None
    workers = settings.workers or max(1, engines.available_cores() // 2)
    return {
        "device": engine.device,
        "workers": workers,
        "tiles": done["tiles"] - done["tiles_skipped"],
        "nuclei": done["nuclei"],
        "region_mm2": done["region_mm2"],
        **summary(watch, wall, cpu, workers),
    }


def attach(watch: Watch, engine: engines.Engine) -> None:
    """Watch all stages and queues of the pipeline."""
    watch.function(job, "open_slide", "open")
    watch.function(job.Region, "of", "tissue mask")
    watch.function(pipeline, "read_input", "decode, resize")
    watch.function(pipeline, "haematoxylin", "haematoxylin")
    watch.generator(engine, "run_all", "inference")
    watch.function(pipeline, "separate", "separate")
    watch.function(pipeline, "carry", "carry to level 0")
    watch.function(pipeline, "nearest", "carry to level 0")
    watch.function(pipeline, "measure", "measure")
    watch.function(pipeline, "block_nuclei", "choose those owned")
    watch.generator(pipeline, "separate_bands", NUCLEI)
    watch.function(pipeline.MapStrip, "columns", "gather the maps")
    watch.function(BandStore, "write", "keep bands")
    watch.generator(pipeline, "assemble", "assemble")
    watch.function(writers, "read_overview", "overview")
    watch.function(writers, "simplified_rings", "outlines")
    watch.function(writers.Density, "add", "density")
    for name in ("csv", "parquet", "overlay"):
        watch.sink(writers, f"{name}_sink", f"write {name}")
    watch.sink(writers, "geojson_sink", "write geojson")
    watch.function(writers, "write_labels", "write labels")
    watch.function(writers, "write_pyramid", "write ometiff")
    watch.function(writers, "write_heatmap", "write heatmap")
    watch.function(writers, "write_thumbnail", "thumbnail")
    watch.function(job, "write_text", "slide.json")
    real = pipeline.prefetch
    # Who makes the items, how long they wait for a place in the queue, and how long the queue's reader for them.
    queues = {"batches": ("stack a batch", READERS, TILES), "map_rows": ("fill the maps", MAPS_FULL, MAPS)}

    def prefetch(items: Any, *options: Any) -> Any:
        made, full, empty = queues[items.__name__]
        return watch.items(real(watch.items(items, made, full), *options), empty)

    pipeline.prefetch = prefetch


def summary(watch: Watch, wall: float, cpu: float, workers: int) -> dict[str, Any]:
    """Stages, waits, overlap and bottleneck of a run of so many seconds."""
    found = watch.stages
    found["inference"].cpu_s = cpu - sum(stage.cpu_s for name, stage in found.items() if name != "inference")
    rows = [
        {"part": part, "stage": name, **vars(found[name]), "share": found[name].wall_s / wall}
        for part, names in PARTS.items()
        for name in names
        if name in found
    ]
    busy = {part: sum(row["wall_s"] for row in rows if row["part"] == part) for part in PARTS}
    load = {part: busy[part] / wall / (workers if part == "separate" else 1) for part in PARTS}
    slowest = max(load, key=load.__getitem__)
    largest = max((row for row in rows if row["part"] == slowest), key=lambda row: row["wall_s"])
    running = busy["infer"] + found[TILES].wall_s + found[MAPS_FULL].wall_s
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "stages": rows,
        "waits": {**{name: found[name].wall_s for name in WAITS}, "network not yet begun, or done": wall - running},
        "load": load,
        "busy_over_run": sum(busy.values()) / wall,
        "beyond_inference": wall / found["inference"].wall_s - 1,
        "bottleneck": f"`{slowest}` is the bottleneck: its thread is busy {load[slowest]:.1%} of the run, "
        f"{largest['wall_s'] / busy[slowest]:.1%} of that with `{largest['stage']}`.",
    }


def show(figures: dict[str, Any]) -> None:
    """The tables, and the bottleneck last."""
    wall, mm2 = figures["seconds"], figures["region_mm2"]
    print(f"{figures['device']}; separation in {figures['workers']} thread(s)")
    print(f"{figures['tiles']} tiles, {figures['nuclei']} nuclei, {mm2:.3g} mm²; {wall:.2f} s, {mm2 / wall:.3g} mm²/s")
    print()
    print("| part | stage | wall s | CPU s | calls | of the run |\n|---|---|---|---|---|---|")
    for row in figures["stages"]:
        times = f"{row['wall_s']:.3f} | {row['cpu_s']:.3f} | {row['calls']} | {row['share']:.1%}"
        print(f"| {row['part']} | {row['stage']} | {times} |")
    print("\n| who waits | s | of the run |\n|---|---|---|")
    for name, waited in figures["waits"].items():
        print(f"| {name} | {waited:.3f} | {waited / wall:.1%} |")
    print("\nbusy: " + ", ".join(f"{part} {share:.1%}" for part, share in figures["load"].items()))
    print(
        f"overlap: {figures['busy_over_run']:.2f} s of work a second of the run; "
        f"the run is {figures['beyond_inference']:.1%} longer than its inference"
    )
    print(figures["bottleneck"])


if __name__ == "__main__":
    main()

"""How time and memory grow: with a slide's size, its nuclei per mm², and the threads that work on it.

Each run has a process of its own, so its peak memory is its alone. The network is loaded and warm before a run begins.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
from common_options import json_option, numbers
from peak_memory import peak_mb
from wholeslide import check_scale, read_tissue, tile_px, write_mosaic

from nsam.runtime.inputs import Source
from nsam.runtime.job import Job
from nsam.runtime.options import Command, device_option
from nsam.runtime.settings import Device, Settings

#: Side of a square of glass, px of the tissue: large against a nucleus, small against the network's tile.
GLASS_PX = 64
_GLASS_RGB = 243
_T = TypeVar("_T")


@dataclass(frozen=True)
class Case:
    """What is run."""

    tissue: Path
    side: int  # of the mosaic, level-0 px
    share: float = 1.0  # of the tissue that is left, the rest being glass
    threads: int = 1
    workers: int = 1


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("slides", nargs=-1, required=True, metavar="SLIDE...", type=click.Path(path_type=Path, exists=True))
@click.option("--sides", callback=numbers(int), default="2048,4096,8192", help="Of the mosaics, px of .25 µm.")
@click.option("--shares", callback=numbers(float), default="1,.5,.25", help="Of the tissue; the rest is made glass.")
@click.option("--threads", callback=numbers(int), default="1,2", help="Of the network.")
@click.option("--workers", callback=numbers(int), default="1,2", help="Threads that separate nuclei.")
@device_option
@click.option("--rounds", type=click.IntRange(1), default=1, help="Runs of each case; the fastest counts.")
@json_option
@click.option("--plot", type=click.Path(path_type=Path), help="Draw them here.")
def main(
    slides: tuple[Path, ...],
    sides: tuple[int, ...],
    shares: tuple[float, ...],
    threads: tuple[int, ...],
    workers: tuple[int, ...],
    device: Device,
    rounds: int,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Segment pyramids made of SLIDE (.5 µm/px, twice as large, mirrored again and again).

    Sizes take the first number of threads and workers; threads and density the middle size. Density is that of each
    SLIDE, and of the first with squares of it made glass. Without a tissue mask the network sees all of each slide.
    """
    for slide in slides:
        check_scale(slide)
    first, middle = (threads[0], workers[0]), sorted(sides)[len(sides) // 2]
    sweeps = {
        "size": [Case(slides[0], side, 1.0, *first) for side in sides],
        "threads": [Case(slides[0], middle, 1.0, *pair) for pair in ((t, w) for t in threads for w in workers)],
        "density": [
            *(Case(slides[0], middle, share, *first) for share in shares),
            *(Case(slide, middle, 1.0, *first) for slide in slides[1:]),
        ],
    }
    rows: dict[Case, dict[str, Any]] = {}
    mosaics: dict[tuple[Path, int, float], int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in dict.fromkeys(case for cases in sweeps.values() for case in cases):
            slide = Path(folder, f"{mosaics.setdefault((case.tissue, case.side, case.share), len(mosaics))}.tif")
            if not slide.exists():
                apart(make, case, slide)
            about = f"{case.tissue.name}, {case.side} px, {case.share:g} of the tissue"
            click.echo(f"{about}, {case.threads} threads, {case.workers} workers ...", err=True)
            runs = [apart(measure, case, device, slide) for _ in range(rounds)]
            rows[case] = {**asdict(case), "tissue": case.tissue.name, **min(runs, key=lambda row: row["seconds"])}
    found = {name: [rows[case] for case in cases] for name, cases in sweeps.items()}
    result = {"growth": growth(found), **found}
    show(result)
    if json_path:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if plot:
        draw(result, plot)


def apart(function: Callable[..., _T], *arguments: Any) -> _T:
    """Its result, from a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise click.ClickException("the process of this case was killed, by too little memory mostly") from error


def measure(case: Case, device: Device, slide: Path) -> dict[str, Any]:
    """One run: seconds, peak memory, and what it was before, with the network loaded."""
    with tempfile.TemporaryDirectory(dir=slide.parent) as out:
        settings = Settings(
            inputs=(str(slide),),
            out=Path(out),
            device=device,
            threads=case.threads,
            workers=case.workers,
            tissue_mask=False,  # how much of a mosaic is tissue changes with its size
        )
        job = Job.of(settings)
        engine = job.engine()
        size = tile_px(job, slide)
        images = np.zeros((engine.card.input.scaled(settings.batch, size), size, size, 3), np.uint8)
        list(engine.run_all([images, images]))
        before = peak_mb()
        wall, cpu = time.perf_counter(), time.process_time()
        outcome = job.outcome(Source(slide), Path(out) / "slide")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if outcome.failure:
        raise click.ClickException(outcome.failure[1])
    assert outcome.nuclei is not None
    return {
        "mm2": outcome.mm2,
        "nuclei": outcome.nuclei,
        "nuclei_per_mm2": outcome.nuclei / outcome.mm2,
        "seconds": wall,
        "cpu_seconds": cpu,
        "peak_mb": peak_mb(),
        "before_mb": before,
        "device": engine.device,
    }


def make(case: Case, path: Path) -> None:
    """The pyramid of a case, squares of its tissue made glass at random."""
    image = read_tissue(case.tissue)
    rows, columns = (-(-side // GLASS_PX) for side in image.shape[:2])
    order = np.random.default_rng(0).permutation(rows * columns).reshape(rows, columns)
    glass = np.kron(order >= case.share * order.size, np.ones((GLASS_PX, GLASS_PX), bool))
    image[glass[: image.shape[0], : image.shape[1]]] = _GLASS_RGB
    write_mosaic(image, path, case.side, case.side)


def growth(found: dict[str, list[dict[str, Any]]]) -> dict[str, float | None]:
    """Exponents against the slide's area, and what a mm² and a nucleus take; None of fewer than two points."""
    area = [row["side"] ** 2 for row in found["size"]]
    added = [row["peak_mb"] - row["before_mb"] for row in found["size"]]
    density = [row["nuclei_per_mm2"] for row in found["density"]]
    per_nucleus, per_mm2 = line(density, [row["seconds"] / row["mm2"] for row in found["density"]])
    return {
        "seconds_exponent": line(np.log(area), np.log([row["seconds"] for row in found["size"]]))[0],
        "peak_memory_exponent": line(np.log(area), np.log([row["peak_mb"] for row in found["size"]]))[0],
        "memory_added_exponent": line(np.log(area), np.log(np.maximum(added, 1)))[0],
        "seconds_per_nucleus": per_nucleus,
        "cpu_seconds_per_nucleus": line(density, [row["cpu_seconds"] / row["mm2"] for row in found["density"]])[0],
        "seconds_per_mm2_without_nuclei": per_mm2,
    }


def line(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Slope and intercept of the least squares."""
    if len(set(np.asarray(x).tolist())) < 2:
        return None, None
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


def show(result: dict[str, Any]) -> None:
    """A table for each sweep, and the growth."""
    for sweep in ("size", "threads", "density"):
        print(f"\n{sweep}\n")
        print("| tissue | px | share | threads | workers | mm² | nuclei/mm² | s | CPU s | s/mm² | MB | MB before |")
        print("|---" * 12 + "|")
        for r in result[sweep]:
            print(
                f"| {r['tissue']} | {r['side']} | {r['share']:g} | {r['threads']} | {r['workers']} | {r['mm2']:.3f} "
                f"| {r['nuclei_per_mm2']:.0f} | {r['seconds']:.2f} | {r['cpu_seconds']:.2f} "
                f"| {r['seconds'] / r['mm2']:.2f} | {r['peak_mb']:.0f} | {r['before_mb']:.0f} |"
            )
    print()
    for name, value in result["growth"].items():
        print(f"{name:32} " + ("-" if value is None else f"{value:.3g}"))


def draw(result: dict[str, Any], path: Path) -> None:
    """Time and memory against size, time against threads and against density."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6))
    axes[3].update_datalim([(0, 0)])  # how little density adds shows against the whole
    sizes = sorted(result["size"], key=lambda row: row["side"])
    mpx = [row["side"] ** 2 / 1e6 for row in sizes]
    axes[0].loglog(mpx, [row["seconds"] for row in sizes], "o-")
    axes[0].set(xlabel="slide, Mpx", ylabel="seconds")
    axes[1].loglog(mpx, [row["peak_mb"] for row in sizes], "o-", label="peak")
    axes[1].loglog(mpx, [row["peak_mb"] - row["before_mb"] for row in sizes], "o-", label="added by the slide")
    axes[1].set(xlabel="slide, Mpx", ylabel="MB")
    axes[1].legend()
    names = [f"{row['threads']} threads, {row['workers']} workers" for row in result["threads"]]
    axes[2].barh(names, [row["mm2"] / row["seconds"] for row in result["threads"]])
    axes[2].set(xlabel="mm² a second")
    for row in result["density"]:
        axes[3].plot(row["nuclei_per_mm2"], row["seconds"] / row["mm2"], "o", color="C0")
    axes[3].set(xlabel="nuclei per mm²", ylabel="seconds a mm²")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

"""Throughput of 1 and 2 single-threaded workers on the same slides, and what scheduling 1,000 tiny inputs costs."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from PIL import Image

from nsam.runtime.options import Command


class Times(NamedTuple):
    """Seconds of a run of nsam-infer."""

    whole: float  # the command, its start and Dask's and their end included
    work: float  # from the first task to the last outcome; that workers load the network is part of it
    cpu: float  # of all processes

    def __str__(self) -> str:
        return (
            f"whole command {self.whole:.1f} s, first task to last outcome {self.work:.1f} s, CPU time {self.cpu:.1f} s"
        )


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("slides", type=click.Path(path_type=Path, exists=True))
@click.option("--mpp", type=float, default=0.25, help="Scale of the slides, µm/px.")
@click.option("--device", default="cpu", help="What runs the network.")
@click.option("--limit", is_flag=True, help="Also run SLIDES without Dask, on one core and on two side by side.")
@click.option("--tiny", type=click.IntRange(0), default=1000, help="Tiny inputs; 0: none.")
def main(slides: Path, mpp: float, device: str, limit: bool, tiny: int) -> None:
    """Run SLIDES over local clusters of 1 and 2 workers, each with as many cores, as machines would come one by one."""
    common = ["--mpp", str(mpp), "--device", device, "--threads", "1", "--workers", "1", "--outputs", "csv"]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise click.ClickException("two workers need two cores")
    one, two = (run(slides, [*common, "--cluster", f"local:{n}"], cores[:n]) for n in (1, 2))
    print(f"1 worker: {one}\n2 workers: {two}")
    print(
        f"2 workers do {one.whole / two.whole:.2f} times as much as one by the whole command, "
        f"{one.work / two.work:.2f} times by first task to last outcome; CPU time: {two.cpu / one.cpu:.2f} times"
    )
    if limit:
        alone = run(slides, common, cores[:1])
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda core: run(slides, common, [core]), cores[:2]))
        slower = max(times.work for times in both)
        print(
            f"without Dask: {alone.work:.1f} s on one core, {slower:.1f} s on each of two at once: "
            f"the cores themselves do {2 * alone.work / slower:.2f} times as much"
        )
    if tiny:
        with tempfile.TemporaryDirectory() as folder:
            pixels = np.random.default_rng(0).integers(100, 256, (64, 64, 3), np.uint8)
            for i in range(tiny):
                Image.fromarray(pixels).save(Path(folder, f"{i}.png"))
            here = run(Path(folder), common, cores)
            there = run(Path(folder), [*common, "--cluster", "local:1"], cores)
        print(f"{tiny} tiny inputs here: {here}\n{tiny} over one worker: {there}")
        print(f"that is {there.whole / here.whole - 1:+.0%} and {there.work / here.work - 1:+.0%}")


def run(slides: Path, options: list[str], cores: Iterable[int]) -> Times:
    """Run nsam-infer on these cores; `cpu` counts whatever else of this process's children ends meanwhile."""
    with tempfile.TemporaryDirectory() as out:
        before, begin = cpu_seconds(), time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "nsam.runtime.cli", str(slides), "--out", out, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        assert process.stdout
        lines = [(time.perf_counter(), line) for line in process.stdout]
        code = process.wait()
        whole = time.perf_counter() - begin
        if code:
            raise click.ClickException("".join(line for _, line in lines))
    # The device is told before the first task; after the last outcome comes the summary.
    ready = next(when for when, line in lines if line.startswith("device: "))
    return Times(whole, lines[-2][0] - ready, cpu_seconds() - before)


def cpu_seconds() -> float:
    """CPU time of this process's children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()

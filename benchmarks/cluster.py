"""Throughput of 1 and 2 single-threaded workers on the same slides, and what scheduling 1,000 tiny inputs costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from PIL import Image


@click.command(context_settings={"show_default": True})
@click.argument("slides", type=click.Path(path_type=Path, exists=True))
@click.option("--mpp", type=float, default=0.25, help="Scale of the slides, µm/px.")
@click.option("--device", default="cpu", help="What runs the network.")
@click.option("--tiny", type=click.IntRange(0), default=1000, help="Tiny inputs; 0: none.")
def main(slides: Path, mpp: float, device: str, tiny: int) -> None:
    """Run SLIDES over local clusters of 1 and 2 workers, each with as many cores, as machines would come one by one."""
    common = ["--mpp", str(mpp), "--device", device, "--threads", "1", "--workers", "1", "--outputs", "csv"]
    seconds = {n: run(slides, [*common, "--cluster", f"local:{n}"], cores=n) for n in (1, 2)}
    print(f"1 worker {seconds[1]:.1f} s, 2 workers {seconds[2]:.1f} s: {seconds[1] / seconds[2]:.2f} times")
    if tiny:
        with tempfile.TemporaryDirectory() as folder:
            pixels = np.random.default_rng(0).integers(100, 256, (64, 64, 3), np.uint8)
            for i in range(tiny):
                Image.fromarray(pixels).save(Path(folder, f"{i}.png"))
            here = run(Path(folder), common)
            there = run(Path(folder), [*common, "--cluster", "local:1"])
        print(f"{tiny} tiny inputs: {here:.1f} s here, {there:.1f} s over one worker: {there / here - 1:+.0%}")


def run(slides: Path, options: list[str], cores: int | None = None) -> float:
    """Seconds of a run of nsam-infer on so many cores (None: all), its start and the cluster's included."""

    def pin() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

    with tempfile.TemporaryDirectory() as out:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "nsam.runtime.cli", str(slides), "--out", out, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=pin)
        return time.perf_counter() - begin


if __name__ == "__main__":
    main()

"""Crops a second and memory of a training step, the network alone, on random crops."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from itertools import product

import click
import torch

from nsam.runtime.errors import NsamError
from nsam.runtime.options import Command
from nsam.train.checkpoint import build_model
from nsam.train.cli import pick_device
from nsam.train.losses import total
from nsam.train.settings import NSAM, Settings
from nsam.train.step import TrainState

WARM_UP = 5


def measure(settings: Settings, device: torch.device, steps: int) -> dict[str, object]:
    """Median time of a step, as `fit` takes it, and the GPU's peak memory."""
    model = build_model(settings)[0].to(device)
    state = TrainState(model, settings, WARM_UP + steps)
    side, small = settings.crop, settings.crop // settings.stride
    images = torch.randint(256, (settings.batch, side, side, 3), dtype=torch.uint8, device=device)
    targets = torch.rand(settings.batch, len(settings.channels), small, small, device=device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        terms = state.step(images, targets)
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    if not torch.isfinite(total(terms)):
        raise click.ClickException(f"the loss is not finite in {state.dtype}")
    median = statistics.median(times[WARM_UP:])
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "tune": settings.tune,
        "precision": str(state.dtype).removeprefix("torch."),
        "batch": settings.batch,
        "ms": round(1000 * median, 1),
        "crops_s": round(settings.batch / median, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if cuda else None,
    }


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--batch", type=click.IntRange(1), multiple=True, default=[NSAM.batch], help="Repeatable.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "fp16", "bf16"]), multiple=True, default=["auto"])
@click.option("--tune", type=click.Choice(["lora", "decoder", "full"]), multiple=True, default=["full"])
@click.option("--crop", type=click.IntRange(32), default=NSAM.crop, help="Side, px.")
@click.option("--steps", type=click.IntRange(1), default=8, help="Timed steps of each row.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
def main(
    device: str,
    batch: tuple[int, ...],
    precision: tuple[str, ...],
    tune: tuple[str, ...],
    crop: int,
    steps: int,
    threads: int | None,
) -> None:
    """Print a line of JSON for each combination of --tune, --precision and --batch."""
    if threads:
        torch.set_num_threads(threads)
    place = pick_device(device)
    for what, working, size in product(tune, precision, batch):
        try:
            # LoRA and the decoder alone are only tuned on weights that something has trained.
            base = "none" if what == "full" else "default"
            settings = replace(NSAM, base=base, tune=what, precision=working, batch=size, crop=crop)
        except ValueError as error:
            raise NsamError(str(error)) from error
        print(json.dumps(measure(settings, place, steps)), flush=True)


if __name__ == "__main__":
    main()

"""How well a model segments labelled images, as they are and under simulated shifts of stain, scanner and scale."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from common_options import json_option
from shifts import SCALES, SHIFTS, rescale, shift

from nsam.runtime.engines import load
from nsam.runtime.metrics import NAMES, Score, mean_and_pooled, score
from nsam.runtime.options import Command, device_option, precision_option
from nsam.runtime.pipeline import segment_slide
from nsam.runtime.settings import Device, Precision
from nsam.runtime.slides import ArraySlide
from nsam.train.data import Sample, find_samples, read_sample
from nsam.train.folds import make_folds
from nsam.train.identity import identify, recognised
from nsam.train.lineage import seen_by

SHOWN = ("dice", "aji", "pq")


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path), help="A folder made by nsam-export. [default: nsam's own]")
@click.option("--mpp", type=float, help="Scale of the images, µm/px. [default: .17 for NuInsSeg, else .25]")
@click.option("--fold", type=click.IntRange(0, 4), help="Only the test part of this official fold. [default: all]")
@click.option("--every", type=click.IntRange(1), default=1, help="Only every so many images.")
@click.option("--tta", type=click.Choice([1, 2, 4, 8]), default=1, help="Views of each tile that are averaged.")
@click.option("--network-mpp", type=float, help="Scale at which the network sees them, µm/px. [default: the model's]")
@click.option("--shifts/--no-shifts", default=False, help="Also under each simulated shift.")
@device_option
@precision_option
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
@json_option
def main(
    data: Path,
    model: Path | None,
    mpp: float | None,
    fold: int | None,
    every: int,
    tta: int,
    network_mpp: float | None,
    shifts: bool,
    device: Device,
    precision: Precision,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Score the model on DATA: NuInsSeg's folder, or one with `images` and `labels`."""
    engine = load(model, device, threads, tta, precision, network_mpp)
    samples = find_samples(data, mpp)
    if fold is not None:
        samples = make_folds(samples)[fold].test
    samples = samples[::every]
    card = engine.card
    seen = f"{tta} views at {card.input.mpp:g} µm/px"
    click.echo(f"{len(samples)} images, {card.name} {card.version}, {engine.device}, {seen}")
    if known := trained_on(model, samples):
        click.echo(f"the model has been trained on {known} of these images: their figures flatter it", err=True)
    results: dict[str, dict[str, Any]] = {}
    for name, change in conditions(shifts):
        begin = time.perf_counter()
        mean, pooled = mean_and_pooled(run(samples, engine, change))
        results[name] = {"mean": mean, "pooled": pooled, "seconds": time.perf_counter() - begin}
        kept = mean["pq"] / results["as it is"]["mean"]["pq"]
        figures = "  ".join(f"{metric} {mean[metric]:.4f} ({pooled[metric]:.4f} pooled)" for metric in SHOWN)
        click.echo(f"{name:20}  {figures}  {kept:.0%} of PQ  {results[name]['seconds']:.0f} s")
    if json_path:
        about = {
            "data": str(data),
            "images": len(samples),
            "trained_on": known,
            "fold": fold,
            "every": every,
            "mpp": sorted({sample.mpp for sample in samples}),
            "model": str(model or "default"),
            "name": card.name,
            "version": card.version,
            "network_mpp": card.input.mpp,
            "tta": tta,
            "device": engine.device,
            "precision": engine.precision,
            "metrics": NAMES,
        }
        json_path.write_text(json.dumps({**about, "results": results}, indent=1), encoding="utf-8")


def trained_on(model: Path | None, samples: list[Sample]) -> int:
    """How many of these images the model, or one that it began with, has been trained on or chosen by.

    Raises:
        ModelError: the model does not say.
    """
    return sum(recognised([identify(sample.image) for sample in samples], seen_by(str(model or "default"))))


def run(samples: list[Sample], engine: Any, change: Callable[..., Any]) -> Iterator[Score]:
    """Each image, changed, through the pipeline that ships."""
    for sample in samples:
        image, truth = change(*read_sample(sample))
        strips = segment_slide(ArraySlide(image, sample.image), engine, sample.mpp, batch=1)
        yield score(truth, np.concatenate([strip.labels for strip in strips]))


def conditions(shifts: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Names and functions (image, labels) -> (image, labels); the first changes nothing."""
    yield "as it is", lambda image, labels: (image, labels)
    if shifts:
        for name, change in SHIFTS.items():
            yield name, lambda image, labels, change=change: (shift(image, change), labels)
        for name, factor in SCALES.items():
            yield name, lambda image, labels, factor=factor: rescale(image, labels, factor)


if __name__ == "__main__":
    main()

"""From maps to measured nuclei: time by step, and AJI and PQ, against flooding at full resolution."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import click
import cv2
import numpy as np
from common_options import json_option
from flooding import flooded
from numpy.typing import NDArray

from nsam.runtime.card import ModelCard
from nsam.runtime.engines import Engine, load
from nsam.runtime.frame import BLOCK_PX, Frame
from nsam.runtime.level0 import carry, nearest
from nsam.runtime.measure import Nucleus, measure
from nsam.runtime.metrics import Score, mean_and_pooled, score
from nsam.runtime.options import Command
from nsam.runtime.pipeline import map_rows
from nsam.runtime.slides import ArraySlide
from nsam.runtime.tiles import Box, Grid
from nsam.runtime.watershed import separate
from nsam.train.data import find_samples, read_sample
from nsam.train.folds import make_folds

SHOWN = ("dice", "aji", "pq")


@dataclass(frozen=True)
class Case:
    """An image's maps, what is true of it, and the steps from one to nuclei as the pipeline does them."""

    maps: NDArray[np.float32]
    grid: Grid
    mpp: float
    truth: NDArray[np.int32]
    card: ModelCard

    @classmethod
    def of(cls, image: NDArray[np.uint8], truth: NDArray[np.int32], mpp: float, engine: Engine) -> Case:
        """Run the network on an image."""
        slide = ArraySlide(image, Path("image"))
        frame = Frame.of(slide, engine.card, mpp)
        maps = np.concatenate(list(map_rows(slide, engine, frame, batch=1)), axis=1)
        return cls(maps, frame.grid, mpp, truth, engine.card)

    def repeated(self, times: int) -> Case:
        """The image beside and below itself, as a block of a slide is larger than most labelled images."""
        width, height = self.grid.map_wh
        stride, level0 = self.grid.stride, self.grid.level0_wh
        grid = Grid((level0[0] * times, level0[1] * times), (width * times * stride, height * times * stride), stride)
        return replace(
            self, maps=np.tile(self.maps, (1, times, times)), grid=grid, truth=np.tile(self.truth, (times, times))
        )

    def basins(self) -> NDArray[np.int32]:
        """Nuclei at the maps' resolution."""
        return separate(self.maps, self.card.output, self.card.post, self.mpp / self.grid.map_per_level0[0])

    def carried(self, basins: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Labels and probability at level 0."""
        return carry(basins, self.maps[0], self.card.post.nucleus_threshold, (0, 0), self._box, self.grid)

    def measured(self, labels: NDArray[np.int32], probability: NDArray[np.float32]) -> list[Nucleus]:
        """The nuclei."""
        stain = nearest(self.maps[-1], (0, 0), self._box, self.grid)
        post = self.card.post
        return measure(labels, probability, stain, (0, 0), self.mpp, post.min_area_um2, post.min_probability)

    @property
    def _box(self) -> Box:
        return Box(0, 0, *self.grid.level0_wh)


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path), help="A folder made by nsam-export. [default: nsam's own]")
@click.option("--mpp", type=float, help="Scale of the images, µm/px. [default: .17 for NuInsSeg, else .25]")
@click.option("--fold", type=click.IntRange(0, 4), help="Only the test part of this official fold. [default: all]")
@click.option("--every", type=click.IntRange(1), default=1, help="Only every so many images.")
@click.option("--block/--no-block", default=True, help=f"Also time each image repeated to a block of {BLOCK_PX} px.")
@json_option
def main(
    data: Path, model: Path | None, mpp: float | None, fold: int | None, every: int, block: bool, json_path: Path | None
) -> None:
    """Run the model on DATA, then separate the nuclei in its maps in both ways, on one core.

    Times are CPU milliseconds for a level-0 Mpx, the median over the images.
    """
    cv2.setNumThreads(1)
    engine = load(model, device="cpu", threads=1)
    card = engine.card
    samples = find_samples(data, mpp)
    samples = (samples if fold is None else make_folds(samples)[fold].test)[::every]
    times: dict[str, list[dict[str, float]]] = defaultdict(list)
    scores: dict[str, list[Score]] = defaultdict(list)
    for sample in samples:
        image, truth = read_sample(sample)
        case = Case.of(image, truth, sample.mpp, engine)
        found = {name: way(case) for name, way in (("reference", reference), ("nsam", fast))}
        for name, (nuclei, steps) in found.items():
            times[name].append(steps)
            scores[name].append(score(truth, painted(nuclei, truth.shape)))
        labels = [painted(nuclei, truth.shape) for nuclei, _ in found.values()]
        scores["nsam against reference"].append(score(*labels))
        if block:
            times["nsam, block"].append(fast(case.repeated(-(-BLOCK_PX // max(truth.shape))))[1])
    results = summary(times, scores)
    click.echo(f"{len(samples)} images, {samples[0].mpp} µm/px, {card.name} {card.version}")
    for name, figures in results["ms_per_mpx"].items():
        click.echo(f"{name:24}" + "  ".join(f"{step} {value:.1f}" for step, value in figures.items()) + "  ms/Mpx")
    for name, kinds in results["scores"].items():
        shown = (f"{metric} {kinds['mean'][metric]:.4f} ({kinds['pooled'][metric]:.4f} pooled)" for metric in SHOWN)
        click.echo(f"{name:24}" + "  ".join(shown))
    if json_path:
        about = {"data": str(data), "images": len(samples), "mpp": samples[0].mpp, "model": card.version}
        json_path.write_text(json.dumps({**about, **results}, indent=1), encoding="utf-8")


def fast(case: Case) -> tuple[list[Nucleus], dict[str, float]]:
    """As the pipeline does it: nuclei, and ms/Mpx by step."""
    clock = Clock(case.truth.size)
    basins = case.basins()
    clock.stop("separate")
    labels, probability = case.carried(basins)
    clock.stop("carry")
    nuclei = case.measured(labels, probability)
    clock.stop("measure")
    return nuclei, clock.steps


def reference(case: Case) -> tuple[list[Nucleus], dict[str, float]]:
    """The same by flooding at full resolution."""
    clock = Clock(case.truth.size)
    labels, probability = flooded(case.maps, case.card.output, case.card.post, case.grid, case.mpp)
    clock.stop("flood")
    stain = np.zeros_like(probability)  # not what is compared
    nuclei = measure(labels, probability, stain, (0, 0), case.mpp)
    clock.stop("measure")
    return nuclei, clock.steps


class Clock:
    """CPU ms/Mpx since the stop before."""

    def __init__(self, px: int) -> None:
        self.steps: dict[str, float] = {}
        self._mpx = px / 1e6
        self._last = time.process_time()

    def stop(self, step: str) -> None:
        """End a step."""
        now = time.process_time()
        self.steps[step] = 1000 * (now - self._last) / self._mpx
        self.steps["total"] = sum(ms for name, ms in self.steps.items() if name != "total")
        self._last = now


def painted(nuclei: list[Nucleus], shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Label image of nuclei."""
    labels = np.zeros(shape, np.int32)
    for nucleus in nuclei:
        x, y, width, height = nucleus.bbox_xywh
        labels[y : y + height, x : x + width][nucleus.mask] = nucleus.id
    return labels


def summary(times: dict[str, list[dict[str, float]]], scores: dict[str, list[Score]]) -> dict[str, dict[str, object]]:
    """Medians of the times, means and pooled scores."""
    return {
        "ms_per_mpx": {
            name: {step: float(np.median([row[step] for row in rows])) for step in sorted(rows[0], key="total".__eq__)}
            for name, rows in times.items()
        },
        "scores": {
            name: dict(zip(("mean", "pooled"), mean_and_pooled(rows), strict=True)) for name, rows in scores.items()
        },
    }


if __name__ == "__main__":
    main()

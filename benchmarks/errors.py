"""What a model's errors cost: its figures on validation images, and what they were if one kind of error were mended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import cv2
import numpy as np
from accuracy import trained_on
from numpy.typing import NDArray

from nsam.runtime.engines import load
from nsam.runtime.metrics import mean_and_pooled, score
from nsam.runtime.options import Command, device_option, precision_option
from nsam.runtime.settings import Device, Precision
from nsam.train.data import find_extra, find_samples, read_sample
from nsam.train.evaluate import segment_sample
from nsam.train.folds import make_folds

Labels = NDArray[np.int32]
SHOWN = ("dice", "aji", "pq", "dq", "sq")


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--extra", multiple=True, type=click.Path(path_type=Path), help="Another source that it was trained on.")
@click.option("--model", type=click.Path(path_type=Path), help="A folder made by nsam-export. [default: nsam's own]")
@click.option("--fold", type=click.IntRange(0, 4), default=0, help="The official fold that the model is of.")
@device_option
@precision_option
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
def main(
    data: Path,
    extra: tuple[Path, ...],
    model: Path | None,
    fold: int,
    device: Device,
    precision: Precision,
    threads: int | None,
) -> None:
    """Score the model on the validation images of DATA's fold, with each kind of error mended by the true labels."""
    engine = load(model, device, threads, precision=precision)
    parts = make_folds(find_samples(data), extra=[s for root in extra for s in find_extra(root)])[fold]
    samples = parts.validation
    click.echo(f"{len(samples)} images, {engine.card.name} {engine.card.version}, {engine.device}", err=True)
    # It knows the validation images of its own fold, too, for they chose its thresholds; the test images it must not.
    if known := trained_on(model, parts.test):
        click.echo(
            f"the model has been trained on {known} of the {len(parts.test)} test images of fold {fold}, so it is of "
            "another fold, and has been trained on validation images of this one: their figures flatter it",
            err=True,
        )
    found = []
    for sample in samples:
        image, truth = read_sample(sample)
        found.append((truth.astype(np.int32), segment_sample(image, sample, engine)))
    print("| mended | " + " | ".join(SHOWN) + " |\n" + "|---" * (1 + len(SHOWN)) + "|")
    for name, mend in MENDED.items():
        mean, _ = mean_and_pooled(score(truth, mend(truth, labels)) for truth, labels in found)
        print(f"| {name} | " + " | ".join(f"{mean[metric]:.3f}" for metric in SHOWN) + " |")


def drop_false(truth: Labels, labels: Labels) -> Labels:
    """Without the nuclei that lie on no true one."""
    return np.where(np.isin(labels, np.unique(labels[truth > 0])), labels, 0)


def add_missed(truth: Labels, labels: Labels) -> Labels:
    """With the true nuclei on which none lies."""
    missed = ~np.isin(truth, np.unique(truth[labels > 0])) & (truth > 0)
    return np.where(missed, truth + labels.max(), labels)


def true_mask(truth: Labels, labels: Labels) -> Labels:
    """Cut to the true mask: borders are right, what is missing stays so."""
    return np.where(truth > 0, labels, 0)


def true_parts(truth: Labels, labels: Labels) -> Labels:
    """The same mask, its pixels parted between the true nuclei: each to the nearest."""
    known = truth > 0
    _, place = cv2.distanceTransformWithLabels(
        (~known).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    owner = np.zeros(place.max() + 1, np.int32)
    owner[place[known]] = truth[known]
    return np.where(drop_false(truth, labels) > 0, owner[place] + labels.max(), labels)


MENDED: dict[str, Callable[[Labels, Labels], Labels]] = {
    "nothing": lambda truth, labels: labels,
    "nuclei that lie on no true one, dropped": drop_false,
    "true nuclei on which none lies, added": add_missed,
    "both": lambda truth, labels: add_missed(truth, drop_false(truth, labels)),
    "what lies outside the true mask, cut off": true_mask,
    "what was joined or parted wrongly": true_parts,
}


if __name__ == "__main__":
    main()

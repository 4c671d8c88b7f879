"""Peers' accuracy on nsam's own fold: what needs no weights, and what can be trained there within a budget."""

from __future__ import annotations

import json
from pathlib import Path

import click
import cv2
import numpy as np
from common_options import json_option
from numpy.typing import NDArray
from peers import PEERS, PeerError, answer, install

from nsam.runtime.engines import load
from nsam.runtime.metrics import Score, mean_and_pooled, score
from nsam.runtime.options import Command, names_of
from nsam.train.data import Sample, find_samples, read_sample
from nsam.train.evaluate import score_samples
from nsam.train.folds import make_folds
from nsam.train.identity import hash_samples

MPP = 0.25  # µm/px at which peers see the images: that of the slides they are made for
SHOWN = ("dice", "aji", "pq")
#: Those that peer_trainer.py can train, or that need no training.
KNOWN = ("StarDist", "classical chain", "nsam")


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--peers",
    callback=names_of(KNOWN),
    default="StarDist,classical chain",
    help=f"Which, separated by commas, of {', '.join(KNOWN)} (with the model that ships).",
)
@click.option("--fold", type=click.IntRange(0, 4), default=0, help="Official fold.")
@click.option("--minutes", type=float, default=10.0, help="Training time of each peer that is trained.")
@click.option("--threads", type=click.IntRange(1), default=1, help="CPU threads of each.")
@click.option(
    "--envs", type=click.Path(path_type=Path), required=True, help="Folder for the environments, as peers.py."
)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for images and predictions.")
@json_option
def main(
    data: Path,
    peers: tuple[str, ...],
    fold: int,
    minutes: float,
    threads: int,
    envs: Path,
    work: Path,
    json_path: Path | None,
) -> None:
    """Train peers on the fold's training images of DATA, choose thresholds on its validation images, score its test.

    Peers see the images at .25 µm/px; scores are taken at the images' own resolution.
    """
    parts = make_folds(find_samples(data))[fold]
    work /= f"fold{fold}-{hash_samples([*parts.train, *parts.validation, *parts.test])[:12]}"
    work.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation", "test"):
        if not (work / f"{name}.npz").is_file():
            pack(getattr(parts, name), work / f"{name}.npz")
    results = {}
    print("| | Dice | AJI | PQ | trained |\n|---|---|---|---|---|")
    for name in peers:
        if name == "nsam":
            scores, trained = [found for _, found in score_samples(parts.test, load(threads=threads))], "as shipped"
        else:
            packages, env, task = PEERS[name]
            install(envs / env, packages)
            try:
                trained = answer(envs / env, "peer_trainer.py", task, work, minutes, threads=threads)
            except PeerError as error:
                click.echo(f"{name}: {error}", err=True)
                continue
            scores = scored(parts.test, work / f"{task}.npz")
        mean, pooled = mean_and_pooled(scores)
        results[name] = {"mean": mean, "pooled": pooled, "trained": trained}
        print(f"| {name} | " + " | ".join(f"{mean[metric]:.3f}" for metric in SHOWN) + f" | {trained} |")
    if json_path:
        json_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if not results:
        raise click.ClickException("no peer could be scored")


def pack(samples: list[Sample], path: Path) -> None:
    """Images and labels at `MPP`: `image0`, `labels0`, …"""
    arrays = {}
    for i, sample in enumerate(samples):
        image, labels = read_sample(sample)
        size = [round(side * sample.mpp / MPP) for side in labels.shape[::-1]]
        arrays[f"image{i}"] = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        arrays[f"labels{i}"] = resized(labels, size)
    np.savez(path, **arrays)


def scored(samples: list[Sample], path: Path) -> list[Score]:
    """Scores of predicted labels `0`, `1`, … brought to the images' own size."""
    with np.load(path) as predicted:
        truths = [read_sample(sample)[1] for sample in samples]
        return [score(truth, resized(predicted[str(i)], truth.shape[::-1])) for i, truth in enumerate(truths)]


def resized(labels: NDArray[np.int32], size_wh: tuple[int, ...] | list[int]) -> NDArray[np.int32]:
    """Labels of the nearest pixels."""
    # OpenCV resizes no int32; a label below 2**24 is exact in float32.
    return cv2.resize(labels.astype(np.float32), size_wh, interpolation=cv2.INTER_NEAREST_EXACT).astype(np.int32)


if __name__ == "__main__":
    main()

"""Train one peer in its own environment, if it is to be trained, and predict the test images. Started by
peers_accuracy.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from peer_worker import classical_labels

Pairs = tuple[list[np.ndarray], list[np.ndarray]]
MPP = 0.25


def read(path: Path) -> Pairs:
    """Images and labels as `peers_accuracy.pack` wrote them."""
    with np.load(path) as arrays:
        count = len(arrays.files) // 2
        return [arrays[f"image{i}"] for i in range(count)], [arrays[f"labels{i}"] for i in range(count)]


def stardist(work: Path, minutes: float) -> tuple[list[np.ndarray], str]:
    """StarDist's H&E configuration from nothing, with the augmentation of its examples."""
    import tensorflow as tf
    from csbdeep.utils import normalize
    from stardist import fill_label_holes
    from stardist.models import Config2D, StarDist2D

    def normed(images: list[np.ndarray]) -> list[np.ndarray]:
        return [normalize(image, 1, 99.8, axis=(0, 1, 2)) for image in images]

    def augmented(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        turns = rng.integers(4)
        image, labels = np.rot90(image, turns), np.rot90(labels, turns)
        if rng.random() < 0.5:
            image, labels = image[::-1], labels[::-1]
        return image * rng.uniform(0.6, 2) + rng.uniform(-0.2, 0.2), labels

    class Clock(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            steps[0] += 1
            if time.monotonic() > until:
                self.model.stop_training = True

    rng = np.random.default_rng(0)
    train, validation, test = (read(work / f"{name}.npz") for name in ("train", "validation", "test"))
    config = Config2D(
        n_rays=32, grid=(2, 2), n_channel_in=3, train_batch_size=8, train_patch_size=(224, 224), train_tensorboard=False
    )
    model = StarDist2D(config, name="peer", basedir=str(work))
    model.prepare_for_training()
    model.callbacks.append(Clock())
    steps, until = [0], time.monotonic() + 60 * minutes
    truths = [[fill_label_holes(labels) for labels in part[1]] for part in (train, validation)]
    held = normed(validation[0])
    model.train(
        normed(train[0]), truths[0], validation_data=(held, truths[1]), augmenter=augmented, epochs=10_000,
        steps_per_epoch=100,
    )  # fmt: skip
    model.optimize_thresholds(held, truths[1])
    found = [model.predict_instances(image)[0] for image in normed(test[0])]
    return found, f"{minutes:g} minutes, {8 * steps[0]:,} crops, from nothing"


def classical(work: Path, minutes: float) -> tuple[list[np.ndarray], str]:
    """The classical chain; it has nothing to learn."""
    return [classical_labels(image, MPP) for image in read(work / "test.npz")[0]], "not at all"


def main() -> None:
    """TASK WORK MINUTES."""
    task, work, minutes = sys.argv[1:]
    found, trained = {f.__name__: f for f in (stardist, classical)}[task](Path(work), float(minutes))
    labels = {str(i): part.astype(np.int32) for i, part in enumerate(found)}
    np.savez_compressed(Path(work) / f"{task}.npz", **labels)
    print(trained)


if __name__ == "__main__":
    main()

"""The run's images with which an export is proven, as its `folds.csv` and `config.json` name them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsam.export.parity import spread
from nsam.export.settings import Settings
from nsam.runtime.errors import InputError, ModelError
from nsam.train.data import DEFAULT_MPP, Sample, find_extra, find_samples


def proof_samples(settings: Settings) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """The labelled images of the proof; those of them that trained, for equality needs no unseen tissue; and training
    images for int8's ranges: others, unless those are too few. Raises as `fold_samples`.
    """
    images = spread(fold_samples(settings, "validation"), settings.images)
    train = fold_samples(settings, "train")
    trained_on = spread(train, settings.images - len(images))
    others = [sample for sample in train if sample not in trained_on]
    enough = 2 * len(others) >= min(settings.calibration, len(train))
    return [*images, *trained_on], trained_on, others if enough else train


def fold_samples(settings: Settings, part: str) -> list[Sample]:
    """The images of a fold's part, `train` or `validation`, and their scales, by `folds.csv`.

    Raises:
        InputError: they are not below the data folder.
        ModelError: `folds.csv` is not there.
    """
    run, fold = settings.fold_dir.parent, settings.fold_dir.name
    root, *extra = settings.data or [Path(source) for source in read_config(settings)["data"]["sources"]]
    # Whatever they say of their scales: `folds.csv` holds those that count.
    samples = [*find_samples(root, DEFAULT_MPP), *(s for source in extra for s in find_extra(source, DEFAULT_MPP))]
    found = {sample.name: sample for sample in samples}
    try:
        with (run / "folds.csv").open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["fold"] == fold and row["part"] == part]
            scales = {row["image"]: float(row["mpp"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"`{run / 'folds.csv'}`: cannot be read ({error}); train the run again") from error
    missing = [name for name in scales if name not in found]
    if missing or not scales:
        raise InputError(
            f"`{root}`: not the data of this run ({missing[:1] or 'no images'}); pass --data, once for each source"
        )
    return [replace(found[name], mpp=mpp) for name, mpp in scales.items()]


def read_config(settings: Settings) -> dict[str, Any]:
    """What the run's `config.json` holds."""
    config: dict[str, Any] = json.loads((settings.fold_dir.parent / "config.json").read_text(encoding="utf-8"))
    return config

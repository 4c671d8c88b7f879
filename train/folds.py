"""Who is trained on, who chooses thresholds, who is tested: three disjoint sets for each fold."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import GroupKFold, KFold

from nsam.train.data import Sample

FOLDS = 5
OFFICIAL_SEED = 19  # NuInsSeg's own code


@dataclass(frozen=True)
class Fold:
    """Disjoint parts of the samples."""

    train: list[Sample]
    validation: list[Sample]  # inner: picks the epoch and the thresholds
    test: list[Sample]  # looked at once, at the end


def make_folds(samples: list[Sample], kind: str = "official", validation_share: float = 0.1) -> list[Fold]:
    """Five folds.

    Args:
        samples: sorted by POSIX path, as `find_samples` gives them.
        kind: `official` is KFold(5, shuffle=True, random_state=19), the split of the NuInsSeg paper (Mahbod et al.
            2024); `organ` keeps an organ's images together, to see tissue that training never saw.
        validation_share: part of the training images set aside, at least one.

    Raises:
        ValueError: fewer samples or groups than folds, or an unknown kind.
    """
    indices = np.arange(len(samples))
    if kind == "official":
        splits = KFold(FOLDS, shuffle=True, random_state=OFFICIAL_SEED).split(indices)
    elif kind == "organ":
        splits = GroupKFold(FOLDS).split(indices, groups=[sample.group for sample in samples])
    else:
        raise ValueError(f"`kind` must be official or organ, is {kind}")
    folds = []
    for k, (rest, test) in enumerate(splits):
        shuffled = np.random.default_rng(k).permutation(rest)
        size = max(1, round(validation_share * len(rest)))
        validation, train = np.sort(shuffled[:size]), np.sort(shuffled[size:])
        folds.append(Fold(*([samples[i] for i in part] for part in (train, validation, test))))
    return folds


def write_folds(folds: list[Fold], path: Path) -> None:
    """`folds.csv`: fold, part, image, group."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["fold", "part", "image", "group"])
        for k, fold in enumerate(folds):
            for part in ("train", "validation", "test"):
                writer.writerows([k, part, s.name, s.group] for s in getattr(fold, part))

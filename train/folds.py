"""Who is trained on, who chooses thresholds, who is tested: three disjoint sets for each fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import GroupKFold, KFold

from nsam.runtime.errors import InputError
from nsam.runtime.files import write_csv
from nsam.train.data import Sample

FOLDS = 5
#: Beside the five: all images train, but for those set aside for thresholds; none is tested.
FINAL = "final"
OFFICIAL_SEED = 19  # NuInsSeg's own code


@dataclass(frozen=True)
class Fold:
    """Disjoint parts of the samples."""

    train: list[Sample]
    validation: list[Sample]  # inner: picks the epoch and the thresholds
    test: list[Sample]  # looked at once, at the end


def make_folds(
    samples: list[Sample], kind: str = "official", validation_share: float = 0.1, extra: Sequence[Sample] = ()
) -> list[Fold]:
    """Five folds, or one for each source.

    Args:
        samples: sorted by POSIX path, as `find_samples` gives them.
        kind: `official` is KFold(5, shuffle=True, random_state=19), the split of the NuInsSeg paper (Mahbod et al.
            2024); `organ` keeps an organ's images together, to see tissue that training never saw; `source` tests each
            source, that of `samples` first, by a network of the others, to see laboratories that training never saw.
        validation_share: part of the training images set aside, at least one.
        extra: images of other sources; they are split likewise and join training and validation, never a test part
            but that of their own source.

    Returns:
        The folds; one of sources trains on nothing where the others have one image each.

    Raises:
        InputError: fewer samples, or organs of them, than folds; `source` without another source.
        ValueError: an unknown kind.
    """
    if kind == "source":
        return _leave_one_out([*samples, *extra], validation_share)
    if len(samples if kind == "official" else {sample.group for sample in samples}) < FOLDS:
        raise InputError(
            f"`{samples[0].name}` and {len(samples) - 1} more: too few for five {kind} folds; "
            "nsam-train --fold final trains on all of them"
        )
    indices = np.arange(len(samples))
    if kind == "official":
        splits = KFold(FOLDS, shuffle=True, random_state=OFFICIAL_SEED).split(indices)
    elif kind == "organ":
        splits = GroupKFold(FOLDS).split(indices, groups=[sample.group for sample in samples])
    else:
        raise ValueError(f"`kind` must be official, organ or source, is {kind}")
    folds = []
    for k, (rest, test) in enumerate(splits):
        train, validation = _set_aside([[samples[i] for i in rest], extra], validation_share, k)
        folds.append(Fold(train, validation, [samples[i] for i in test]))
    return folds


def final_fold(samples: list[Sample], validation_share: float = 0.1, extra: Sequence[Sample] = ()) -> Fold:
    """All images train a model to ship, but for the share that chooses its thresholds; nothing is left to test.

    Raises:
        InputError: no source has a second image.
    """
    train, validation = _set_aside([samples, extra], validation_share, FOLDS)
    if not train:
        raise InputError(f"`{samples[0].name}`: one image cannot train and choose thresholds, too; give two or more")
    return Fold(train, validation, [])


def _leave_one_out(samples: list[Sample], validation_share: float) -> list[Fold]:
    sources: dict[Path, list[Sample]] = {}
    for sample in samples:
        sources.setdefault(sample.source, []).append(sample)
    if len(sources) < 2:
        raise InputError("`--folds source`: tests each source by a network of the others; name others by --extra")
    folds = []
    for k, (root, test) in enumerate(sources.items()):
        others = [source for other, source in sources.items() if other != root]
        train, validation = _set_aside(others, validation_share, k)
        folds.append(Fold(train, validation, test))
    return folds


def _set_aside(sources: Sequence[Sequence[Sample]], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): the share of each source, one image at least."""
    train: list[Sample] = []
    validation: list[Sample] = []
    for samples in filter(None, sources):
        shuffled = np.random.default_rng(seed).permutation(len(samples))
        size = max(1, round(share * len(samples)))
        train += [samples[i] for i in np.sort(shuffled[size:])]
        validation += [samples[i] for i in np.sort(shuffled[:size])]
    return train, validation


def write_folds(folds: dict[str, Fold], path: Path) -> None:
    """`folds.csv`: fold, part, image, group, and µm per px."""
    rows = [
        (name, part, sample.name, sample.group, sample.mpp)
        for name, fold in folds.items()
        for part in ("train", "validation", "test")
        for sample in getattr(fold, part)
    ]
    write_csv(path, ("fold", "part", "image", "group", "mpp"), rows)

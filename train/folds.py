"""Who is trained on, who chooses thresholds, who is tested: three disjoint sets for each fold."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import GroupKFold, KFold

from nsam.runtime.errors import InputError
from nsam.runtime.files import write_text
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

    Raises:
        ValueError: fewer samples or groups than folds, or an unknown kind.
        InputError: `source` without another source.
    """
    if kind == "source":
        return _leave_one_out(by_source([*samples, *extra]), validation_share)
    indices = np.arange(len(samples))
    if kind == "official":
        splits = KFold(FOLDS, shuffle=True, random_state=OFFICIAL_SEED).split(indices)
    elif kind == "organ":
        splits = GroupKFold(FOLDS).split(indices, groups=[sample.group for sample in samples])
    else:
        raise ValueError(f"`kind` must be official, organ or source, is {kind}")
    folds = []
    for k, (rest, test) in enumerate(splits):
        train, validation = _set_aside([samples[i] for i in rest], validation_share, k)
        if extra:
            more_train, more_validation = _set_aside(list(extra), validation_share, k)
            train, validation = train + more_train, validation + more_validation
        folds.append(Fold(train, validation, [samples[i] for i in test]))
    return folds


def final_fold(samples: list[Sample], validation_share: float = 0.1, extra: Sequence[Sample] = ()) -> Fold:
    """All images train a model to ship, but for the share that chooses its thresholds; nothing is left to test.

    Raises:
        InputError: no source has a second image.
    """
    parts = [_set_aside(list(source), validation_share, FOLDS) for source in (samples, extra) if source]
    train, validation = ([s for part in parts for s in part[k]] for k in (0, 1))
    if not train:
        raise InputError(f"`{samples[0].name}`: one image cannot train and choose thresholds, too; give two or more")
    return Fold(train, validation, [])


def by_source(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples of each source, in the order in which they come."""
    sources: dict[Path, list[Sample]] = {}
    for sample in samples:
        sources.setdefault(sample.source, []).append(sample)
    return list(sources.values())


def _leave_one_out(sources: list[list[Sample]], validation_share: float) -> list[Fold]:
    if len(sources) < 2:
        raise InputError("`--folds source`: tests each source by a network of the others; name others by --extra")
    folds = []
    for k, test in enumerate(sources):
        parts = [_set_aside(source, validation_share, k) for source in sources if source is not test]
        train, validation = ([sample for part in parts for sample in part[i]] for i in (0, 1))
        folds.append(Fold(train, validation, test))
    return folds


def _set_aside(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    shuffled = np.random.default_rng(seed).permutation(len(samples))
    size = max(1, round(share * len(samples)))
    return [samples[i] for i in np.sort(shuffled[size:])], [samples[i] for i in np.sort(shuffled[:size])]


def write_folds(folds: dict[str, Fold], path: Path) -> None:
    """`folds.csv`: fold, part, image, group, and µm per px."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["fold", "part", "image", "group", "mpp"])
    for name, fold in folds.items():
        for part in ("train", "validation", "test"):
            writer.writerows([name, part, s.name, s.group, s.mpp] for s in getattr(fold, part))
    write_text(path, table.getvalue())

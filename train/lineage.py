"""Where a fold's network comes from: its base, and every image that has trained either."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from nsam.runtime.card import ModelCard
from nsam.runtime.engines import DEFAULT_MODEL
from nsam.runtime.errors import InputError, ModelError
from nsam.runtime.files import write_text
from nsam.train.data import Sample
from nsam.train.identity import file_of, identify, recognised
from nsam.train.settings import NAMED_BASES, Settings, read_settings

#: Beside a network's weights, in a fold's folder and in a model's: `identity.identify`'s line for each image in the
#: training or validation part of it or of its bases.
SEEN_NAME = "seen.txt"


def of_fold(settings: Settings, name: str) -> Settings:
    """The settings of one fold: where `base` is a whole run, the fold's own base is that run's fold of its name.

    Raises:
        ModelError: the run has not finished it.
    """
    run = Path(settings.base)
    if settings.base in NAMED_BASES or not (run / "config.json").is_file():
        return settings
    if not (run / name / "metrics.json").is_file():
        raise ModelError(f"`--base {run}`: has no finished {name} to go on from; finish it, or name another --fold")
    return replace(settings, base=str(run / name))


def settings_of(fold_dir: Path) -> Settings:
    """The settings that a run's fold has or had, by the run's `config.json`.

    Raises:
        ModelError: as `read_settings` and `of_fold`.
    """
    return of_fold(read_settings(fold_dir.parent / "config.json"), fold_dir.name)


def locate(base: str) -> tuple[str, Path]:
    """What a base is, and where: `none`, `mobile_sam` (to be downloaded), an `exported` model, a `fold` of a run, or of
    SAM's own weights a folder of `onnx` exports or a `file`.
    """
    path = DEFAULT_MODEL if base == "default" else Path(base)
    if base in ("none", "mobile_sam"):
        kind = base
    elif (path / "card.json").is_file():
        kind = "exported"
    elif any(path.glob("*.onnx")):
        kind = "onnx"
    else:
        kind = "fold" if path.is_dir() else "file"
    return kind, path


def seen_by(base: str) -> frozenset[str]:
    """The images that a base has been trained on, as `identify` gives them; none for SAM's weights, which saw no
    labelled nuclei.

    Raises:
        ModelError: a run's fold or an exported model does not say.
    """
    kind, path = locate(base)
    record = path / SEEN_NAME
    if kind == "exported":
        ModelCard.read(path).verify_file(path, SEEN_NAME)
    elif kind != "fold" or not (path / "best.safetensors").is_file():  # what is no fold is told when it is loaded
        return frozenset()
    elif not record.is_file():
        raise ModelError(f"`{record}`: missing; without it nobody knows which images this base has been trained on")
    lines = frozenset(record.read_text(encoding="ascii").splitlines())
    try:
        for line in lines:
            file_of(line)
    except ValueError as error:
        raise ModelError(f"`{record}`: of another version of nsam; train or export this base again") from error
    return lines


def base_card(base: str) -> ModelCard | None:
    """The card of the exported model that a base is, or has itself been begun from; None where it is none of these.

    Raises:
        ModelError: a run or a model is broken.
    """
    kind, path = locate(base)
    if kind == "exported":
        return ModelCard.read(path)
    if kind == "fold" and (path.parent / "config.json").is_file():
        return base_card(settings_of(path).base)
    return None


def refuse_seen(settings: Settings, name: str, test: Sequence[Sample]) -> None:
    """See that a fold's base, as `of_fold` gives it, has not been trained on the fold's test images.

    Raises:
        InputError: it has, so that their figures would say nothing of images that it has not seen.
        ModelError: as `seen_by`.
    """
    seen = seen_by(settings.base)
    found = sum(recognised([identify(sample.image) for sample in test], seen)) if seen else 0
    if found:
        raise InputError(
            f"`--base {settings.base}`: has been trained on {found} of the {len(test)} test images of {name}; begin "
            "with a base that has not, such as the same fold of a whole run (--base RUN), or train --fold final"
        )


def check_seen(path: Path, images: Iterable[str]) -> None:
    """See that a fold that goes on has the images, its own and its bases', that it was begun with: the same files, for
    decoders may differ between machines.

    Raises:
        ModelError: it has others, or nobody knows.
    """
    try:
        before = path.read_text(encoding="ascii").splitlines()
        same = {file_of(line) for line in before} == {file_of(line) for line in images}
    except (OSError, ValueError):
        same = False
    if not same:
        raise ModelError(
            f"`{path}`: missing, or its base has been trained on other images than it was; use the same base, or "
            "another --out"
        )


def write_seen(path: Path, images: Iterable[str]) -> None:
    """Write what `seen_by` reads."""
    write_text(path, "".join(f"{line}\n" for line in sorted(images)))

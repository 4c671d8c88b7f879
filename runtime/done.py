"""What decides over a slide's results, and whether they are there already."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nsam.runtime.card import ModelCard
from nsam.runtime.errors import InputError, OutputError
from nsam.runtime.files import to_json
from nsam.runtime.inputs import Source
from nsam.runtime.results import read_json
from nsam.runtime.settings import BANDS_NAME, DONE_NAME, OUTPUTS, RESULT_NAMES, Precision, Settings


def run_hash_of(card: ModelCard, settings: Settings) -> str:
    """A hash of all in a run that changes the results, but for the network's precision, which `auto` leaves open."""
    return _hash(
        {
            "nsam": version("nsam"),
            "model": card.files["model.onnx"].sha256,
            "post": dataclasses.asdict(card.post),
            "mpp": settings.mpp,
            "tta": settings.tta,
            "network_mpp": card.input.mpp,
            "tissue_mask": settings.tissue_mask,
            "roi": settings.roi,
        }
    )


def about(source: Source, run_hash: str, precision: Precision) -> dict[str, Any]:
    """What decides over a slide's results, as it stands in `slide.json`: its file, a hash of all settings, and the
    network's precision. Devices count as equal.

    To be called before the file is read: one that is written anew meanwhile is then seen to have changed.

    Raises:
        InputError: its mask cannot be read.
    """
    slide_hash = run_hash
    if source.mpp is not None or source.mask is not None:
        try:
            mask = hashlib.sha256(source.mask.read_bytes()).hexdigest() if source.mask else None
        except OSError as error:
            raise InputError(f"`{source.mask}`: the mask cannot be read ({error.strerror})") from error
        slide_hash = _hash({"run": run_hash, "mpp": source.mpp, "mask": mask})
    return {
        "path": source.real_path,
        "bytes": source.size,  # another slide may come to lie at the same path
        "modified_ns": source.modified_ns,
        "slide_hash": slide_hash,
        "precision": precision,
    }


def earlier(folder: Path, wanted: dict[str, Any], settings: Settings, card: ModelCard) -> tuple[bool, bool]:
    """Whether results of a slide and these settings are there, and whether they are all that is asked for.

    Args:
        folder: where its results go.
        wanted: see `about`.
        settings: of this run.
        card: the model's; `auto` takes results of any precision that is proven.

    Raises:
        OutputError: there are others, which may not be overwritten.
    """
    there = [folder / name for name in RESULT_NAMES if (folder / name).exists()]
    if any(os.path.realpath(file) == wanted["path"] for file in there):
        raise OutputError(f"`{wanted['path']}`: results would replace it; pass another --out")
    # What a stopped run left has its bands or a `slide.json`.
    ours = (folder / DONE_NAME).exists() or (folder / BANDS_NAME).exists()
    if there and not ours and not settings.overwrite:
        raise OutputError(f"`{there[0]}`: is of no run of nsam; pass --overwrite to replace it, or another --out")
    before = read_json(folder / DONE_NAME)  # empty if broken, for then nothing is finished
    other = {name for name, value in wanted.items() if before.get(name) != value}
    if wanted["precision"] == "auto" and before.get("precision") in card.proven:
        other.discard("precision")
    if before and other and not settings.overwrite:
        if "path" in other:
            what = f"of another slide ({before.get('path')})"
        elif before.get("nsam") != version("nsam"):
            what = f"of another version of nsam ({before.get('nsam')})"
        elif "slide_hash" in other:
            what = "of other settings"
        else:
            made_in = f"of --precision {before.get('precision')}"
            what = made_in if other == {"precision"} else "of the slide before it was changed"
        raise OutputError(f"`{folder}`: holds results {what}; pass --overwrite, or another --out")
    return not other, not other and all((folder / OUTPUTS[name]).is_file() for name in settings.outputs)


def _hash(parts: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(parts).encode()).hexdigest()[:16]

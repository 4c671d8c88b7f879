"""What decides over a slide's results, and whether they are there already."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nsam.runtime.card import ModelCard
from nsam.runtime.errors import InputError, OutputError
from nsam.runtime.files import to_json
from nsam.runtime.inputs import Source
from nsam.runtime.results import as_dict, differences, holds_results, read_json, slide_of
from nsam.runtime.settings import DONE_NAME, OUTPUTS, RESULT_NAMES, Precision, Settings


def made_with(card: ModelCard, settings: Settings) -> dict[str, Any]:
    """All in a run that changes the results, as JSON has it, but for the network's precision, which `auto` leaves
    open.
    """
    parts = {
        "nsam": version("nsam"),
        "model": f"{card.name} {card.version} ({card.files['model.onnx'].sha256[:12]})",
        "post": dataclasses.asdict(card.post),
        "mpp": settings.mpp,
        "tta": settings.tta,
        "network_mpp": card.input.mpp,
        "tissue_mask": settings.tissue_mask,
        "roi": settings.roi,
    }
    return as_dict(json.loads(to_json(parts)))


def hash_of(parts: dict[str, Any]) -> str:
    """64 bits of the SHA-256 of what `made_with` gives, as hex."""
    return hashlib.sha256(to_json(parts).encode()).hexdigest()[:16]


def about(source: Source, made_with: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """What decides over a slide's results, as it stands in `slide.json`: its file, all settings, and the network's
    precision. Devices count as equal.

    To be called before the file is read: one that is written anew meanwhile is then seen to have changed.

    Args:
        source: the slide, and what the user says about it alone.
        made_with: the run's settings; see there.
        precision: what was asked for.

    Raises:
        InputError: its mask cannot be read.
    """
    parts = dict(made_with)
    if source.mpp is not None:
        parts["mpp"] = source.mpp
    if source.mask:
        try:
            parts["mask"] = hashlib.sha256(source.mask.read_bytes()).hexdigest()[:16]
        except FileNotFoundError as error:
            raise InputError(
                f"`{source.mask}`: is missing, the mask of `{source.path}` (.png, .tif or .tiff)"
            ) from error
        except OSError as error:
            raise InputError(f"`{source.mask}`: the mask cannot be read ({error.strerror})") from error
    return {
        "path": source.real_path,
        "bytes": source.size,  # another slide may come to lie at the same path
        "modified_ns": source.modified_ns,
        "run_hash": hash_of(parts),
        "made_with": parts,
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
    if there and not holds_results(folder) and not settings.overwrite:
        raise OutputError(f"`{there[0]}`: is of no run of nsam; pass --overwrite to replace it, or another --out")
    other_slide = slide_of(folder)
    if other_slide not in ("", wanted["path"]) and os.path.exists(other_slide):
        # Names are chosen where a run begins, so another has taken this one since.
        raise OutputError(
            f"`{folder}`: another run has put results of `{other_slide}` there; run this one again, and it takes "
            "another name"
        )
    before = read_json(folder / DONE_NAME)  # empty if broken, for then nothing is finished
    other = {name for name, value in wanted.items() if before.get(name) != value}
    if wanted["precision"] == "auto" and before.get("precision") in card.proven:
        other.discard("precision")
    if before and other and not settings.overwrite:
        if "path" in other:
            what = f"of another slide ({before.get('path')})"
        elif "run_hash" in other:
            known = as_dict(before.get("made_with"))
            found = ", ".join(differences(known, wanted["made_with"]))
            what = f"of other settings ({found})" if known else "of an earlier version of nsam"
        else:
            made_in = f"of --precision {before.get('precision')}"
            what = made_in if other == {"precision"} else "of the slide before it was changed"
        raise OutputError(f"`{folder}`: holds results {what}; pass --overwrite, or another --out")
    return not other, not other and all((folder / OUTPUTS[name]).is_file() for name in settings.outputs)

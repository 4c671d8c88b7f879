"""Finished rows of blocks on disk: what a killed run has done of a slide is not done again.

A band holds the nuclei that a row of blocks owns. Bands can be made in any order and by any process; the results
are assembled from them top to bottom. Files are numpy archives without pickle, moved into place whole, and named after
all that decides over them: runs of different settings in one folder never take each other's.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.files import output_errors, to_json, write_bytes, write_text
from nsam.runtime.measure import Nucleus
from nsam.runtime.settings import BANDS_NAME, DONE_NAME

_NUMBERS = tuple(name for name in Nucleus._fields if name != "mask")


class BandStore:
    """The bands of one slide under one set of settings."""

    def __init__(self, folder: Path, made_of: dict[str, Any]) -> None:
        """
        Args:
            folder: the slide's result folder.
            made_of: all that decides over the bands, the slide's path among it.
        """
        self._folder = folder / BANDS_NAME
        self._made_of = to_json(made_of)
        self._noted = False
        self._tag = hashlib.sha256(self._made_of.encode()).hexdigest()[:16]

    def has(self, index: int) -> bool:
        """Whether band `index` is finished."""
        return self._path(index).is_file()

    def read(self, index: int) -> list[Nucleus] | None:
        """The nuclei of band `index`, or None where it is missing or broken and has to be made."""
        try:
            with np.load(self._path(index), allow_pickle=False) as stored:
                return unpack({name: stored[name] for name in stored.files})
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
            return None

    def write(self, index: int, nuclei: list[Nucleus]) -> None:
        """Keep a band.

        Raises:
            OutputError: the folder cannot be written.
        """
        with output_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        if not self._noted:  # that the next run knows whose they are, and takes the folder for that slide's results
            write_text(self._folder / DONE_NAME, self._made_of)
            self._noted = True
        content = io.BytesIO()
        np.savez(content, **pack(nuclei))
        write_bytes(self._path(index), content.getvalue())

    def clear(self) -> None:
        """Remove all bands, those of other keys too: the slide's results are there."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}-{self._tag}.npz"


def pack(nuclei: list[Nucleus]) -> dict[str, Any]:
    """Nuclei as arrays: a column for each measurement, and all masks as one string of bits."""
    columns = {name: np.array([getattr(nucleus, name) for nucleus in nuclei]) for name in _NUMBERS}
    bits = np.concatenate([nucleus.mask.ravel() for nucleus in nuclei]) if nuclei else np.zeros(0, bool)
    return {**columns, "masks": np.packbits(bits)}


def unpack(arrays: dict[str, NDArray[np.generic]]) -> list[Nucleus]:
    """What `pack` packed, to the bit."""
    columns = [arrays[name].tolist() for name in _NUMBERS]
    bits = np.unpackbits(arrays["masks"].astype(np.uint8)).astype(bool)
    nuclei, start = [], 0
    for row in zip(*columns, strict=True):
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in zip(_NUMBERS, row, strict=True)
        }
        width, height = values["bbox_xywh"][2:]
        end = start + width * height
        nuclei.append(Nucleus(**values, mask=bits[start:end].reshape(height, width)))
        start = end
    return nuclei

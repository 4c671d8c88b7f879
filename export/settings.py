"""Settings of `nsam-export`: light to import, for the command's options are built from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nsam.runtime.errors import InputError

#: bf16 needs no file: OpenVINO runs fp32's so.
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Settings:
    """What `nsam-export` was asked for."""

    fold_dir: Path
    out: Path
    data: tuple[Path, ...] = ()  # the run's data, then its --extra in their order; empty: where the run found them
    name: str | None = None  # in the card; None: the run's folder
    model_version: str = "0.1.0"
    licence: str = "Apache-2.0"
    attribution: str = ""  # whose data it was trained on, and under which licence
    limits: str = ""  # what the model is not for, and where it was never tried
    mpp: float | None = None  # scale at which the network sees tissue, µm/px; None: as the run validated
    tile: tuple[int, ...] = ()  # sides of the tiles, px; empty: as the run validated
    tile_halo: int | None = None  # px thrown away at a tile's sides; (tile - 2 halo) / 112 whole: most windows coincide
    store: str = "fp32"  # weights of model.onnx: fp16 halves the file, arithmetic stays fp32
    precisions: tuple[str, ...] = PRECISIONS  # which to prove, and make files of
    tiles: int = 8  # real tiles on which the maps are compared
    images: int = 40  # labelled images on which Dice, AJI and PQ are
    calibration: int = 32  # tiles of training images for the ranges of int8
    tensorrt: bool = False  # build the engine of the GPU at hand, too
    force: bool = False  # keep what failed a gate, and say so in the card
    overwrite: bool = False

    def __post_init__(self) -> None:
        for size in self.tile:
            if size < 16 or size % 16:
                raise InputError(f"`--tile` must be a multiple of 16, is {size}")

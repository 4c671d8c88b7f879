"""Every setting of a training run, each with its reason; the two recipes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from nsam.runtime.card import InputSpec, OutputSpec
from nsam.runtime.errors import ModelError

#: Values of `base` that are no path.
NAMED_BASES = ("mobile_sam", "default", "none")


@dataclass(frozen=True)
class Settings:
    """Saved whole in `config.json`; two runs with equal settings, data and versions are equal."""

    recipe: str = "nsam"
    # Model
    base: str = "mobile_sam"  # downloaded; what else it may be: checkpoint.load_base
    tune: str = "lora"  # LoRA + decoder; `decoder` alone; `full` trains all, the choice when base is none
    rank: int = 4  # 118,784 parameters beside 4.06 M of the decoder
    alpha: float = 4.0  # update scaled by alpha / rank = 1
    channels: tuple[str, ...] = ("nucleus", "distance")  # a mask alone finds 69 % of the nuclei: half of them touch
    stride: int = 2  # at 4 the ceiling of AJI falls from .98 to .95
    # View
    mpp: float = 0.25  # µm/px at which the network sees tissue: slides scanned at 40x
    crop: int = 224  # multiples of 224 fill TinyViT's windows: no padded tokens, 1.4x the pixels a second of 256
    tiles: tuple[int, ...] = InputSpec.sizes  # sides at inference: each image takes what suits it
    tile_halo: int = 56  # input px thrown away at tile sides: tiles step by multiples of 112, and most windows coincide
    scale_low: float = 0.7  # nuclei of other organs and species, and a wrong mpp
    scale_high: float = 1.4
    turn: bool = True  # nuclei have no up
    look: float = 0.75  # share of views with another stain, light, noise and focus: what laboratories differ in most
    # Optimisation
    epochs: float = 80.0
    steps: int = 0  # 0: epochs x images / batch
    batch: int = 8
    optimiser: str = "adamw"
    lr: float = 1e-3
    lora_plus: float = 16.0  # B learns this many times faster than A (Hayou et al. 2024)
    weight_decay: float = 0.02  # matrices only
    warmup: float = 0.05  # share of the steps
    cosine: bool = True
    clip: float = 1.0  # norm of the gradient
    ema: float = 0.998  # 0: none
    dice: bool = True  # soft Dice beside BCE: nuclei are 16 % of the pixels
    # Run
    folds: str = "official"
    validation_share: float = 0.1
    validate_every: int = 1000
    save_every: int = 100  # steps, or a multiple of them where that is often
    seed: int = 0
    precision: str = "auto"  # fp16 with loss scaling on CUDA (a T4 has no bf16), bf16 on a CPU that has it

    def __post_init__(self) -> None:
        choices = {
            "tune": ("lora", "decoder", "full"),
            "optimiser": ("adam", "adamw"),
            "folds": ("official", "organ", "source"),
            "precision": ("auto", "fp32", "fp16", "bf16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, is {getattr(self, name)}")
        if self.base == "none" and self.tune != "full":
            raise ValueError(
                f"`--base none`: nothing has trained what `--tune {self.tune}` leaves as it is; pass --tune full"
            )
        if self.crop % 16:
            raise ValueError(f"`crop` must be a multiple of 16, is {self.crop}")

    @property
    def output(self) -> OutputSpec:
        """The network's channels as the card names them."""
        kinds = tuple("logit" if name == "nucleus" else name for name in self.channels)
        return OutputSpec(self.channels, kinds, self.stride)

    @property
    def input(self) -> InputSpec:
        """The network's input as the card names it."""
        return InputSpec(sizes=self.tiles, mpp=self.mpp)

    def total_steps(self, images: int) -> int:
        """Optimiser steps for so many training images."""
        return self.steps or max(1, round(self.epochs * images / self.batch))


NSAM = Settings()

#: The student study's recipe, made right: SAM's own mask channel at its stride, 512 px images seen at 1024.
SEED = replace(
    NSAM,
    recipe="seed",
    channels=("nucleus",),
    stride=4,
    mpp=0.085,
    crop=1024,
    tiles=(1024,),
    scale_low=1.0,
    scale_high=1.0,
    turn=False,
    look=0.0,
    epochs=10.0,
    batch=2,
    optimiser="adam",
    lr=1e-4,
    lora_plus=1.0,
    weight_decay=0.0,
    warmup=0.0,
    cosine=False,
    clip=0.0,
    ema=0.0,
    dice=False,
    validate_every=200,
)

RECIPES = {"nsam": NSAM, "seed": SEED}


def read_settings(config: Path) -> Settings:
    """The settings saved in a run's `config.json`.

    Raises:
        ModelError: the file is broken or of another version.
    """
    try:
        saved = json.loads(config.read_text(encoding="utf-8"))["settings"]
        return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"`{config}`: not the config of a training run ({error})") from error

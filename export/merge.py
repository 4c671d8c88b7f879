"""A trained fold -> one plain network without LoRA."""

from __future__ import annotations

from pathlib import Path

from nsam.train.checkpoint import load_fold
from nsam.train.lora import has_lora, merge_lora
from nsam.train.model import NucleusNet


def load_merged(fold_dir: Path) -> NucleusNet:
    """A fold's network in eval mode with LoRA folded into the weights; a fully tuned one is as it is.

    Loaded anew: a deep copy of a network with parametrised layers shares their classes with it, so merging the
    copy would break the original.

    Raises:
        ModelError: as `load_fold`.
    """
    model, _ = load_fold(fold_dir)
    if has_lora(model):
        merge_lora(model)
    return model

"""A trained fold -> one plain network without LoRA."""

from __future__ import annotations

import copy

from nsam.train.lora import has_lora, merge_lora
from nsam.train.model import NucleusNet


def merged_copy(model: NucleusNet) -> NucleusNet:
    """A copy in eval mode with LoRA folded into the weights; `model` keeps its own.

    A fully tuned network has no LoRA and is copied as it is.
    """
    merged = copy.deepcopy(model)
    if has_lora(merged):
        merge_lora(merged)
    # Entering train mode first makes TinyViT forget attention biases that it looked up before.
    return merged.train().eval()

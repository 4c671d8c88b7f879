"""MobileSAM's file without MobileSAM."""

from __future__ import annotations

import torch

from nsam.train.model import NucleusNet
from nsam.train.settings import SEED


def mobile_sam_state() -> dict[str, torch.Tensor]:
    """A state dict with the official file's names and shapes, random inside."""
    back = {
        "encoder.vit.patch_embed.conv1.": "image_encoder.patch_embed.seq.0.",
        "encoder.vit.patch_embed.conv2.": "image_encoder.patch_embed.seq.2.",
        "encoder.vit.head.norm.": "image_encoder.norm_head.",
        "encoder.vit.head.fc.": "image_encoder.head.",
        "encoder.vit.stages.": "image_encoder.layers.",
        "encoder.neck.": "image_encoder.neck.",
    }
    state = {}
    for name, value in NucleusNet(SEED.output).state_dict().items():
        for new, old in back.items():
            if name.startswith(new):
                name = old + name[len(new) :]
                parts = name.split(".")
                if parts[1] == "layers" and parts[3] == "downsample":
                    name = ".".join(["image_encoder.layers", str(int(parts[2]) - 1), *parts[3:]])
                if "neck" not in name:
                    name = name.replace(".conv.", ".c.")
                break
        if name != "tokens.seen":  # ours
            state[name] = torch.rand_like(value) if value.is_floating_point() else value
    state["image_encoder.layers.1.blocks.0.attn.attention_bias_idxs"] = torch.zeros(49, 49, dtype=torch.long)
    return state

"""MobileSAM's own checkpoint: where to get it, and its names in our network."""

from __future__ import annotations

from pathlib import Path

import pooch
from torch import Tensor

from nsam.runtime.errors import ModelError
from nsam.train.model import NucleusNet, needed

MOBILE_SAM_URL = "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/master/weights/mobile_sam.pt"
MOBILE_SAM_SHA256 = "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"

#: MobileSAM's names -> ours, tried in this order at the start of a key.
_RENAMED = (
    ("image_encoder.neck.", "encoder.neck."),
    ("image_encoder.patch_embed.seq.0.", "encoder.vit.patch_embed.conv1."),
    ("image_encoder.patch_embed.seq.2.", "encoder.vit.patch_embed.conv2."),
    ("image_encoder.norm_head.", "encoder.vit.head.norm."),
    ("image_encoder.head.", "encoder.vit.head.fc."),
    ("image_encoder.layers.", "encoder.vit.stages."),
)

#: Parts that MobileSAM does not have.
_OWN = ("detail.", "tokens.")


def download_mobile_sam() -> Path:
    """`mobile_sam.pt`, downloaded once into the user's cache, its checksum verified.

    Raises:
        ModelError: it cannot be had.
    """
    try:
        return Path(
            pooch.retrieve(MOBILE_SAM_URL, MOBILE_SAM_SHA256, fname="mobile_sam.pt", path=pooch.os_cache("nsam"))
        )
    except Exception as error:  # requests, urllib and pooch each have their own
        raise ModelError(
            f"`mobile_sam`: cannot be downloaded ({type(error).__name__}); get mobile_sam.pt from "
            "github.com/ChaoningZhang/MobileSAM and pass --base PATH, or train from nothing with "
            "--base none --tune full"
        ) from error


def load_mobile_sam(model: NucleusNet, state: dict[str, Tensor], source: str = "mobile_sam") -> None:
    """Load a MobileSAM state dict; what SAM does not have keeps its start.

    Raises:
        ModelError: names or shapes are not MobileSAM's.
    """
    renamed = {rename_mobile_sam(name): value for name, value in state.items()}
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith(_OWN)}
    # Index tables are buffers that the encoder makes itself.
    extra = [n for n in renamed.keys() - wanted.keys() if not n.endswith("attention_bias_idxs")]
    missing = needed(wanted.keys() - renamed.keys())
    other = [n for n in renamed.keys() & wanted.keys() if renamed[n].shape != wanted[n].shape]
    for what, names in (("unknown", extra), ("missing", missing), ("of another shape", other)):
        if names:
            raise ModelError(
                f"`{source}`: not MobileSAM's architecture; {len(names)} weights are {what}, "
                f"such as `{sorted(names)[0]}`"
            )
    model.load_state_dict({n: v for n, v in renamed.items() if n in wanted}, strict=False)


def rename_mobile_sam(name: str) -> str:
    """A key of MobileSAM's state dict -> the same weight's name in `NucleusNet`."""
    for old, new in _RENAMED:
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    if name.startswith("encoder.vit."):
        name = name.replace(".c.", ".conv.")
        parts = name.split(".")
        # timm counts a downsampling to the stage that it leads into.
        if len(parts) > 4 and parts[2] == "stages" and parts[4] == "downsample":
            parts[3] = str(int(parts[3]) + 1)
            name = ".".join(parts)
    return name

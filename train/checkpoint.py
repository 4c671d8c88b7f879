"""Base weights in, trained weights out. No pickle is opened: safetensors, or `weights_only=True`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from nsam.runtime.errors import ModelError
from nsam.runtime.files import write_bytes
from nsam.train.exported import load_exported
from nsam.train.lineage import locate, settings_of
from nsam.train.lora import add_lora, has_lora, merge_lora
from nsam.train.mobile_sam import download_mobile_sam, load_mobile_sam
from nsam.train.model import NucleusNet, needed
from nsam.train.sam_onnx import read_sam_onnx
from nsam.train.settings import Settings

#: Where a checkpoint holds what `hash_kept` gave.
KEPT = "kept_sha256"


def build_model(settings: Settings) -> tuple[NucleusNet, str]:
    """A new network with its base loaded, LoRA added and everything that is not tuned frozen.

    Weights that the base does not bring come from `torch.manual_seed(settings.seed)`.

    Returns:
        The network and the hash of what it keeps of its base, which a checkpoint of trained weights belongs to.

    Raises:
        ModelError: the base cannot be had, or is of another architecture.
    """
    torch.manual_seed(settings.seed)
    model = NucleusNet(settings.output, settings.input.mean, settings.input.std)
    if settings.base != "none":
        load_base(model, settings.base)
    model.requires_grad_(False)
    model.mask_decoder.requires_grad_(True)
    model.tokens.requires_grad_(True)
    if model.detail is not None:
        model.detail.requires_grad_(True)
    if settings.tune == "lora":
        add_lora(model.encoder.vit.stages, settings.rank, settings.alpha)
    elif settings.tune == "full":
        model.encoder.requires_grad_(True)
        model.encoder.vit.head.requires_grad_(False)
    return model, hash_kept(model, settings.base)


def load_base(model: NucleusNet, base: str) -> None:
    """Load `mobile_sam` (downloaded once, checksum verified), a `.pt` of its layout, a folder of its ONNX exports, a
    fold of a run, an exported model, or `default`, the one that comes with nsam.

    Raises:
        ModelError: see `build_model`.
    """
    kind, path = locate(base)
    if kind == "exported":
        load_exported(model, path)
    elif kind == "onnx":
        load_mobile_sam(model, read_sam_onnx(path), base)
    elif kind == "fold":
        model.load_state_dict(_state_of(load_fold(path)[0]), strict=False)
    else:
        path = download_mobile_sam() if kind == "mobile_sam" else path
        load_mobile_sam(model, _read_plain(path), str(path))


def _read_plain(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        raise ModelError(f"`{path}`: name the folder that it is in, a fold's or a model's")
    if not path.is_file():
        raise ModelError(
            f"`{path}`: no such base; give default, mobile_sam, none, a .pt file, a fold's folder or a model"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes make it stumble over
        raise ModelError(f"`{path}`: no weights that load without pickle; give MobileSAM's .pt") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"`{path}`: a plain state dict is wanted; this file holds something else")
    return state


def trained_state(model: nn.Module, base: str) -> dict[str, Tensor]:
    """What training changed, by name: trainable weights, running statistics, and without a base everything."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moving = {name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if base == "none" or name in trainable or name in moving
    }


def save_fold(path: Path, state: dict[str, Tensor], kept: str) -> None:
    """Write trained weights with the hash of the base that they belong to."""
    write_bytes(path, save(state, metadata={KEPT: kept}))  # `save_file` lets only its user read


def read_last(path: Path, kept: str, device: torch.device) -> dict[str, Any]:
    """What `fit` needs to go on.

    Raises:
        ModelError: it is broken, or belongs to a run from another base.
    """
    try:
        saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes make it stumble over
        raise ModelError(f"`{path}`: broken; delete it to begin this fold anew") from error
    if KEPT not in saved:
        raise ModelError(f"`{path}`: of another version of nsam; begin this fold anew, in another --out")
    if saved[KEPT] != kept:
        raise ModelError(
            f"`{path}`: was begun from another base than there is now; use the same weights, or another --out"
        )
    return saved


def load_fold(fold_dir: Path) -> tuple[NucleusNet, Settings]:
    """The network of a run's fold with its best weights, in eval mode, and the settings that it had.

    Raises:
        ModelError: not a fold's folder, unfinished, or its base is another than it was trained on.
    """
    config, best = fold_dir.parent / "config.json", fold_dir / "best.safetensors"
    if (fold_dir / config.name).is_file():
        raise ModelError(f"`{fold_dir}`: a whole run; name a fold of it, such as {fold_dir / 'fold0'}, or .../final")
    for path in (config, best):
        if not path.is_file():
            raise ModelError(f"`{path}`: missing; name a fold of a run made by nsam-train, such as RUN/fold0")
    settings = settings_of(fold_dir)
    model, kept = build_model(settings)
    try:
        with safe_open(best, "pt") as stream:
            wanted = (stream.metadata() or {}).get(KEPT)
        state = load_file(best)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"`{best}`: broken ({error}); train the fold again") from error
    if wanted is None:
        raise ModelError(f"`{best}`: of another version of nsam; train the fold again")
    if wanted != kept:
        raise ModelError(f"`{best}`: was trained on another base than `{settings.base}` is now; use the same weights")
    load_trained(model, state, str(best))
    return model.eval(), settings


def load_trained(model: NucleusNet, state: dict[str, Tensor], source: str) -> None:
    """Put trained weights into a model that `build_model` made.

    Raises:
        ModelError: names or shapes do not fit.
    """
    own = model.state_dict()
    for name, value in state.items():
        if name not in own or own[name].shape != value.shape:
            raise ModelError(f"`{source}`: weight `{name}` does not fit this architecture")
    # In eval mode TinyViT keeps attention biases it looked up before; train() forgets them.
    model.train().load_state_dict(state, strict=False)


def hash_kept(model: nn.Module, base: str) -> str:
    """SHA-256 over names and bytes of what has to come from the base: the maps need it, no checkpoint brings it.

    What is random and not needed must not count: its last bits differ between kinds of CPU.
    """
    digest, state = hashlib.sha256(), model.state_dict()
    for name in sorted(needed(state.keys() - trained_state(model, base).keys())):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _state_of(model: NucleusNet) -> dict[str, Tensor]:
    if has_lora(model):
        merge_lora(model)
    return model.state_dict()

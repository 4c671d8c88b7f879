"""A model directory as the base of another training: its weights are read out of `model.onnx`.

The exporter folds, transposes and renames. What it left as it was is found by value when the model is exported;
`base.safetensors` keeps the rest (convolutions with their BatchNorm, attention biases) and says where what is.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nsam.runtime.card import ModelCard
from nsam.runtime.errors import ModelError
from nsam.runtime.files import write_bytes
from nsam.train.model import UNUSED, NucleusNet, needed

BASE_NAME = "base.safetensors"


def write_base(model: nn.Module, graph: Path, path: Path) -> None:
    """Write what a base needs beside the graph: a map of the weights in it, and those that are not.

    Args:
        model: the merged network that the graph was made of.
        graph: `model.onnx` as it ships; weights stored as fp16 are found too.
        path: where to write; matrices as fp16 if the graph's are, vectors as fp32.
    """
    arrays = _initializers(graph)
    half = any(array.dtype == np.float16 for array in arrays.values())
    places = {(array.dtype, array.shape, array.tobytes()): name for name, array in arrays.items()}
    found: dict[str, tuple[str, bool]] = {}
    rest: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.startswith(UNUSED) or not value.is_floating_point():
            continue
        plain: NDArray[np.float32] = value.detach().cpu().float().numpy()
        for turned in (False, True):
            array = np.ascontiguousarray(plain.T if turned else plain)
            for kind in (np.float32, np.float16):
                key = (np.dtype(kind), array.shape, array.astype(kind).tobytes())
                if name not in found and key in places:
                    found[name] = (places[key], turned)
        if name not in found:
            rest[name] = value.detach().cpu().to(torch.float16 if half and value.ndim > 1 else torch.float32)
    content = save({name: value.contiguous() for name, value in rest.items()}, {"initializers": json.dumps(found)})
    write_bytes(path, content)  # `save_file` lets only its user read


def load_exported(model: NucleusNet, model_dir: Path) -> None:
    """Load the weights of a model directory; those on which no map depends keep their random start.

    Raises:
        ModelError: files are missing, changed, or of a model with other channels.
    """
    card = ModelCard.read(model_dir)
    if card.output != model.output:
        raise ModelError(f"`{model_dir}`: has the maps {card.output}, {model.output} are asked for")
    graph, base = (card.verify_file(model_dir, name) for name in ("model.onnx", BASE_NAME))
    arrays = _initializers(graph)
    state: dict[str, Tensor] = {}
    try:
        with safe_open(base, "pt") as stream:
            state = {name: stream.get_tensor(name).float() for name in stream.keys()}  # noqa: SIM118
            for name, (place, turned) in json.loads((stream.metadata() or {})["initializers"]).items():
                array = arrays[place].astype(np.float32)
                state[name] = torch.from_numpy(np.ascontiguousarray(array.T if turned else array))
        missing, unknown = model.load_state_dict(state, strict=False)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"`{model_dir}`: not the weights of this architecture ({error}); export it again") from error
    missing = needed(missing)
    if missing or unknown:
        raise ModelError(f"`{model_dir}`: not the weights of this architecture ({[*missing, *unknown][0]})")


def _initializers(graph: Path) -> dict[str, NDArray[np.generic]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(graph).graph.initializer}

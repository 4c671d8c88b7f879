"""MobileSAM's weights come out of its ONNX exports as they went in.

The graphs are drawn here as torch's older exporter writes them, since no export comes with the tests.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fake_mobile_sam import mobile_sam_state
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from nsam.runtime.errors import ModelError
from nsam.train.checkpoint import build_model
from nsam.train.mobile_sam import load_mobile_sam
from nsam.train.model import UNUSED, NucleusNet
from nsam.train.settings import NSAM

BASED = replace(NSAM, tune="full")


class Drawn:
    """A graph of nodes that hold weights; nothing runs it."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.rest = dict(state)

    def add(self, kind: str, module: str, *weights: Tensor) -> None:
        """A node whose weights the exporter changed and numbered."""
        names = [f"onnx::{kind}_{len(self.tensors) + i}" for i in range(len(weights))]
        self.tensors += [_proto(weight, name) for name, weight in zip(names, weights, strict=True)]
        self.nodes.append(helper.make_node(kind, ["x", *names], ["y"], name=f"{_scope(module)}/{kind}"))

    def save(self, path: Path) -> None:
        """With what was not added under its own name."""
        self.tensors += [_proto(value, name) for name, value in self.rest.items()]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
        onnx.save(helper.make_model(helper.make_graph(self.nodes, "drawn", [x], [x], self.tensors)), path)


def _proto(value: Tensor, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(value.numpy()), name)


def _scope(module: str) -> str:
    """`neck.1` -> `/neck/neck.1` and `layers.1.blocks.0.attn` -> `/layers.1/blocks.0/attn`, as exporters write them."""
    first, *rest = module.replace("seq.", "seq/seq.").replace("neck.", "neck/neck.").split(".")
    parts = [first]
    for part in rest:
        if part.isdigit():
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return "/" + "/".join(parts)


def draw_encoder(state: dict[str, Tensor], path: Path) -> None:
    """BatchNorm folded, matrices turned, biases of attention looked up for all pairs of tokens."""
    start = "image_encoder."
    drawn = Drawn({n.removeprefix(start): v for n, v in state.items() if n.startswith(start) and "head" not in n})
    rest = drawn.rest
    for name in [name for name in rest if name.endswith("bias_idxs")]:
        rest.pop(name)
    for name in [name for name in rest if name.endswith(".c.weight")]:
        module = name.removesuffix(".c.weight")
        weight, gain, bias, mean, var = (
            rest.pop(f"{module}.{n}") for n in ("c.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        )
        rest.pop(f"{module}.bn.num_batches_tracked")
        gain = gain / (var + 1e-5).sqrt()
        drawn.add("Conv", f"{module}.c", weight * gain[:, None, None, None], bias - mean * gain)
    for name in [name for name in rest if rest[name].ndim == 2 and name.endswith(".weight")]:
        drawn.add("MatMul", name.removesuffix(".weight"), rest.pop(name).T)
    for name in ("neck.1", "neck.3"):
        drawn.add("Mul", name, rest.pop(f"{name}.weight")[:, None, None])
        drawn.add("Add", name, rest.pop(f"{name}.bias")[:, None, None])
    for name in [name for name in rest if name.endswith("attention_biases")]:
        module, biases = name.removesuffix(".attention_biases"), rest.pop(name)
        side = round(biases.shape[1] ** 0.5)
        y, x = torch.arange(side * side) // side, torch.arange(side * side) % side
        full = biases[:, (y[:, None] - y).abs() * side + (x[:, None] - x).abs()]
        constant = f"{_scope(module)}/Constant_5_output_0"
        drawn.nodes.append(helper.make_node("Constant", [], [constant], value=_proto(full, "")))
        drawn.nodes.append(helper.make_node("Add", ["x", constant], ["y"], name=f"{_scope(module)}/Add"))
    drawn.save(path)


def draw_decoder(state: dict[str, Tensor], path: Path) -> None:
    """Tokens joined, matrices turned; what prompts need is not in it."""
    drawn = Drawn({n: v for n, v in state.items() if n.startswith("mask_decoder.")})
    rest = drawn.rest
    tokens = [rest.pop(f"mask_decoder.{name}.weight") for name in ("iou_token", "mask_tokens")]
    drawn.add("Expand", "", torch.cat(tokens)[None])
    drawn.add("Mul", "", state["prompt_encoder.no_mask_embed.weight"].reshape(1, -1, 1, 1))
    for name in [name for name in rest if "transformer" in name and rest[name].ndim == 2]:
        drawn.add("MatMul", name.removeprefix("mask_decoder.").removesuffix(".weight"), rest.pop(name).T)
    norm = "mask_decoder.output_upscaling.1"
    scope = "output_upscaling/output_upscaling.1"
    drawn.add("Mul", scope, rest.pop(f"{norm}.weight")[:, None, None])
    drawn.add("Add", scope, rest.pop(f"{norm}.bias")[:, None, None])
    drawn.save(path)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of both signs: by all-positive ones, as the stand-in has them, maps hardly depend on attention."""
    torch.manual_seed(5)
    return {
        name: value if "running_var" in name or not value.is_floating_point() else (value - 0.5) / 2
        for name, value in mobile_sam_state().items()
    }


@pytest.fixture(scope="module")
def exports(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    draw_encoder(state, folder / "any_name.onnx")
    draw_decoder(state, folder / "another.onnx")
    return folder


def test_weights_and_maps_are_those_of_the_official_file(state: dict[str, Tensor], exports: Path) -> None:
    torch.manual_seed(BASED.seed)
    official = NucleusNet()
    load_mobile_sam(official, state)
    read, _ = build_model(replace(BASED, base=str(exports)))
    own = read.state_dict()
    for name, value in official.state_dict().items():
        if not name.startswith(UNUSED) and ".conv." not in name and ".bn." not in name:
            assert torch.equal(own[name], value), name
    # Convolutions have taken their BatchNorm in, so only what they do is the same.
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8))
    with torch.no_grad():
        wanted, got = (network.train().eval()(images) for network in (official, read))
    assert float(wanted.std()) > 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))


def test_real_exports_give_their_own_embeddings() -> None:
    """The encoder with the weights that were read, and the file that they were read from."""
    if "NSAM_SAM_ONNX" not in os.environ:
        pytest.skip("no exports of MobileSAM: name their folder in NSAM_SAM_ONNX (README, Weights)")
    folder = Path(os.environ["NSAM_SAM_ONNX"])
    model, _ = build_model(replace(BASED, base=str(folder)))
    image = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(folder / "encoder.onnx")
    wanted = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    with torch.no_grad():
        got = model.train().eval().encoder(image)[0].numpy()
    assert np.abs(wanted).max() > 0.1
    assert np.abs(got - wanted).max() < 1e-5


def test_half_of_it_or_another_graph_is_refused(exports: Path, tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes((exports / "any_name.onnx").read_bytes())
    with pytest.raises(ModelError, match="found here: encoder"):
        build_model(replace(BASED, base=str(tmp_path)))
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"broken.onnx`: no ONNX file"):
        build_model(replace(BASED, base=str(tmp_path)))

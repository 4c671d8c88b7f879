"""MobileSAM's weights out of its ONNX exports, for where mobile_sam.pt cannot be had.

Exporters fold BatchNorm into convolutions, turn matrices and rename them, but a node keeps the path of its module in
its name: `/layers.1/blocks.0/attn/qkv/MatMul` holds `layers.1.blocks.0.attn.qkv.weight`, transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from nsam.runtime.errors import ModelError

_BATCH_NORM_EPS = 1e-5  # of TinyViT's BatchNorm
#: A weight that keeps its name, by what it tells of.
_SIGNS = {"encoder": "neck.0.weight", "decoder": "mask_decoder.transformer.norm_final_attn.weight"}


def read_sam_onnx(folder: Path) -> dict[str, Tensor]:
    """A state dict with MobileSAM's names from the exports of encoder and decoder, whatever their files are called.

    A folded convolution comes with the BatchNorm that changes nothing; weights that no map needs may be left out.

    Raises:
        ModelError: no such exports in there.
    """
    state: dict[str, Tensor] = {}
    found = set()
    for path in sorted(folder.glob("*.onnx")):
        try:
            graph = onnx.load(path).graph
        except Exception as error:  # protobuf raises whatever the bytes make it stumble over
            raise ModelError(f"`{path}`: no ONNX file ({error})") from error
        tensors = {tensor.name: _tensor(tensor) for tensor in graph.initializer}
        for part, sign in _SIGNS.items():
            if sign in tensors:
                found.add(part)
                state.update(_encoder(graph, tensors) if part == "encoder" else _decoder(graph, tensors))
    if len(found) < len(_SIGNS):
        raise ModelError(
            f"`{folder}`: the .onnx files of a base are MobileSAM's encoder and decoder, exported with their names; "
            f"found here: {', '.join(sorted(found)) or 'neither'}"
        )
    return state


def _encoder(graph: onnx.GraphProto, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    constants = {
        node.output[0]: node.attribute[0].t
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    for name, value in _weights(graph, tensors):
        yield f"image_encoder.{name}", value
    for node in graph.node:
        module = f"image_encoder.{_module(node.name)}"
        folded = _numbered(node, tensors)
        if node.op_type == "Conv" and len(folded) == 2:
            weight, bias = folded
            norm = module.removesuffix(".c") + ".bn"
            yield f"{module}.weight", weight
            yield f"{norm}.weight", torch.full_like(bias, (1 + _BATCH_NORM_EPS) ** 0.5)
            yield f"{norm}.bias", bias
            yield f"{norm}.running_mean", torch.zeros_like(bias)
            yield f"{norm}.running_var", torch.ones_like(bias)
        elif node.op_type == "Add" and module.endswith(".attn"):
            for name in node.input:
                if name in constants:
                    # Looked up for all pairs of tokens; those of the first token are the table itself.
                    yield f"{module}.attention_biases", _tensor(constants[name])[:, 0].clone()


def _decoder(graph: onnx.GraphProto, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in _weights(graph, tensors):
        if name.startswith(("transformer.", "output_upscaling.")):
            name = f"mask_decoder.{name}"
        if name.startswith(("mask_decoder.", "prompt_encoder.")):
            yield name, value
    for node in graph.node:
        for value in _numbered(node, tensors):
            if node.op_type == "Expand":
                yield "mask_decoder.iou_token.weight", value[0, :1].clone()
                yield "mask_decoder.mask_tokens.weight", value[0, 1:].clone()
            elif node.op_type == "Mul" and value.ndim == 4:
                yield "prompt_encoder.no_mask_embed.weight", value.reshape(1, -1)


def _weights(graph: onnx.GraphProto, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Those that kept their names, matrices and SAM's LayerNorm2d."""
    for name, value in tensors.items():
        if not name.startswith("onnx::"):
            yield name.removeprefix("model."), value
    for node in graph.node:
        module = _module(node.name)
        for value in _numbered(node, tensors):
            if node.op_type == "MatMul":
                yield f"{module}.weight", value.T.contiguous()
            elif node.op_type in ("Mul", "Add") and value.ndim == 3:
                yield f"{module}.{'weight' if node.op_type == 'Mul' else 'bias'}", value.flatten()


def _numbered(node: onnx.NodeProto, tensors: dict[str, Tensor]) -> list[Tensor]:
    """A node's weights that the exporter changed, and gave a number for a name."""
    return [tensors[name] for name in node.input if name.startswith("onnx::") and name in tensors]


def _tensor(tensor: onnx.TensorProto) -> Tensor:
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def _module(node: str) -> str:
    """`/neck/neck.1/Mul` -> `neck.1`: a Sequential says its own name twice."""
    parts: list[str] = []
    for part in node.strip("/").split("/")[:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)

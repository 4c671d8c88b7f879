"""fp32 graph -> strongly typed fp16 graph; and the rounding of fp16 and bf16 in fp32 arithmetic, to prove both on any
CPU.

TensorRT 11 has no weak typing left: the graph itself must say what is fp16. ONNX Runtime's CPU provider runs fp16
nodes in fp32 and drops the casts between them, so comparing with it would prove nothing; `rounded` writes the casts
out where it must honour them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from nsam.export.graph import check_graph
from nsam.export.ranges import float_tensors
from nsam.runtime.errors import ModelError

FP16_MAX = 65_504.0
#: Beyond an eighth of fp16's largest number there is too little room for tissue that nobody has shown it.
RANGE_LIMIT = 8_192.0
#: Sums of many squares or exponentials; a T4 needs them in fp32 (FP16 overflows there, NVIDIA/TensorRT#3692).
KEPT_OPERATORS = ("LayerNormalization", "ReduceMean", "ReduceSum", "Pow", "Sqrt", "Softmax")
#: Turing's engines know these in fp16 only, whatever the range.
FP16_ONLY = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Kept:
    """A node that stays fp32."""

    node: str
    operator: str
    reason: str


def keep_list(path: Path, ranges: Mapping[str, tuple[float, float]]) -> list[Kept]:
    """Nodes that must stay fp32, by operator and by their activations' range.

    Raises:
        ModelError: a matrix product beyond what fp16 holds, which could not be built for a T4.
    """
    kept = []
    for node in onnx.load(path).graph.node:
        seen = [name for name in (*node.input, *node.output) if name in ranges]
        largest = max((max(map(abs, ranges[name])) for name in seen), default=0.0)
        if node.op_type in KEPT_OPERATORS:
            kept.append(Kept(node.name, node.op_type, "norms and softmax sum in fp32"))
        elif node.op_type in FP16_ONLY:
            if largest > FP16_MAX / 2:
                raise ModelError(
                    f"`{path.name}`: {node.op_type} `{node.name}` reaches {largest:.0f}, fp16 ends at {FP16_MAX:.0f}; "
                    "export without fp16 (--precisions fp32)"
                )
        elif largest > RANGE_LIMIT:
            kept.append(Kept(node.name, node.op_type, f"reaches {largest:.0f}, beyond {RANGE_LIMIT:.0f}"))
    return kept


def to_fp16(source: Path, target: Path, kept: list[Kept]) -> None:
    """Write a graph whose every tensor has its type written down: fp16, but for the nodes of `kept`.

    Input and output stay uint8 and float32. Only standard operators; casts stand where precisions meet.

    Raises:
        ModelError: the result is not a valid graph.
    """
    model = onnx.load(source)
    graph = model.graph
    floats = float_tensors(model)
    fp32_nodes = {entry.node for entry in kept}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    half_weights: dict[str, TensorProto] = {}
    is_half: dict[str, bool] = dict.fromkeys(floats, False)  # the precision in which a tensor was made
    casts: dict[tuple[str, bool], str] = {}
    nodes: list[NodeProto] = []

    def in_precision(name: str, half: bool) -> str:
        if name not in floats or is_half[name] == half:
            return name
        if half and name in weights:
            value = numpy_helper.to_array(weights[name])
            half_weights[name] = numpy_helper.from_array(_as_fp16(value, name), f"{name}.fp16")
            return f"{name}.fp16"
        if (name, half) not in casts:
            casts[name, half] = f"{name}.{'fp16' if half else 'fp32'}"
            to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            cast = helper.make_node("Cast", [name], [casts[name, half]], f"{casts[name, half]}.cast", to=to)
            nodes.append(cast)
        return casts[name, half]

    results = {output.name for output in graph.output}
    for node in graph.node:
        half = node.name not in fp32_nodes
        inputs = [in_precision(name, half) for name in node.input]
        made = [name for name in node.output if name in floats]
        if made and half and node.op_type == "Cast":
            node.attribute[0].i = TensorProto.FLOAT16
        node.input[:] = inputs
        for i, name in enumerate(node.output):
            if name in floats:
                is_half[name] = half
                if half and name in results:
                    node.output[i] = f"{name}.fp16"
        nodes.append(node)
        for name in results.intersection(made):
            if half:
                nodes.append(helper.make_node("Cast", [f"{name}.fp16"], [name], f"{name}.cast", to=TensorProto.FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    tensors = [*graph.initializer, *half_weights.values()]
    kept_tensors = [tensor for tensor in tensors if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept_tensors)
    onnx.save(model, target)
    check_graph(target)


def rounded(source: Path, target: Path) -> None:
    """fp16 graph -> fp32 graph that rounds each tensor to fp16 where the other would, with sums in fp32.

    So do tensor cores. The casts are the graph's own, which ONNX Runtime honours.
    """
    model = onnx.load(source)
    graph = model.graph
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    halves = {v.name for v in typed.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    nodes = []
    for node in graph.node:
        if node.op_type == "Cast":
            to = next(attribute for attribute in node.attribute if attribute.name == "to")
            if node.input[0] in halves and to.i == TensorProto.FLOAT:
                nodes.append(helper.make_node("Identity", node.input, node.output, node.name))
                continue
            to.i = TensorProto.FLOAT if to.i == TensorProto.FLOAT16 else to.i
        nodes += _rounding(node, halves, TensorProto.FLOAT16)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            value = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, target)


def rounded_to_bf16(source: Path, target: Path) -> None:
    """fp32 graph -> the same that rounds weights and each tensor to bf16, with sums in fp32.

    OpenVINO in bf16 moved the maps of 0.8.0 by .00036 in the mean of eight tiles; this moves them by .0005 on one.
    """
    model = onnx.load(source)
    graph = model.graph
    floats = float_tensors(model)
    nodes = [part for node in graph.node for part in _rounding(node, floats, TensorProto.BFLOAT16)]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            value = torch.tensor(numpy_helper.to_array(tensor)).bfloat16().float().numpy()
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, target)


def _rounding(node: NodeProto, chosen: Collection[str], to: int) -> list[NodeProto]:
    """The node and, behind each chosen output, casts to a type and back."""
    nodes, wanted = [node], [name for name in node.output if name in chosen]
    node.output[:] = [f"{name}.exact" if name in chosen else name for name in node.output]
    for name in wanted:
        nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.short"], to=to))
        nodes.append(helper.make_node("Cast", [f"{name}.short"], [name], to=TensorProto.FLOAT))
    return nodes


def _as_fp16(value: np.ndarray, name: str) -> np.ndarray:
    largest = float(np.abs(value).max(initial=0))
    if largest > FP16_MAX:
        raise ModelError(f"weight `{name}` reaches {largest:.0f}, fp16 ends at {FP16_MAX:.0f}")
    return value.astype(np.float16)

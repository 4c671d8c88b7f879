"""How large activations become on real tissue: what decides over fp16 and calibrates int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

#: Tensors fetched in one pass: all of them at once would need gigabytes.
_AT_ONCE = 64


def activation_ranges(path: Path, tiles: NDArray[np.uint8]) -> dict[str, tuple[float, float]]:
    """(min, max) of every float tensor that a node makes, over real tiles.

    Args:
        path: a graph of fp32 arithmetic, its one input `image`.
        tiles: (N, S, S, 3) uint8.
    """
    model = onnx.load(path)
    floats = float_tensors(model)
    names = [name for node in model.graph.node for name in node.output if name in floats]
    ranges: dict[str, tuple[float, float]] = {}
    options = onnxruntime.SessionOptions()
    # Fused nodes would hide the tensors between them.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for first in range(0, len(names), _AT_ONCE):
        part = names[first : first + _AT_ONCE]
        del model.graph.output[:]
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in part)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        for tile in tiles:
            for name, value in zip(part, session.run(part, {"image": tile[None]}), strict=True):
                low, high = ranges.get(name, (np.inf, -np.inf))
                ranges[name] = (min(low, float(value.min())), max(high, float(value.max())))
    return ranges


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the graph's tensors of type float32, weights included."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    typed = [*graph.value_info, *graph.input, *graph.output]
    names = {value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return names | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}

"""fp32 graph -> int8 for CPUs (static QDQ), leaving in fp32 what measurement says does not bear it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from nsam.export.graph import check_graph

#: Products with weights; norms, softmax and GELU stay as they are. MatMul multiplies activations with each other
#: (attention): OpenVINO fails to compile it quantised. ConvTranspose is 2 % of the time, and gains nothing.
QUANTISED = ("Conv", "Gemm")
#: Nodes judged together, in the order of the graph: about a block of the encoder.
GROUP = 8
#: Groups left out at most; more than that and the file is hardly faster than fp32.
MOST_LEFT_OUT = 8


def quantise(source: Path, target: Path, ranges: Mapping[str, tuple[float, float]], nodes: list[str]) -> None:
    """Write `source` with the named nodes in int8: weights per channel, activations by their range.

    Args:
        source: fp32 graph.
        target: where to write.
        ranges: (min, max) of every float tensor over real tiles, as `activation_ranges` gives them.
        nodes: names of nodes to quantise.
    """
    tensors: dict[str, Any] = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    quantizer = QDQQuantizer(
        onnx.load(source),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, tensors),
        nodes_to_quantize=nodes,
        nodes_to_exclude=[],
        op_types_to_quantize=list(QUANTISED),
        extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(target))
    check_graph(target)


def groups(source: Path) -> list[list[str]]:
    """Names of the nodes that can be quantised, in groups of neighbours.

    The first and the last are left out: steps of pixels and of maps show in everything. (On three tiles the mean error
    of maps fell from .018 to .007 by that, and from .041 in OpenVINO.)
    """
    names = [node.name for node in onnx.load(source).graph.node if node.op_type in QUANTISED][1:-1]
    return [names[i : i + GROUP] for i in range(0, len(names), GROUP)]


def by_sensitivity(
    source: Path,
    scratch: Path,
    ranges: Mapping[str, tuple[float, float]],
    load: Any,
    tiles: NDArray[np.uint8],
    exact: NDArray[np.float32],
) -> list[tuple[float, list[str]]]:
    """(mean |difference| of maps, nodes) of each group quantised alone, the most sensitive first.

    Args:
        source: fp32 graph.
        scratch: folder for trial graphs.
        ranges: see `quantise`.
        load: a graph's path -> an engine.
        tiles: (N, S, S, 3) uint8.
        exact: (N, C, h, w) maps of the fp32 graph.
    """
    measured = []
    for names in groups(source):
        trial = scratch / "trial.onnx"
        quantise(source, trial, ranges, names)
        measured.append((float(np.abs(load(trial).run(tiles) - exact).mean()), names))
    return sorted(measured, key=lambda pair: -pair[0])


def candidates(ranked: list[tuple[float, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    """(groups left out, nodes to quantise): all of them, then without the most sensitive 1, 2, 4, 8 groups."""
    left_out = 0
    while left_out <= min(MOST_LEFT_OUT, len(ranked) - 1):
        yield left_out, [name for _, names in ranked[left_out:] for name in names]
        left_out = max(1, 2 * left_out)

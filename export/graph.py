"""Network -> ONNX: one input `image` uint8 (N, S, S, 3), one output `maps` float32 (N, C, S/stride, S/stride)."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from nsam.runtime.card import SIZE_DIMENSION
from nsam.runtime.errors import ModelError, first_line
from nsam.train.encoder import WINDOW
from nsam.train.model import NucleusNet

OPSET = 18  # TensorRT 10 and ONNX Runtime read it whole; from 23 on the exporter writes Attention, which TensorRT lacks
SIMPLIFY_SECONDS = 600

#: Runs apart: onnxsim is native code that can crash, and must not take the export with it.
_SIMPLIFY = """
import sys, onnx, onnxsim
# fuse_attention would put in an operator of com.microsoft, which only ONNX Runtime knows.
model, same = onnxsim.simplify(onnx.load(sys.argv[1]), skipped_optimizers=["fuse_attention"])
if not same:
    sys.exit("its result differs from the graph it was given")
onnx.save(model, sys.argv[2])
"""


def export_onnx(model: NucleusNet, sizes: tuple[int, ...], path: Path) -> None:
    """Write the network as ONNX with a dynamic batch, and a dynamic tile side where there are several.

    A runtime fixes the side when it loads the graph, and then runs it as fast as one that was written so.

    Args:
        model: merged, in eval mode, on the CPU.
        sizes: sides of the tiles, px; of several all are multiples of `WINDOW`.
        path: where to write.
    """
    # With an example batch of 1 the exporter would take N = 1 for a constant.
    example = torch.zeros(2, sizes[-1], sizes[-1], 3, dtype=torch.uint8)
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=1024)}
    if len(sizes) > 1:
        windows = torch.export.Dim("windows", min=2, max=128)
        dynamic |= {1: WINDOW * windows, 2: WINDOW * windows}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        torch.onnx.export(
            model,
            (example,),
            path,
            input_names=["image"],
            output_names=["maps"],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes={"images": dynamic},
            external_data=False,
            verbose=False,
        )
    written = onnx.load(path)
    cast_first(written.graph)
    if len(sizes) > 1:  # the name by which runtimes fix height and width
        for side in written.graph.input[0].type.tensor_type.shape.dim[1:3]:
            side.dim_param = SIZE_DIMENSION
    onnx.save(written, path)
    check_graph(path)


def cast_first(graph: onnx.GraphProto) -> None:
    """Let everything that reads the uint8 input read its Cast to float instead: TensorRT takes uint8 nowhere else, not
    even where only its shape is asked for (NVIDIA/TensorRT#3985).

    Raises:
        ModelError: there is no such Cast, so this version of torch writes another graph.
    """
    image = graph.input[0].name
    cast = next((node for node in graph.node if node.op_type == "Cast" and image in node.input), None)
    if cast is None:
        raise ModelError(
            f"the graph by torch {torch.__version__} casts its input nowhere; take another version of torch"
        )
    graph.node.remove(cast)
    for node in graph.node:
        node.input[:] = [cast.output[0] if name == image else name for name in node.input]
    graph.node.insert(0, cast)


def simplify(source: Path, target: Path) -> str | None:
    """Fold constants with onnxsim in a process of its own.

    Returns:
        None when `target` was written, else why the graph stays as it was.
    """
    command = [sys.executable, "-c", _SIMPLIFY, str(source), str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SIMPLIFY_SECONDS)
    except subprocess.TimeoutExpired:
        return f"onnxsim took more than {SIMPLIFY_SECONDS} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return f"onnxsim ended with {done.returncode}: {lines[-1] if lines else 'no message'}"
    try:
        check_graph(target)
    except ModelError as error:
        target.unlink()
        return f"onnxsim's graph is refused: {error}"
    return None


def check_graph(path: Path) -> None:
    """Full check with shape inference, standard operators only, and an input that is cast before anything else.

    Raises:
        ModelError: the graph is invalid, or has what TensorRT does not take.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"`{path}`: no valid graph ({first_line(error)}); export the model again") from error
    graph = onnx.load(path).graph
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in graph.node if n.domain not in ("", "ai.onnx")})
    if foreign:
        raise ModelError(f"`{path}`: operators outside the standard domain: {', '.join(foreign)}")
    others = sorted({n.op_type for n in graph.node if graph.input[0].name in n.input} - {"Cast"})
    if others:
        raise ModelError(f"`{path}`: its uint8 input goes into {', '.join(others)}; TensorRT takes it by Cast only")


def store_weights_fp16(source: Path, target: Path, least: int = 256) -> None:
    """Keep large weights as fp16 with a Cast to fp32 behind them: half the file, the same arithmetic.

    ONNX Runtime folds the casts when it loads. What changes is the rounding of the weights; parity measures it.

    Args:
        source: a graph with fp32 weights.
        target: where to write.
        least: weights of fewer elements stay as they are.
    """
    model = onnx.load(source)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= least:
            name = tensor.name
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.fp16"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)
    check_graph(target)


def add_metadata(path: Path, **entries: str) -> None:
    """Put key-value pairs into the graph's metadata, replacing what stands under the same keys."""
    model = onnx.load(path)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    del model.metadata_props[:]
    helper.set_model_props(model, {**kept, **entries})
    onnx.save(model, path)


def describe_graph(path: Path) -> dict[str, float]:
    """Operators, parameters and megabytes of a graph, for the table that the command prints."""
    model = onnx.load(path)
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    return {
        "operators": len(model.graph.node),
        "parameters": sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type in floats),
        "megabytes": round(path.stat().st_size / 1e6, 2),
    }

"""What a tile takes of multiplications, and how many this machine can do."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

MATRIX = 2048


def multiplications(model: Path | None, size: int) -> int:
    """Multiply-adds of matrix products and convolutions for one tile of a size, from the graph's shapes."""
    import onnx
    import onnxsim
    from onnx import numpy_helper

    from nsam.runtime.engines import DEFAULT_MODEL

    # With its shapes fixed, onnxsim computes what depends on them, so that each node's can be told.
    fixed = {"image": [1, size, size, 3]}
    graph, _ = onnxsim.simplify(
        onnx.load((model or DEFAULT_MODEL) / "model.onnx"), check_n=0, overwrite_input_shapes=fixed
    )
    graph = onnx.shape_inference.infer_shapes(graph, data_prop=True)
    values = [*graph.graph.value_info, *graph.graph.output, *graph.graph.input]
    shapes = {v.name: [max(1, d.dim_value) for d in v.type.tensor_type.shape.dim] for v in values}
    shapes |= {t.name: list(numpy_helper.to_array(t).shape) for t in graph.graph.initializer}
    total = 0
    for node in graph.graph.node:
        if node.op_type not in ("Gemm", "MatMul", "Conv", "ConvTranspose"):
            continue
        attributes = {a.name: a for a in node.attribute}
        a, b, out = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
        if node.op_type == "Conv":
            each = math.prod(b[1:])
        elif node.op_type == "ConvTranspose":
            out, each = a, math.prod(b[1:])
        else:
            each = a[-2] if "transA" in attributes and attributes["transA"].i else a[-1]
        total += math.prod(out) * each
    return total


def matrix_rate(threads: int | None) -> float:
    """GFLOP/s of a large fp32 matrix product on the same threads: what this machine can do."""
    count = str(threads or os.cpu_count() or 1)
    code = (
        f"import numpy as np, time; a = np.ones(({MATRIX}, {MATRIX}), np.float32); best = 9e9\n"
        "for _ in range(12):\n b = time.perf_counter(); a @ a; best = min(best, time.perf_counter() - b)\n"
        f"print(2 * {MATRIX} ** 3 / best / 1e9)"
    )
    env = {**os.environ, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout)

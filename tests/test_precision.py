"""Graphs of other precisions: every tensor typed, what must stay fp32 stays, and the proof really rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from nsam.export import int8, variants
from nsam.export.graph import check_graph
from nsam.export.precision import Kept, keep_list, rounded, rounded_to_bf16, to_fp16
from nsam.export.ranges import activation_ranges
from nsam.runtime.errors import ModelError


def run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    result: np.ndarray = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    return result


def write_graph(path: Path, nodes: list[onnx.NodeProto], width: int, **weights: np.ndarray) -> Path:
    """A graph image (n, 3) uint8 -> maps (n, width) float32."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 3])],
        [helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture
def add_and_take(tmp_path: Path) -> Path:
    """image -> float -> x 1.3 -> + 2048 -> - 2048: in fp16 only even numbers are left of it."""
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "factor"], ["scaled"], "mul"),
        helper.make_node("Add", ["scaled", "big"], ["sum"], "add"),
        helper.make_node("Sub", ["sum", "big"], ["maps"], "sub"),
    ]
    factor, big = np.array([1.3], np.float32), np.array([2048], np.float32)
    return write_graph(tmp_path / "plain.onnx", nodes, 3, factor=factor, big=big)


IMAGE = np.array([[1, 2, 3]], np.uint8)


def test_the_proof_rounds_where_onnx_runtime_would_not(add_and_take: Path, tmp_path: Path) -> None:
    to_fp16(add_and_take, tmp_path / "half.onnx", [])
    check_graph(tmp_path / "half.onnx")
    rounded(tmp_path / "half.onnx", tmp_path / "rounded.onnx")
    exact = np.float16(1.3) * IMAGE.astype(np.float16) + np.float16(2048) - np.float16(2048)
    np.testing.assert_array_equal(exact, [[2, 2, 4]])
    np.testing.assert_array_equal(run(tmp_path / "rounded.onnx", image=IMAGE), exact)
    assert np.abs(run(tmp_path / "half.onnx", image=IMAGE) - exact).max() > 0.1, "then `rounded` has lost its reason"


def test_bf16_is_rounded_as_torch_rounds_it(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(0, 1, (3, 5)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], "cast", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "weights"], ["product"], "product"),
        helper.make_node("Mul", ["product", "product"], ["maps"], "square"),
    ]
    write_graph(tmp_path / "plain.onnx", nodes, 5, weights=weights)
    rounded_to_bf16(tmp_path / "plain.onnx", tmp_path / "rounded.onnx")

    def short(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float()

    product = short(torch.from_numpy(IMAGE).float() @ short(torch.from_numpy(weights)))
    np.testing.assert_array_equal(run(tmp_path / "rounded.onnx", image=IMAGE), short(product * product).numpy())
    assert np.abs(run(tmp_path / "plain.onnx", image=IMAGE) - short(product * product).numpy()).max() > 0.01


def test_kept_nodes_stay_fp32(add_and_take: Path, tmp_path: Path) -> None:
    kept = [Kept("add", "Add", "test"), Kept("sub", "Sub", "test")]
    to_fp16(add_and_take, tmp_path / "half.onnx", kept)
    rounded(tmp_path / "half.onnx", tmp_path / "rounded.onnx")
    np.testing.assert_allclose(run(tmp_path / "rounded.onnx", image=IMAGE), [[1.3, 2.6, 3.9]], atol=2e-3)


def test_ranges_decide(add_and_take: Path) -> None:
    tiles = np.array([[1, 2, 3], [250, 0, 9]], np.uint8)
    ranges = activation_ranges(add_and_take, tiles)
    assert ranges["scaled"] == pytest.approx((0, 325))
    assert ranges["sum"] == pytest.approx((2048, 2373))
    assert keep_list(add_and_take, ranges) == []
    ranges["sum"] = (0.0, 9000.0)
    assert [kept.node for kept in keep_list(add_and_take, ranges)] == ["add", "sub"]
    model = onnx.load(add_and_take)
    model.graph.node[2].op_type = "MatMul"
    onnx.save(model, add_and_take)
    assert [kept.node for kept in keep_list(add_and_take, ranges)] == ["sub"]
    ranges["sum"] = (-40_000.0, 0.0)
    with pytest.raises(ModelError, match="MatMul `add` reaches 40000, fp16 ends at 65504"):
        keep_list(add_and_take, ranges)


def test_a_weight_beyond_fp16_is_refused(add_and_take: Path, tmp_path: Path) -> None:
    model = onnx.load(add_and_take)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array([1e5], np.float32), "big"))
    onnx.save(model, add_and_take)
    with pytest.raises(ModelError, match="weight `big` reaches 100000"):
        to_fp16(add_and_take, tmp_path / "half.onnx", [])


def test_the_network_in_fp16(default_model: Path, tmp_path: Path) -> None:
    """Turing builds matrix products in fp16 only, and norms and softmax would overflow in it."""
    ranges = dict.fromkeys((n for node in onnx.load(default_model).graph.node for n in node.output), (-1.0, 1.0))
    to_fp16(default_model, tmp_path / "half.onnx", keep_list(default_model, ranges))
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half.onnx"), strict_mode=True, data_prop=True)
    graph = model.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        seen = {kinds[name] for name in (*node.input, *node.output) if name}
        if node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"):
            assert seen == {TensorProto.FLOAT16}, node.name
        elif node.op_type in ("LayerNormalization", "Softmax"):
            assert seen == {TensorProto.FLOAT}, node.name
        elif node.op_type != "Cast":
            assert not {TensorProto.FLOAT, TensorProto.FLOAT16} <= seen, node.name
    assert kinds["image"] == TensorProto.UINT8
    assert kinds["maps"] == TensorProto.FLOAT


@pytest.fixture(scope="module")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's graph with its weights back in fp32."""
    import nsam.runtime

    model = onnx.load(Path(nsam.runtime.__file__).parent / "default_model" / "model.onnx")
    graph = model.graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == 10}
    nodes = []
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in stored:
            value = stored[node.input[0]].astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        else:
            nodes.append(node)
    kept = [tensor for tensor in graph.initializer if tensor.name not in stored]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    onnx.save(model, path)
    return path


FP32 = {"INFERENCE_PRECISION_HINT": "f32"}


def test_int8_runs_in_both_engines(
    default_model: Path, example: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "GROUP", 50)
    tiles = example[None, :448, :448]  # tissue: on noise any rounding is made large
    ranges = activation_ranges(default_model, tiles)
    names = [name for group in int8.groups(default_model) for name in group]
    int8.quantise(default_model, tmp_path / "int8.onnx", ranges, names[:50])
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert kinds.count("DequantizeLinear") > 50
    exact, quantised = (run(path, image=tiles) for path in (default_model, tmp_path / "int8.onnx"))
    assert 1e-4 < np.abs(exact - quantised).mean() < 0.5
    openvino = pytest.importorskip("openvino")
    int8.quantise(default_model, tmp_path / "int8.onnx", ranges, names)
    quantised, other = (
        run(tmp_path / "int8.onnx", image=tiles),
        # What is not quantised runs in fp32, as in ONNX Runtime: bf16 would add an error of another kind.
        openvino.Core().compile_model(str(tmp_path / "int8.onnx"), "CPU", FP32)([tiles])[0],
    )
    assert np.abs(quantised - other).mean() < np.abs(exact - quantised).mean(), "each engine has an error of its own"


def test_the_most_sensitive_parts_are_left_out_first() -> None:
    ranked = [(3.0, ["a"]), (2.0, ["b", "c"]), (1.0, ["d"])]
    assert list(int8.candidates(ranked)) == [(0, ["a", "b", "c", "d"]), (1, ["b", "c", "d"]), (2, ["d"])]


def test_speed_is_a_ratio() -> None:
    import time

    class Sleeper:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def run(self, images: np.ndarray) -> None:
            time.sleep(self.seconds)

    assert variants.speed_ratio(Sleeper(0.02), Sleeper(0.01), IMAGE, rounds=3) == pytest.approx(2, rel=0.3)  # type: ignore[arg-type]

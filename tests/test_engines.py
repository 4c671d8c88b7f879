"""Engines: a model that does not fit its card is refused, and the device is what it says."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nsam.runtime import engines
from nsam.runtime.bysize import BySize
from nsam.runtime.card import FileEntry, InputSpec, ModelCard, OutputSpec, PostSpec, sha256_of
from nsam.runtime.engines import Engine, load
from nsam.runtime.errors import DeviceError, ModelError
from nsam.runtime.settings import Device


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change_card(model: Path, **changes: Any) -> None:
    card = dataclasses.replace(ModelCard.read(model), **changes)
    (model / "card.json").write_text(card.to_json(), encoding="utf-8")


@pytest.mark.parametrize("batch", [1, 3])
def test_run(tiny_model: Path, batch: int) -> None:
    images = np.full((batch, 64, 64, 3), 255, np.uint8)
    images[-1, 10:20, 30:40] = 60
    maps = load(tiny_model, "cpu").run(images)
    assert maps.shape == (batch, 2, 32, 32)
    assert maps.dtype == np.float32
    dark = maps[:, 0] > 0
    assert dark.sum() == 25
    assert dark[-1, 5:10, 15:20].all()


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_streams_give_the_same_bits_in_the_same_order(tiny_model: Path, device: Device) -> None:
    if device == "openvino":
        pytest.importorskip("openvino")
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (n, 64, 64, 3), np.uint8) for n in (1, 3, 1, 2, 1, 1)]
    engine = load(tiny_model, device, threads=2)
    for count in (0, 1, len(batches)):
        results = list(engine.run_all(batches[:count]))
        assert len(results) == count
        for images, maps in zip(batches, results, strict=False):
            assert np.array_equal(maps, engine.run(images))


class Meeting(Engine):
    """Comes back only when as many runs as it has streams are in it; one run in three fails, if wanted."""

    precision, device = "fp32", "test"

    def __init__(self, size: int, streams: int, fails: bool = False) -> None:
        self.card = ModelCard("test", "1", "Apache-2.0")
        self.fails = fails
        self.barrier = threading.Barrier(streams, timeout=1)

    def run(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.barrier.wait()
        if self.fails and images[0, 0, 0, 0] == 2:
            raise DeviceError("no memory")
        return images.astype(np.float32)


def test_as_many_tiles_at_once_as_there_are_streams() -> None:
    batches = [np.full((1, 64, 64, 3), i, np.uint8) for i in range(9)]
    engine = BySize(Meeting, 64, streams=3)
    assert [int(maps.flat[0]) for maps in engine.run_all(batches)] == list(range(9))
    assert len(list(engine.run_all(batches[:1]))) == 1  # a single one does not wait for company


@pytest.mark.parametrize("keep", [False, True])
def test_many_tiles_leave_no_other_engine_in_memory(keep: bool) -> None:
    made: list[Any] = []

    def make(size: int, streams: int) -> Meeting:
        engine = Meeting(size, streams)
        made.append(weakref.ref(engine))
        return engine

    engine = BySize(make, 64, streams=2, keep=keep)
    for size in (96, 128):
        engine.run(np.zeros((1, size, size, 3), np.uint8))
    list(engine.run_all([np.zeros((1, 96, 96, 3), np.uint8)] * 2))
    assert len(made) == 4
    assert [ref() is not None for ref in made] == [keep, keep, keep, True]


def test_a_batch_that_fails_in_a_stream_is_told_in_its_place() -> None:
    batches = [np.full((1, 64, 64, 3), i, np.uint8) for i in range(6)]
    results = BySize(partial(Meeting, fails=True), 64, streams=2).run_all(batches)
    assert [next(results).flat[0], next(results).flat[0]] == [0, 1]
    with pytest.raises(DeviceError, match="no memory"):
        next(results)


@pytest.mark.parametrize(
    ("part", "change", "field"),
    [
        (InputSpec(sizes=(64,)), {"multiple_of": 0}, "input.multiple_of"),
        (PostSpec(tile_halo_px=8), {"nucleus_threshold": 2.0}, "post.nucleus_threshold"),
        (PostSpec(tile_halo_px=8), {"min_area_um2": float("nan")}, "post.min_area_um2"),
        (PostSpec(tile_halo_px=8), {"smooth_um": -1.0}, "post.smooth_um"),
        (PostSpec(tile_halo_px=8), {"block_halo_um": float("inf")}, "post.block_halo_um"),
    ],
)
def test_values_that_no_slide_could_be_run_with(part: Any, change: dict[str, Any], field: str) -> None:
    specs: dict[str, Any] = {"input": InputSpec(sizes=(64,)), "post": PostSpec(tile_halo_px=8)}
    specs[field.split(".")[0]] = dataclasses.replace(part, **change)
    with pytest.raises(ModelError, match=field):
        ModelCard("m", "1", "MIT", **specs)


def test_device_is_what_runs(tiny_model: Path) -> None:
    engine = load(tiny_model, "cpu", threads=2)
    assert engine.device.startswith("cpu fp32 (ONNX Runtime 1.")
    assert engine.device.endswith(", 2 threads)")


def without_gpu() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" not in onnxruntime.get_available_providers()


@pytest.mark.skipif(not without_gpu(), reason="this onnxruntime has CUDA")
def test_missing_gpu_is_an_error_or_a_reason(tiny_model: Path) -> None:
    with pytest.raises(DeviceError, match=r"`cuda` cannot be had: .*nsam\[gpu\]"):
        load(tiny_model, "cuda")
    with pytest.raises(DeviceError, match="`tensorrt` cannot be had"):
        load(tiny_model, "tensorrt")
    assert "`cuda` cannot be had" in load(tiny_model, "auto").device
    with pytest.raises(DeviceError, match=r"`cuda` does not run int8; .*on openvino.*on cpu"):
        load(tiny_model, "auto", precision="int8")
    with pytest.raises(DeviceError, match="`gpu`: no device; give auto, cpu, "):
        load(tiny_model, "gpu")  # type: ignore[arg-type]


def test_provider_that_falls_back_is_noticed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU build without a working driver lists CUDA as available, and then runs on the CPU."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(DeviceError, match="did not start"),
    ):
        load(tiny_model, "cuda")


def test_missing_onnxruntime(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match=r"pip install 'nsam\[cpu\]'"):
        load(tiny_model, "cpu")


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8)]
)
def test_cores_of_the_container(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(engines.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: quota)
    assert engines.available_cores() == cores


def test_folder_without_card(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nsam-export"):
        load(tmp_path)


def test_changed_file(model: Path) -> None:
    with (model / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ModelError, match="sha256"):
        load(model)


def test_file_that_is_no_graph(model: Path) -> None:
    (model / "model.onnx").write_bytes(b"no graph")
    change_card(model, files={"model.onnx": FileEntry(sha256_of(model / "model.onnx"), "fp32")})
    with pytest.raises(ModelError, match="ONNX Runtime cannot load it"):
        load(model, "cpu")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"post": PostSpec(tile_halo_px=8, nucleus_threshold=0.4)}, "post.nucleus_threshold"),
        ({"input": InputSpec(sizes=(64,), mpp=0.5)}, "input.mpp"),
        ({"output": OutputSpec(kinds=("logit", "other"))}, "output.kinds"),
        ({"input": InputSpec(sizes=(96,), mpp=0.25)}, "`input`"),
        ({"output": OutputSpec(channels=("nucleus",), kinds=("logit",))}, "`output`"),
        ({"output": OutputSpec(stride=4)}, "`output`"),
    ],
)
def test_tampered_card_is_refused_by_field(model: Path, change: dict[str, Any], field: str) -> None:
    change_card(model, **change)
    with pytest.raises(ModelError, match=field):
        load(model, "cpu")


def test_graph_without_card(model: Path) -> None:
    spoil(model, lambda graph: graph.metadata_props.pop())
    with pytest.raises(ModelError, match="nsam_card"):
        load(model, "cpu")


def test_fixed_batch_is_refused(model: Path) -> None:
    def fix(graph: Any) -> None:
        graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2

    spoil(model, fix)
    with pytest.raises(ModelError, match="fixed batch of 2"):
        load(model, "cpu")


def spoil(model: Path, change: Callable[[Any], object]) -> None:
    """Change the graph, and the card with it."""
    import onnx

    graph = onnx.load(model / "model.onnx")
    change(graph)
    onnx.save(graph, model / "model.onnx")
    change_card(model, files={"model.onnx": FileEntry(sha256_of(model / "model.onnx"), "fp32")})


@pytest.fixture(scope="module")
def in_sizes(make_tiny_model: Callable[[Path, ModelCard], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes tiles of 64 and of 96 px."""
    card = ModelCard("tiny", "1", "Apache-2.0", input=InputSpec(sizes=(64, 96)), post=PostSpec(tile_halo_px=8))
    return make_tiny_model(tmp_path_factory.mktemp("in_sizes"), card)


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_each_size_of_tile(in_sizes: Path, device: str) -> None:
    pytest.importorskip({"cpu": "onnxruntime"}.get(device, device))
    engine = load(in_sizes, device, precision="fp32")  # type: ignore[arg-type]
    large = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8)
    maps = engine.run(large)
    assert maps.shape == (2, 2, 48, 48)
    np.testing.assert_allclose(engine.run(large[:, :64, :64]), maps[:, :, :32, :32], atol=1e-4)


def test_a_graph_of_one_size_under_a_card_of_two(model: Path) -> None:
    change_card(model, input=InputSpec(sizes=(64, 96)))
    with pytest.raises(ModelError, match=r"input\.sizes"):
        load(model, "cpu")


@pytest.mark.parametrize("sizes", [(), (96, 64), (64, 64), (50,)])
def test_sizes_of_a_card(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="must be multiples of 16, ascending"):
        ModelCard("tiny", "1", "Apache-2.0", input=InputSpec(sizes=sizes))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_sessions_of_all_sizes_share_their_memory() -> None:
    """Where each had an arena of its own these three took 1.5 GB."""
    pytest.importorskip("onnxruntime")
    code = """
import numpy
from nsam.runtime.engines import load
engine = load(device="cpu", threads=2)
for size in engine.card.input.sizes[-3:]:
    engine.run(numpy.zeros((1, size, size, 3), numpy.uint8))
# Not getrusage: its peak is that of the process that started this one, too.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000_000  # kB


def images_of(n: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (n, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("n", [1, 3])
def test_openvino_equals_onnx_runtime(tiny_model: Path, n: int) -> None:
    pytest.importorskip("openvino")
    engine = load(tiny_model, "openvino", threads=1, precision="fp32")
    assert engine.device.startswith("openvino fp32 (OpenVINO 20")
    first = engine.run(images_of(n))
    np.testing.assert_allclose(first, load(tiny_model, "cpu").run(images_of(n)), atol=1e-4)
    kept = first.copy()
    engine.run(np.zeros((n, 64, 64, 3), np.uint8))
    np.testing.assert_array_equal(first, kept, "the next call must not write into the last one's maps")


def test_openvino_s_empty_answer_is_no_answer(tiny_model: Path) -> None:
    """So it ends where memory is short."""
    pytest.importorskip("openvino")
    from nsam.runtime.openvino_engine import OpenvinoEngine

    engine = OpenvinoEngine(
        tiny_model / "model.onnx", ModelCard.read(tiny_model), "openvino", "fp32", threads=1, size=64, streams=1
    )
    engine._idle.get()
    engine._idle.put(SimpleNamespace(infer=lambda images: [np.empty((0, 2, 32, 32), np.float32)]))
    with pytest.raises(DeviceError, match=r"a batch of 3 failed \(it gave 0 maps\); try a smaller one"):
        engine.run(images_of(3))


def test_openvino_tells_nobody_that_it_is_imported(tiny_model: Path) -> None:
    """The telemetry package that comes with it would write to Google Analytics at the import."""
    pytest.importorskip("openvino")
    code = "import sys; from pathlib import Path; from nsam.runtime.engines import load; "
    code += "load(Path(sys.argv[1]), 'openvino', precision='fp32'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tiny_model)], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "openvino" in modules
    assert "openvino_telemetry.main" not in modules


def test_openvino_checks_the_card_too(model: Path) -> None:
    pytest.importorskip("openvino")
    change_card(model, post=PostSpec(tile_halo_px=8, nucleus_threshold=0.4))
    with pytest.raises(ModelError, match=r"post\.nucleus_threshold"):
        load(model, "openvino")
    change_card(model, output=OutputSpec(stride=4))
    with pytest.raises(ModelError, match="`output`"):
        load(model, "openvino")


def test_a_cpu_without_bf16_gets_fp32(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr(openvino.Core, "get_property", lambda core, device, name: ["FP32"])
    assert load(tiny_model, "openvino").device.startswith("openvino fp32")
    with pytest.raises(DeviceError, match="this CPU has no bf16"):
        load(tiny_model, "openvino", precision="bf16")


def test_auto_takes_openvino_before_the_cpu(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    if without_gpu():
        assert load(tiny_model).device.startswith("openvino ")
    monkeypatch.setitem(sys.modules, "openvino", None)
    device = load(tiny_model).device
    if without_gpu():
        assert device.startswith("cpu ")
        assert "`openvino` is not installed; pip install 'nsam[openvino]'" in device


def test_precision_chooses_the_file(model: Path) -> None:
    with pytest.raises(DeviceError, match=r"`.*model`: has no int8; on cpu --precision may be fp32$"):
        load(model, "cpu", precision="int8")
    with pytest.raises(DeviceError, match=r"`cpu` does not run bf16; --precision may be fp32$"):
        load(model, "cpu", precision="bf16")
    assert load(model, "cpu").device.startswith("cpu fp32 ")
    shutil.copy(model / "model.onnx", model / "model.int8.onnx")
    entry = FileEntry(sha256_of(model / "model.onnx"), "int8")
    change_card(model, files={**ModelCard.read(model).files, "model.int8.onnx": entry})
    assert load(model, "cpu").device.startswith("cpu fp32 "), "int8 was not proven"
    change_card(model, proven=("fp32", "int8"))
    assert load(model, "cpu").device.startswith("cpu int8 ")
    assert load(model, "cpu", precision="fp32").device.startswith("cpu fp32 ")
    pytest.importorskip("openvino")
    assert load(model, "openvino").device.startswith("openvino int8 ")


def test_a_model_that_failed_its_proof_says_so(model: Path) -> None:
    change_card(model, failed_links=("simplified -> fp16",))
    assert "parity failed at simplified -> fp16 when the model was made" in load(model, "cpu").device

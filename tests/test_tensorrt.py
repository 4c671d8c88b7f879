"""TensorRT's engine against strict stand-ins for the APIs of 10 and 11; the real package where it is installed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import Memory, make_cuda, make_tensorrt

from nsam.runtime import engines, tensorrt_engine
from nsam.runtime.card import FileEntry, ModelCard
from nsam.runtime.engines import load
from nsam.runtime.errors import DeviceError, not_imported


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def install(monkeypatch: pytest.MonkeyPatch, version: str = "10.9.0", **cuda: Any) -> None:
    memory = Memory()
    made = (make_tensorrt(version, memory), make_cuda(memory, **cuda))
    monkeypatch.setattr(tensorrt_engine, "_libraries", lambda: made)
    monkeypatch.setattr(engines, "_has_tensorrt", lambda: True)


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graph of each engine that is built from now on."""
    built: list[str] = []
    build = tensorrt_engine.build_plan

    def counted(path: Path, *arguments: Any) -> tuple[bytes, bytes]:
        built.append(path.name)
        return build(path, *arguments)

    monkeypatch.setattr(tensorrt_engine, "build_plan", counted)
    return built


@pytest.mark.parametrize("version", ["10.9.0", "11.0.1"])
def test_runs_like_onnx_runtime(model: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, version)
    engine = load(model, "tensorrt")
    assert engine.device == f"tensorrt fp32 (TensorRT {version}, Tesla T4)"
    images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    expected = load(model, "cpu").run(images)
    for n in (1, 3, 20):  # 20: more than an engine takes at once
        np.testing.assert_array_equal(engine.run(images[:n]), expected[:n])


def test_an_engine_is_built_once_for_each_gpu_and_version(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = count_builds(monkeypatch)
    for expected, version, sm in ((1, "10.9.0", (7, 5)), (1, "10.9.0", (7, 5)), (2, "11.0.1", (7, 5))):
        install(monkeypatch, version, sm=sm)
        load(model, "tensorrt")
        assert len(built) == expected
    install(monkeypatch, "11.0.1", sm=(8, 9))
    load(model, "tensorrt")
    assert sorted(path.name for path in model.glob("*.plan")) == [
        "model.sm75-trt10.9.0-b16-64.plan",
        "model.sm75-trt11.0.1-b16-64.plan",
        "model.sm89-trt11.0.1-b16-64.plan",
    ]
    plan = model / "model.sm89-trt11.0.1-b16-64.plan"
    plan.write_bytes(plan.read_bytes()[:-1])  # cut, or changed
    load(model, "tensorrt")
    assert len(built) == 4
    about = json.loads(Path(f"{plan}.json").read_text())
    about["graph_sha256"] = "that of an older export"
    Path(f"{plan}.json").write_text(json.dumps(about))
    load(model, "tensorrt")
    assert len(built) == 5
    install(monkeypatch, "11.0.1", sm=(8, 9), name=b"L4")
    load(model, "tensorrt")
    assert len(built) == 6, "another card of the same generation"


def test_each_precision_keeps_its_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    built = count_builds(monkeypatch)
    shutil.copy(model / "model.onnx", model / "model.fp16.onnx")
    card = ModelCard.read(model)
    files = {**card.files, "model.fp16.onnx": FileEntry(card.files["model.onnx"].sha256, "fp16")}
    (model / "card.json").write_text(replace(card, files=files, proven=("fp32", "fp16")).to_json())
    for precision in ("fp16", "fp32", "fp16", "fp32"):
        assert load(model, "tensorrt", precision=precision).device.startswith(f"tensorrt {precision} ")
    assert built == ["model.fp16.onnx", "model.onnx"]


def test_tensorrt_takes_what_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real graph; the stand-in refuses one whose uint8 input goes elsewhere than into a Cast."""
    install(monkeypatch)
    trt, _ = tensorrt_engine._libraries()
    assert tensorrt_engine.build_plan(engines.DEFAULT_MODEL / "model.onnx", 448, [1, 8, 16], trt, b"")[0]
    graph = onnx.load(engines.DEFAULT_MODEL / "model.onnx")
    graph.graph.node.append(onnx.helper.make_node("Shape", ["image"], ["shape"]))
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(DeviceError, match="cannot read it"):
        tensorrt_engine.build_plan(tmp_path / "model.onnx", 448, [1, 8, 16], trt, b"")


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(monkeypatch)
    built = count_builds(monkeypatch)
    write = Path.write_bytes

    def refuse(path: Path, content: bytes) -> int:
        if path.parent == model:
            raise OSError(30, "Read-only file system")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    load(model, "tensorrt")
    assert len(list((tmp_path / "cache").rglob("*.plan"))) == 1
    assert not list(model.glob("*.plan"))
    load(model, "tensorrt")
    assert len(built) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    load(model, "tensorrt")
    assert len(built) == 2, "nowhere to keep it, but it runs"


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_what_fails_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, status=100)
    with pytest.raises(DeviceError, match="CUDA says no CUDA-capable device"):
        load(model, "tensorrt")
    install(monkeypatch)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"unparsable")
    with pytest.raises(DeviceError, match="cannot read it \\(error 0; error 1\\)"):
        load(model, "tensorrt")


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_missing_package_is_named() -> None:
    with pytest.raises(DeviceError, match=r"tensorrt is not installed; pip install 'nsam\[tensorrt\]'"):
        tensorrt_engine._libraries()


def test_a_broken_package_is_not_called_missing() -> None:
    error = ImportError("libnvinfer.so.10: cannot open shared object file")
    assert not_imported("tensorrt", error) == "tensorrt is broken (libnvinfer.so.10: cannot open shared object file)"


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("tensorrt") is None, reason="tensorrt is not installed: its real API is not tried here")
def test_real_tensorrt(model: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    np.testing.assert_allclose(load(model, "tensorrt").run(images), load(model, "cpu").run(images), atol=1e-2)

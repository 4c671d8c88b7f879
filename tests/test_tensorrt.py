"""TensorRT's engine against strict stand-ins for the APIs of 10 and 11; the real package where it is installed."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import Memory, make_cuda, make_tensorrt

from nsam.runtime import engines, tensorrt_engine
from nsam.runtime.engines import load
from nsam.runtime.errors import DeviceError


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def install(monkeypatch: pytest.MonkeyPatch, version: str = "10.9.0", **cuda: Any) -> None:
    memory = Memory()
    made = (make_tensorrt(version, memory), make_cuda(memory, **cuda))
    monkeypatch.setattr(tensorrt_engine, "_libraries", lambda: made)
    monkeypatch.setattr(engines, "_has_tensorrt", lambda: True)


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
    built: list[str] = []
    build = tensorrt_engine.build_plan

    def counted(*arguments: Any) -> bytes:
        built.append("x")
        return build(*arguments)

    monkeypatch.setattr(tensorrt_engine, "build_plan", counted)
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


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(monkeypatch)
    write = Path.write_bytes

    def refuse(path: Path, content: bytes) -> int:
        if path.parent == model:
            raise OSError(30, "Read-only file system")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    load(model, "tensorrt")
    assert len(list((tmp_path / "cache").rglob("*.plan"))) == 1
    assert not list(model.glob("*.plan"))


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


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("tensorrt") is None, reason="tensorrt is not installed: its real API is not tried here")
def test_real_tensorrt(model: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    np.testing.assert_allclose(load(model, "tensorrt").run(images), load(model, "cpu").run(images), atol=1e-2)

"""Engines: a model that does not fit its card is refused, and the device is what it says."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsam.runtime import engines
from nsam.runtime.card import FileEntry, InputSpec, ModelCard, OutputSpec, PostSpec, sha256_of
from nsam.runtime.engines import load
from nsam.runtime.errors import DeviceError, ModelError


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
        ({"input": InputSpec(size=64, mpp=0.5)}, "input.mpp"),
        ({"output": OutputSpec(kinds=("logit", "other"))}, "output.kinds"),
        ({"input": InputSpec(size=96, mpp=0.25)}, "`input`"),
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

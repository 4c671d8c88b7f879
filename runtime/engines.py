"""Engines: the network on whatever runs it here, behind one face. ONNX Runtime, on CPU, CUDA or TensorRT."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.card import ModelCard
from nsam.runtime.errors import DeviceError, ModelError
from nsam.runtime.settings import Device
from nsam.runtime.tta import Averaged

_PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}


class Engine(Protocol):
    """A network that is ready to run."""

    card: ModelCard
    device: str  # what is really in use, e.g. "cpu (ONNX Runtime 1.20, 2 threads)"

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps of a batch of tiles.

        Args:
            images: (N, size, size, 3) uint8 RGB, `size` and scale as in `card.input`.

        Returns:
            (N, C, size / stride, size / stride) float32 as in `card.output`.

        Raises:
            DeviceError: the device failed, out of memory for instance.
        """


def load(model_dir: Path | None = None, device: Device = "auto", threads: int | None = None, tta: int = 1) -> Engine:
    """Load a model directory's `model.onnx`, after checking it against the card.

    Args:
        model_dir: a folder made by nsam-export; None: the model that comes with nsam.
        device: `auto` takes CUDA where it can be had, else the CPU; `Engine.device` then says why.
        threads: CPU threads; None: as many as `available_cores`.
        tta: views of each tile whose maps are averaged; see `tta.Averaged`.

    Raises:
        ModelError: card, file and graph do not fit together; the message names the field.
        DeviceError: ONNX Runtime is missing, or the device cannot be had.
    """
    model_dir = model_dir or Path(__file__).parent / "default_model"
    card = ModelCard.read(model_dir)
    path = card.verify_file(model_dir, "model.onnx")
    engine = _engine(path, card, device, threads or available_cores())
    return Averaged(engine, tta) if tta > 1 else engine


def _engine(path: Path, card: ModelCard, device: Device, threads: int) -> Engine:
    if device != "auto":
        return _OnnxEngine(path, card, device, threads)
    try:
        return _OnnxEngine(path, card, "cuda", threads)
    except DeviceError as error:
        return _OnnxEngine(path, card, "cpu", threads, f"; {error}")


def available_cores() -> int:
    """CPU cores that this process may use: its affinity and the container's quota (cgroup v2), at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


class _OnnxEngine(Engine):
    """`model.onnx` in an ONNX Runtime session."""

    def __init__(self, path: Path, card: ModelCard, device: str, threads: int, note: str = "") -> None:
        """Load and check; `note` is added to `device`. Raises as `load`."""
        self.card = card
        self._session = _session(path, device, threads)
        _check_graph(path, card, self._session)
        version = ".".join(_onnxruntime().__version__.split(".")[:2])
        cores = f", {threads} threads" if device == "cpu" else ""
        self.device = f"{device} (ONNX Runtime {version}{cores}{note})"

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            maps: NDArray[np.float32] = self._session.run(["maps"], {"image": images})[0]
        except Exception as error:  # ONNX Runtime's errors have no class in common
            raise DeviceError(
                f"{self.device}: a batch of {len(images)} failed ({_first_line(error)}); try a smaller one"
            ) from error
        return maps


def _onnxruntime() -> Any:
    # Imported late: a missing ONNX Runtime is told when it is needed, and costs nothing before.
    try:
        import onnxruntime
    except ImportError as error:
        raise DeviceError(
            "onnxruntime is not installed; pip install 'nsam[cpu]', or 'nsam[gpu]' for an NVIDIA GPU"
        ) from error
    return onnxruntime


def _session(path: Path, device: str, threads: int) -> Any:
    """A session that really has the device."""
    ort = _onnxruntime()
    providers = _PROVIDERS[device]
    if providers[0] not in ort.get_available_providers():
        raise DeviceError(
            f"`{device}` cannot be had: this onnxruntime has no {providers[0]}; "
            "nsam[gpu] brings one that has, in place of nsam[cpu]"
        )
    if device != "cpu" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from pip's packages
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin while they wait take the cores from reading and separating.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        # With its fallback ONNX Runtime goes on without the GPU, at loading as at any batch.
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors have no class in common
        if device == "cpu":
            raise ModelError(f"`{path}`: ONNX Runtime cannot load it ({_first_line(error)})") from error
        raise DeviceError(f"`{device}` cannot be had: {_first_line(error)}") from error
    if session.get_providers()[0] != providers[0]:
        raise DeviceError(
            f"`{device}` cannot be had: {providers[0]} did not start; check the driver and CUDA's libraries"
        )
    return session


def _check_graph(path: Path, card: ModelCard, session: Any) -> None:
    """Refuse a graph that is not what the card says."""
    size, stride = card.input.size, card.output.stride
    expected = {
        "input": ("image", "tensor(uint8)", (size, size, 3)),
        "output": ("maps", "tensor(float)", (len(card.output.channels), size // stride, size // stride)),
    }
    for side, tensors in (("input", session.get_inputs()), ("output", session.get_outputs())):
        found = [(tensor.name, tensor.type, tuple(tensor.shape[1:])) for tensor in tensors]
        if found != [expected[side]]:
            raise ModelError(f"`{path}`: by card field `{side}` the graph's is {expected[side]}, it has {found}")
        if isinstance(tensors[0].shape[0], int):
            raise ModelError(f"`{path}`: the graph's {side} takes a fixed batch of {tensors[0].shape[0]} only")
    embedded = session.get_modelmeta().custom_metadata_map.get("nsam_card")
    if embedded is None:
        raise ModelError(f"`{path}`: no `nsam_card` in its metadata; export the model again")
    inner = ModelCard.from_json(embedded, f"{path}:nsam_card")
    for part in ("input", "output", "post"):
        for field in dataclasses.fields(getattr(card, part)):
            beside, inside = (getattr(getattr(c, part), field.name) for c in (card, inner))
            if beside != inside:
                raise ModelError(
                    f"`{path}`: card field `{part}.{field.name}` is {beside} in card.json, "
                    f"{inside} in the file; export the model again"
                )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""ONNX Runtime, on CPU, CUDA or its TensorRT provider: the reference, and what runs everywhere."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.card import SIZE_DIMENSION, ModelCard
from nsam.runtime.engines import Engine, check_embedded, check_tensors
from nsam.runtime.errors import DeviceError, ModelError, first_line, not_imported
from nsam.runtime.interrupts import uninterrupted

_PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
_KINDS = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
#: Tiles of the size in which batches are told for which TensorRT's engine is built; more are refused by it.
_BATCHES = {"min": 1, "opt": 8, "max": 64}


class OnnxEngine(Engine):
    """A graph in an ONNX Runtime session."""

    def __init__(
        self, path: Path, card: ModelCard, device: str, precision: str, threads: int, size: int, streams: int
    ) -> None:
        """Load for tiles of a size, and check.

        Raises:
            ModelError: the graph cannot be loaded or does not fit the card.
            DeviceError: ONNX Runtime is missing, or has not this device.
        """
        self.card = card
        self.precision = precision
        self._session = _session(path, card, device, threads, size)
        sides = (
            [(t.name, _KINDS.get(t.type, t.type), _shape(t.shape)) for t in tensors]
            for tensors in (self._session.get_inputs(), self._session.get_outputs())
        )
        check_tensors(path, card, size, *sides)
        check_embedded(path, card, self._session.get_modelmeta().custom_metadata_map.get("nsam_card"))
        version = ".".join(_onnxruntime(device).__version__.split(".")[:2])
        cores = f", {threads} threads" if device == "cpu" else ""
        self.device = f"{device} {precision} (ONNX Runtime {version}{cores})"

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Engine.run`."""
        try:
            maps: NDArray[np.float32] = self._session.run(["maps"], {"image": images})[0]
        except Exception as error:  # ONNX Runtime's errors have no class in common
            raise DeviceError(
                f"{self.device}: a batch of {len(images)} failed ({first_line(error)}); try a smaller one"
            ) from error
        return maps


def _onnxruntime(device: str) -> Any:
    # Imported late: a missing ONNX Runtime is told when it is needed, and costs nothing before.
    try:
        with uninterrupted():
            import onnxruntime
    except ImportError as error:
        raise DeviceError(
            f"`{device}` cannot be had: {not_imported('onnxruntime', error)}; "
            "pip install 'nsam[cpu]', or 'nsam[gpu]' for an NVIDIA GPU"
        ) from error
    return onnxruntime


def _session(path: Path, card: ModelCard, device: str, threads: int, size: int) -> Any:
    """A session that really has the device."""
    ort = _onnxruntime(device)
    providers: list[Any] = list(_PROVIDERS[device])
    first = providers[0]
    if first not in ort.get_available_providers():
        raise DeviceError(
            f"`{device}` cannot be had: this onnxruntime has no {first}; "
            "nsam[gpu] brings one that has, in place of nsam[cpu]"
        )
    if device != "cpu" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from pip's packages
    if device == "tensorrt":
        providers[0] = (first, _tensorrt_options(path, card, size))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_free_dimension_override_by_name(SIZE_DIMENSION, size)
    # Threads that spin while they wait take the cores from reading and separating.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A plan of where each tensor lies takes 1.1 GB in a tile of 1,120 px; without it .6, in the same time on a CPU.
    options.enable_mem_pattern = device != "cpu"
    if device == "cpu":
        _make_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        # With its fallback ONNX Runtime goes on without the GPU, at loading as at any batch.
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors have no class in common
        if device == "cpu":
            raise ModelError(f"`{path}`: ONNX Runtime cannot load it ({first_line(error)})") from error
        raise DeviceError(f"`{device}` cannot be had: {first_line(error)}") from error
    if session.get_providers()[0] != first:
        raise DeviceError(f"`{device}` cannot be had: {first} did not start; check the driver and CUDA's libraries")
    return session


@lru_cache
def _make_arena() -> None:
    """One arena for the sessions of all sizes, of which one runs at a time: .8 GB for seven that took 2.1 apart."""
    ort = _onnxruntime("cpu")
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)


def _tensorrt_options(path: Path, card: ModelCard, size: int) -> dict[str, str]:
    """One engine for all batches, kept beside the model: building takes minutes."""
    batches = {name: card.input.scaled(batch, size) for name, batch in _BATCHES.items()}
    shapes = {name: f"image:{n}x{size}x{size}x3" for name, n in batches.items()}
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(path.parent),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(path.parent),
        **{f"trt_profile_{name}_shapes": shape for name, shape in shapes.items()},
    }


def _shape(shape: list[Any]) -> tuple[int | None, ...]:
    return tuple(side if isinstance(side, int) else None for side in shape)

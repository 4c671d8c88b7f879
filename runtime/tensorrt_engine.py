"""NVIDIA's TensorRT without torch: an engine built from the ONNX file on the GPU that runs it.

Written against the Python API of TensorRT 10 and 11. An engine ("plan") is bound to the GPU, the TensorRT version and
the graph; its name and the JSON beside it say to which, and where they differ it is built anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.card import ModelCard, sha256_of
from nsam.runtime.engines import Engine, check_tensors
from nsam.runtime.errors import DeviceError, OutputError, not_imported
from nsam.runtime.files import output_errors, write_bytes, write_text

_log = logging.getLogger(__name__)

#: Batches of an engine, of `card.input.size`: least, the one it is tuned for, most; `run` cuts larger ones.
BATCHES = (1, 8, 16)
WORKSPACE_BYTES = 2 << 30  # of a T4's 16 GB
_KINDS = {"UINT8": "uint8", "FLOAT": "float32"}


class TensorrtEngine(Engine):
    """A plan with pinned buffers and one stream."""

    def __init__(
        self, path: Path, card: ModelCard, device: str, precision: str, threads: int, size: int, streams: int
    ) -> None:
        """Load the plan for this GPU and tiles of a size; build it, which takes minutes, where there is none.

        Raises:
            ModelError: the plan does not fit the card.
            DeviceError: tensorrt or cuda-python is missing, or there is no GPU for them.
        """
        trt, cuda = _libraries()
        self.card = card
        self.precision = precision
        self._cuda = cuda
        sm, gpu = _gpu(cuda)
        batches = [card.input.scaled(batch, size) for batch in BATCHES]
        plan = plan_for(path, size, batches, trt, sm, gpu)
        logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise DeviceError(f"`{path}`: TensorRT {trt.__version__} cannot load its engine; -v shows its log")
        check_tensors(path, card, size, *_sides(trt, self._engine))
        self._context = self._engine.create_execution_context()
        self._stream = _checked(cuda, cuda.cudaStreamCreate())
        self._most, side = batches[-1], size // card.output.stride
        self._images = _Buffer(cuda, (self._most, size, size, 3), np.dtype(np.uint8))
        self._maps = _Buffer(cuda, (self._most, len(card.output.channels), side, side), np.dtype(np.float32))
        self.device = f"tensorrt {precision} (TensorRT {trt.__version__}, {gpu})"

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Engine.run`."""
        parts = [self._run(images[i : i + self._most]) for i in range(0, len(images), self._most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        cuda, n, stream = self._cuda, len(images), self._stream
        kinds = cuda.cudaMemcpyKind
        self._images.host[:n] = images
        self._images.copy(n, kinds.cudaMemcpyHostToDevice, stream)
        ok = self._context.set_input_shape("image", images.shape)
        for name, buffer in (("image", self._images), ("maps", self._maps)):
            ok = ok and self._context.set_tensor_address(name, buffer.device)
        if not (ok and self._context.execute_async_v3(int(stream))):
            raise DeviceError(f"{self.device}: a batch of {n} failed; try a smaller one")
        self._maps.copy(n, kinds.cudaMemcpyDeviceToHost, stream)
        _checked(cuda, cuda.cudaStreamSynchronize(stream))
        maps: NDArray[np.float32] = self._maps.host[:n].copy()
        return maps


class _Buffer:
    """The same array in pinned memory and on the GPU; freed with the process."""

    def __init__(self, cuda: Any, shape: tuple[int, ...], kind: np.dtype[Any]) -> None:
        self._cuda = cuda
        bytes_ = int(np.prod(shape)) * kind.itemsize
        self.device = int(_checked(cuda, cuda.cudaMalloc(bytes_)))
        self._pinned = int(_checked(cuda, cuda.cudaMallocHost(bytes_)))
        raw: Any = (ctypes.c_uint8 * bytes_).from_address(self._pinned)
        self.host: NDArray[Any] = np.frombuffer(raw, kind).reshape(shape)

    def copy(self, n: int, kind: Any, stream: Any) -> None:
        """The first n tiles, in the direction `kind`."""
        size = self.host[:n].nbytes
        to_device = kind == self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        target, source = (self.device, self._pinned) if to_device else (self._pinned, self.device)
        _checked(self._cuda, self._cuda.cudaMemcpyAsync(target, source, size, kind, stream))


def plan_for(path: Path, size: int, batches: list[int], trt: Any, sm: int, gpu: str) -> bytes:
    """The plan of a graph for tiles of a size, this GPU and this TensorRT, built if need be.

    It is kept beside the model, or where that cannot be written in the user's cache.

    Raises:
        DeviceError: TensorRT cannot build it.
    """
    name = f"{path.stem}.sm{sm}-trt{trt.__version__}-b{batches[-1]}-{size}.plan"
    timing = f"model.sm{sm}-trt{trt.__version__}.timing"
    made_for = {"graph_sha256": sha256_of(path), "gpu": gpu}
    homes = _homes(path.parent)
    for folder in homes:
        plan = _read_plan(folder / name, made_for)
        if plan:
            return plan
    _log.warning("building an engine for %s with TensorRT %s; this takes minutes, once", gpu, trt.__version__)
    earlier = next((folder / timing for folder in homes if (folder / timing).is_file()), None)
    plan, times = build_plan(path, size, batches, trt, earlier.read_bytes() if earlier else b"")
    about = {**made_for, "sha256": hashlib.sha256(plan).hexdigest()}
    for folder in homes:
        try:
            with output_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / name, plan)
            write_text(folder / f"{name}.json", json.dumps(about, indent=2) + "\n")
            write_bytes(folder / timing, times)
        except OutputError as error:
            _log.warning("%s; the engine needs another place", error)
            continue
        return plan
    _log.warning("`%s`: neither it nor the user's cache can hold the engine, which is built at each start", path.parent)
    return plan


def build_plan(path: Path, size: int, batches: list[int], trt: Any, times: bytes) -> tuple[bytes, bytes]:
    """Build a plan for the GPU at hand. The precision is the graph's own: typing is strong.

    Args:
        path: `model.onnx` or `model.fp16.onnx`.
        size: side of the tiles, px.
        batches: least, best and most tiles at once.
        trt: the tensorrt module, 10 or 11.
        times: a timing cache, or nothing.

    Returns:
        The plan, and the timing cache by which later builds are quicker.

    Raises:
        DeviceError: TensorRT does not take the graph; its own words are in the message.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # From 11 on every network is strongly typed and the flag is of no use.
    strong = int(trt.__version__.split(".")[0]) < 11
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if strong else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes()):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise DeviceError(f"`{path}`: TensorRT {trt.__version__} cannot read it ({reasons})")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    cache = config.create_timing_cache(times)
    config.set_timing_cache(cache, ignore_mismatch=True)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *((n, size, size, 3) for n in batches))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise DeviceError(f"`{path}`: TensorRT {trt.__version__} cannot build an engine of it; -v shows its log")
    return bytes(plan), bytes(config.get_timing_cache().serialize())


def _libraries() -> tuple[Any, Any]:
    try:
        import tensorrt
        from cuda.bindings import runtime
    except ImportError as error:
        name = error.name or "tensorrt"
        raise DeviceError(
            f"`tensorrt` cannot be had: {not_imported(name, error)}; pip install 'nsam[tensorrt]'"
        ) from error
    return tensorrt, runtime


def _gpu(cuda: Any) -> tuple[int, str]:
    """(compute capability as 75 for 7.5, name) of the current GPU."""
    properties = _checked(cuda, cuda.cudaGetDeviceProperties(_checked(cuda, cuda.cudaGetDevice())))
    name = properties.name
    return 10 * properties.major + properties.minor, name.decode() if isinstance(name, bytes) else str(name)


def _checked(cuda: Any, result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call.

    Raises:
        DeviceError: the call failed.
    """
    status, *values = result
    if int(status) != 0:
        told = cuda.cudaGetErrorString(status)[1]
        raise DeviceError(f"`tensorrt` cannot be had: CUDA says {told.decode() if isinstance(told, bytes) else told}")
    return values[0] if values else None


def _sides(trt: Any, engine: Any) -> Iterator[list[tuple[str, str, tuple[int | None, ...]]]]:
    """Inputs, then outputs of a plan as `check_tensors` wants them."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT):
        yield [
            (
                name,
                _KINDS.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name),
                tuple(None if side < 0 else int(side) for side in engine.get_tensor_shape(name)),
            )
            for name in names
            if engine.get_tensor_mode(name) == mode
        ]


def _homes(model_dir: Path) -> list[Path]:
    """Where plans may lie: beside the model, or in the user's cache, apart by the model's place."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a container's user without a home
        return [model_dir]
    return [model_dir, cache / "nsam" / hashlib.sha256(bytes(model_dir.resolve())).hexdigest()[:16]]


def _read_plan(path: Path, made_for: dict[str, str]) -> bytes | None:
    """A plan, if it is whole and of this graph and GPU."""
    try:
        plan = path.read_bytes()
        about = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return plan if about == {**made_for, "sha256": hashlib.sha256(plan).hexdigest()} else None

"""TensorRT's and CUDA's Python API as far as nsam may use it: a name that a version lacks raises AttributeError.

Plans are ONNX graphs run by ONNX Runtime, and the GPU's memory is a dictionary, so what comes out is the network's
answer only if shapes, addresses and copies are right.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

MAGIC = b"plan:"


def make_tensorrt(version: str, memory: Memory) -> Any:
    """The module `tensorrt` of a version, "10.x" or "11.x"."""
    major = int(version.split(".")[0])

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        STRONGLY_TYPED = 1

    class TensorIOMode(enum.Enum):
        INPUT = 1
        OUTPUT = 2

    class DataType(enum.Enum):
        UINT8 = 1
        FLOAT = 2

    class Logger:
        WARNING = 1

        def __init__(self, level: int) -> None: ...

    class Profile:
        def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
            assert name == "image"
            assert low[0] <= best[0] <= high[0]
            self.high = high

    class Config:
        def __init__(self) -> None:
            self.profiles: list[Profile] = []
            self.cache: Any = None

        def set_memory_pool_limit(self, pool: str, size: int) -> None:
            assert (pool, size > 0) == ("workspace", True)

        def create_timing_cache(self, content: bytes) -> Any:
            return SimpleNamespace(serialize=lambda: content + b"t")

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self.cache

        def add_optimization_profile(self, profile: Profile) -> int:
            self.profiles.append(profile)
            return 0

    class Builder:
        def __init__(self, logger: Logger) -> None: ...

        def create_network(self, flags: int) -> Any:
            assert flags == (2 if major < 11 else 0), "typing is strong by flag in 10, always in 11"
            return SimpleNamespace(graph=b"")

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Any, config: Config) -> bytes:
            assert len(config.profiles) == 1
            return MAGIC + version.encode() + b":" + network.graph

    class OnnxParser:
        def __init__(self, network: Any, logger: Logger) -> None:
            self.network = network
            self.num_errors = 0

        def parse(self, content: bytes) -> bool:
            self.network.graph = content
            self.num_errors = 2 * (b"unparsable" in content)
            if not self.num_errors:  # uint8 goes into a Cast, and nowhere else (NVIDIA/TensorRT#3985)
                graph = onnx.load_from_string(content).graph
                self.num_errors = sum(n.op_type != "Cast" and graph.input[0].name in n.input for n in graph.node)
            return self.num_errors == 0

        def get_error(self, i: int) -> Any:
            return SimpleNamespace(desc=lambda: f"error {i}")

    class Context:
        def __init__(self, session: Any) -> None:
            self.session = session
            self.shape: tuple[int, ...] = ()
            self.addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shape = tuple(shape)
            return name == "image" and shape[0] <= 16

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return name in ("image", "maps")

        def execute_async_v3(self, stream: int) -> bool:
            source = memory.device[self.addresses["image"]][: int(np.prod(self.shape))]
            maps = self.session.run(["maps"], {"image": source.reshape(self.shape)})[0]
            raw = np.frombuffer(maps.tobytes(), np.uint8)
            memory.device[self.addresses["maps"]][: raw.size] = raw
            return True

    class CudaEngine:
        num_io_tensors = 2

        def __init__(self, graph: bytes) -> None:
            self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
            self.tensors = [self.session.get_inputs()[0], self.session.get_outputs()[0]]

        def _of(self, name: str) -> Any:
            return next(tensor for tensor in self.tensors if tensor.name == name)

        def get_tensor_name(self, i: int) -> str:
            return str(self.tensors[i].name)

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return TensorIOMode.INPUT if name == "image" else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> DataType:
            return {"tensor(uint8)": DataType.UINT8, "tensor(float)": DataType.FLOAT}[self._of(name).type]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(side if isinstance(side, int) else -1 for side in self._of(name).shape)

        def create_execution_context(self) -> Context:
            return Context(self.session)

    class Runtime:
        def __init__(self, logger: Logger) -> None: ...

        def deserialize_cuda_engine(self, plan: bytes) -> CudaEngine | None:
            head = MAGIC + version.encode() + b":"
            return CudaEngine(plan[len(head) :]) if plan.startswith(head) else None

    return SimpleNamespace(
        __version__=version,
        Logger=Logger,
        Builder=Builder,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        TensorIOMode=TensorIOMode,
        **({"NetworkDefinitionCreationFlag": NetworkDefinitionCreationFlag} if major < 11 else {}),
    )


class Memory:
    """A GPU's memory, and pinned memory of the host."""

    def __init__(self) -> None:
        self.device: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self._next = itertools.count(1)


class CopyKind(enum.IntEnum):
    """As in cuda.bindings.runtime."""

    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


def make_cuda(memory: Memory, sm: tuple[int, int] = (7, 5), status: int = 0, name: bytes = b"Tesla T4") -> Any:
    """The module `cuda.bindings.runtime` with one GPU; a `status` other than 0 fails every call."""

    def cuda_malloc(size: int) -> tuple[int, int]:
        address = next(memory._next)
        memory.device[address] = np.zeros(size, np.uint8)
        return status, address

    def cuda_malloc_host(size: int) -> tuple[int, int]:
        raw = (ctypes.c_uint8 * size)()
        memory.pinned[ctypes.addressof(raw)] = raw
        return status, ctypes.addressof(raw)

    def copy(target: int, source: int, size: int, kind: CopyKind, stream: Any) -> tuple[int]:
        assert stream == "stream"
        if kind == CopyKind.cudaMemcpyHostToDevice:
            memory.device[target][:size] = np.frombuffer(memory.pinned[source], np.uint8)[:size]
        else:
            ctypes.memmove(target, memory.device[source].tobytes(), size)
        return (status,)

    class Stream(str):
        def __int__(self) -> int:
            return 7

    properties = SimpleNamespace(major=sm[0], minor=sm[1], name=name)
    return SimpleNamespace(
        cudaMalloc=cuda_malloc,
        cudaMallocHost=cuda_malloc_host,
        cudaMemcpyAsync=copy,
        cudaMemcpyKind=CopyKind,
        cudaStreamCreate=lambda: (status, Stream("stream")),
        cudaStreamSynchronize=lambda stream: (status,),
        cudaGetDevice=lambda: (status, 0),
        cudaGetDeviceProperties=lambda device: (status, properties),
        cudaGetErrorString=lambda status: (0, b"no CUDA-capable device is detected"),
    )

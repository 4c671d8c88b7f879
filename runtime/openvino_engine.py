"""OpenVINO: the same file, faster on CPUs, and in bf16 where the CPU has it."""

from __future__ import annotations

import sys
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.card import ModelCard
from nsam.runtime.engines import Engine, check_embedded, check_tensors
from nsam.runtime.errors import DeviceError, ModelError, UnfitError, first_line, not_imported
from nsam.runtime.interrupts import uninterrupted

_KINDS = {"uint8_t": "uint8", "u8": "uint8", "float": "float32", "f32": "float32"}


class OpenvinoEngine(Engine):
    """A graph compiled by OpenVINO for the CPU."""

    def __init__(
        self, path: Path, card: ModelCard, device: str, precision: str, threads: int, size: int, streams: int
    ) -> None:
        """Load for tiles of a size, and check; as many threads as there are streams may `run` at the same time.

        Raises:
            ModelError: the graph cannot be loaded or does not fit the card.
            DeviceError: OpenVINO is missing; `UnfitError` where the CPU has no bf16.
        """
        # Its telemetry would tell Google Analytics of each import; without it openvino takes a stand-in of its own.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        try:
            with uninterrupted():
                import openvino
        except ImportError as error:
            raise DeviceError(f"{not_imported('`openvino`', error)}; pip install 'nsam[openvino]'") from error
        # Its binding sets numpy up at the first array that it gives back. Two threads that come there at the same time
        # wait for each other without end: one holds that step and wants the interpreter, the other the reverse.
        _ = openvino.Tensor(np.zeros(1, np.uint8)).data
        self.card = card
        self.precision = precision
        core = openvino.Core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and not has_bf16:
            raise UnfitError("`openvino`: this CPU has no bf16; --precision may be int8 or fp32")
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            raise ModelError(f"`{path}`: OpenVINO cannot load it ({first_line(error)})") from error
        check_tensors(
            path, card, size, [_tensor(port) for port in model.inputs], [_tensor(port) for port in model.outputs]
        )
        place = ["framework", "nsam_card"]
        check_embedded(path, card, model.get_rt_info(place).astype(str) if model.has_rt_info(place) else None)
        # What an int8 graph does not quantise runs in bf16, too, where that can be had.
        hint = "f32" if precision == "fp32" or not has_bf16 else "bf16"
        hints = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams}
        # Threads bound to cores would share them with those of another process, while other cores idle.
        hints["ENABLE_CPU_PINNING"] = False
        self._idle: SimpleQueue[Any] = SimpleQueue()
        try:
            model.reshape([-1, size, size, 3])
            compiled = core.compile_model(model, "CPU", hints)
            for _ in range(streams):
                self._idle.put(compiled.create_infer_request())
        except RuntimeError as error:
            raise DeviceError(f"`openvino`: cannot make ready for tiles of {size} px ({first_line(error)})") from error
        version = ".".join(openvino.__version__.split(".")[:2])
        self.device = f"openvino {precision} (OpenVINO {version}, {threads} threads)"

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Engine.run`."""
        request = self._idle.get()
        try:
            # The next call writes into the same memory.
            maps: NDArray[np.float32] = request.infer([images])[0].copy()
            if len(maps) != len(images):  # so it ends where memory is short, without an error
                raise RuntimeError(f"it gave {len(maps)} maps")
        except RuntimeError as error:
            raise DeviceError(
                f"{self.device}: a batch of {len(images)} failed ({first_line(error)}); try a smaller one"
            ) from error
        finally:
            self._idle.put(request)
        return maps


def _tensor(port: Any) -> tuple[str, str, tuple[int | None, ...]]:
    kind = port.element_type.get_type_name()
    shape = tuple(None if side.is_dynamic else side.get_length() for side in port.partial_shape)
    return port.any_name, _KINDS.get(kind, kind), shape

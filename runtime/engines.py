"""Engines: the network on whatever runs it here, behind one face."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Generator, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.bysize import BySize
from nsam.runtime.card import ModelCard
from nsam.runtime.errors import DeviceError, ModelError, UnfitError
from nsam.runtime.settings import Device, Precision
from nsam.runtime.tta import Averaged

#: The file of a model directory in which a precision is; bf16 is fp32's file, rounded by the engine.
FILES = {"fp32": "model.onnx", "bf16": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}

DEFAULT_MODEL = Path(__file__).parent / "default_model"

#: What each device runs, the fastest first. A precision whose file is not there is passed over.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "cpu": ("int8", "fp32"),
    "openvino": ("bf16", "int8", "fp32"),  # 67, 71 and 117 ms a tile where the CPU has bf16; many have none
    "cuda": ("fp16", "fp32"),
    "tensorrt": ("fp16", "fp32"),
}

#: What `auto` tries, the fastest first.
AUTO = ("cuda", "openvino", "cpu")

#: Tiles that a device works on at the same time. In ONNX Runtime's CPU provider a second one gained nothing beyond
#: 448 px, and took .4 GB.
STREAMS = {"openvino": 2}


class Engine(Protocol):
    """A network that is ready to run."""

    card: ModelCard
    precision: str  # one of `FILES`; of PyTorch, "torch"
    device: str  # what is really in use, e.g. "cpu fp32 (ONNX Runtime 1.20, 2 threads)"

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps of a batch of tiles.

        Args:
            images: (N, size, size, 3) uint8 RGB, `size` one of `card.input.sizes`, at its scale.

        Returns:
            (N, C, size / stride, size / stride) float32 as in `card.output`.

        Raises:
            DeviceError: the device failed, out of memory for instance.
        """

    def run_all(self, batches: Iterable[NDArray[np.uint8]]) -> Generator[NDArray[np.float32], None, None]:
        """Maps of each batch, in the same order and to the same bits as by `run`; several at once where that is faster.

        Args:
            batches: as `run` takes them, their tiles all of one size; a few are taken ahead.

        Raises:
            DeviceError: see `run`.
        """
        for images in batches:
            yield self.run(images)


def read_card(model_dir: Path | None = None) -> ModelCard:
    """The card of a model directory, or of the model that comes with nsam.

    Args:
        model_dir: see `load`.

    Raises:
        ModelError: it is missing or broken.
    """
    return ModelCard.read(model_dir or DEFAULT_MODEL)


def load(
    model_dir: Path | None = None,
    device: Device = "auto",
    threads: int | None = None,
    tta: int = 1,
    precision: Precision = "auto",
    network_mpp: float | None = None,
) -> Engine:
    """Load a file of a model directory, after checking it against the card.

    Args:
        model_dir: a folder made by nsam-export; None: the model that comes with nsam.
        device: `auto` takes the first of CUDA, OpenVINO and ONNX Runtime's CPU that can be had;
            `Engine.device` then says what kept it from the others.
        threads: CPU threads; None: as many as `available_cores`.
        tta: views of each tile whose maps are averaged; see `tta.Averaged`.
        precision: `auto` takes the fastest that the device runs and the folder holds.
        network_mpp: see `ModelCard.shown_at`.

    Raises:
        ModelError: card, file and graph do not fit together, the message names the field; or see `read_card` and
            `ModelCard.shown_at`.
        DeviceError: a library is missing, or the device cannot be had.
    """
    model_dir = model_dir or DEFAULT_MODEL
    card = read_card(model_dir)
    seen = card.shown_at(network_mpp)
    if device != "auto" and device not in PRECISIONS:
        raise DeviceError(f"`{device}`: no device; give auto, {', '.join(PRECISIONS)}")
    missed: list[str] = []
    for name in AUTO if device == "auto" else (device,):
        try:
            engine = _engine(model_dir, card, name, threads or available_cores(), precision)
        except DeviceError as error:
            missed.append(str(error))
            if name != AUTO[-1] and device == "auto":
                continue
            raise DeviceError("; ".join(missed)) from error
        notes = [*missed, *(f"parity failed at {link} when the model was made" for link in card.failed_links)]
        engine.device += "".join(f"; {note}" for note in notes)
        engine.card = seen
        return Averaged(engine, tta) if tta > 1 else engine
    raise AssertionError("`AUTO` ends with a device that is had or raises")


def _engine(model_dir: Path, card: ModelCard, device: str, threads: int, wanted: Precision) -> Engine:
    known = PRECISIONS[device]
    there = [name for name in known if FILES[name] in card.files]
    if wanted != "auto" and wanted not in known:
        raise DeviceError(f"`{device}` does not run {wanted}; --precision may be {', '.join(there)}")
    if wanted != "auto" and wanted not in there:
        raise DeviceError(f"`{model_dir}`: has no {wanted}; on {device} --precision may be {', '.join(there)}")
    make = _maker(device)
    # fp32 is always there: the chain begins with it.
    proven = [name for name in there if name in card.proven] or ["fp32"]
    for precision in proven if wanted == "auto" else [wanted]:
        path = card.verify_file(model_dir, FILES[precision])
        try:
            streams = min(threads, STREAMS.get(device, 1))
            parts = partial(make, path, card, device, precision, threads)
            # On a CPU the memory of engines for other sizes is wanted for a large slide's maps.
            return BySize(parts, card.input.size, streams, keep=device in ("cuda", "tensorrt"))
        except UnfitError:
            if precision == wanted:
                raise
    raise AssertionError("fp32, the last one, is had or raises")


def _maker(device: str) -> Callable[[Path, ModelCard, str, str, int, int, int], Engine]:
    """The engine class of a device, imported only when it is asked for."""
    if device == "openvino":
        from nsam.runtime.openvino_engine import OpenvinoEngine

        return OpenvinoEngine
    if device == "tensorrt" and _has_tensorrt():
        from nsam.runtime.tensorrt_engine import TensorrtEngine

        return TensorrtEngine
    from nsam.runtime.onnx_engine import OnnxEngine

    return OnnxEngine


def _has_tensorrt() -> bool:
    """NVIDIA's own package; without it ONNX Runtime's TensorRT provider serves."""
    from importlib.util import find_spec

    return find_spec("tensorrt") is not None


def check_embedded(path: Path, card: ModelCard, embedded: str | None) -> None:
    """Refuse a graph whose own card differs from the one beside it.

    Raises:
        ModelError: naming the field.
    """
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


def check_tensors(
    path: Path,
    card: ModelCard,
    size: int,
    inputs: list[tuple[str, str, tuple[int | None, ...]]],
    outputs: list[tuple[str, str, tuple[int | None, ...]]],
) -> None:
    """Refuse a graph that does not take and give what the card says.

    Args:
        path: for the message.
        card: the card.
        size: side of the tiles that it is to take; what is dynamic in the graph takes any.
        inputs, outputs: (name, `uint8` or `float32`, shape with None for what is dynamic) of each tensor.

    Raises:
        ModelError: naming the side.
    """
    side_out = size // card.output.stride
    expected = {
        "input": ("image", "uint8", (size, size, 3)),
        "output": ("maps", "float32", (len(card.output.channels), side_out, side_out)),
    }
    for side, tensors in (("input", inputs), ("output", outputs)):
        found = [
            (name, kind, tuple(e if f is None else f for f, e in zip(shape[1:], expected[side][2], strict=False)))
            for name, kind, shape in tensors
        ]
        if found != [expected[side]]:
            raise ModelError(f"`{path}`: by card field `{side}` the graph's is {expected[side]}, it has {found}")
        if tensors[0][2][0] is not None:
            raise ModelError(f"`{path}`: the graph's {side} takes a fixed batch of {tensors[0][2][0]} only")


def available_cores() -> int:
    """CPU cores that this process may use: its affinity and the container's quota (cgroup v2), at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))

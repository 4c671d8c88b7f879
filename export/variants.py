"""Graphs of other precisions, each with its proof: fp16 for GPUs, int8 for CPUs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nsam.export.int8 import by_sensitivity, candidates, quantise
from nsam.export.parity import METRICS_GATE, Chain
from nsam.export.precision import keep_list, rounded, rounded_to_bf16, to_fp16
from nsam.export.ranges import activation_ranges
from nsam.runtime.engines import Engine
from nsam.runtime.errors import DeviceError
from nsam.runtime.settings import Device, Precision

#: int8 that gains less than this is not worth a file.
LEAST_GAIN = 1.1
_LARGEST_SHOWN = 10


class Load(Protocol):
    """A graph's path -> an engine over it."""

    def __call__(self, graph: Path, device: Device = "cpu", precision: Precision = "fp32") -> Engine:
        """ONNX Runtime on the CPU, or another."""


def make_fp16(graph: Path, scratch: Path, chain: Chain, before: str, load: Load) -> tuple[Path, dict[str, Any]]:
    """A strongly typed fp16 graph, proven by its rounding in fp32 arithmetic.

    Returns:
        The graph, and what stays fp32 and why, for the report.

    Raises:
        ModelError: fp16 cannot hold the network, or the gate failed.
    """
    ranges = activation_ranges(graph, chain.tiles)
    kept = keep_list(graph, ranges)
    target = scratch / "fp16.onnx"
    to_fp16(graph, target, kept)
    rounded(target, scratch / "rounded.onnx")
    chain.prove(before, "fp16", load(scratch / "rounded.onnx"), rewrites_only=False)
    largest = sorted(((max(map(abs, span)), name) for name, span in ranges.items()), reverse=True)
    return target, {
        "kept_fp32": [asdict(entry) for entry in kept],
        "largest_activations": [{"tensor": name, "max_abs": value} for value, name in largest[:_LARGEST_SHOWN]],
    }


def prove_bf16(
    graph: Path, scratch: Path, chain: Chain, before: str, load: Load, say: Callable[[str], None]
) -> tuple[bool, dict[str, Any]]:
    """Whether the fp32 file in bf16 passes the gate, by OpenVINO, or by its rounding in fp32 arithmetic where that
    cannot be had; and which, for the report.
    """
    try:
        engine = load(graph, "openvino", "bf16")
        rounds = False
    except DeviceError as error:
        say(f"bf16: by rounding each tensor, for it cannot be had here ({error})")
        rounded_to_bf16(graph, scratch / "bf16.onnx")
        engine = load(scratch / "bf16.onnx")
        rounds = True
    link = chain.measure(before, "bf16", engine, rewrites_only=False)
    if link.passed:
        chain.keep(link)
    else:
        say(f"bf16: not proven, so `auto` will not take it; {link}")
    return link.passed, {"rounded": rounds}


def make_int8(
    graph: Path,
    scratch: Path,
    chain: Chain,
    before: str,
    load: Load,
    calibration: NDArray[np.uint8],
    say: Callable[[str], None],
) -> tuple[Path | None, dict[str, Any]]:
    """An int8 graph that passes the gate and is faster here, or None; and what was tried, for the report.

    Proven with ONNX Runtime and with OpenVINO, for each rounds in its own places; without OpenVINO there is none.

    Args:
        graph: fp32 graph.
        scratch: folder for trials.
        chain: where the proof is kept.
        before: name of `graph`'s engine in the chain.
        load: see `Load`.
        calibration: (N, S, S, 3) uint8 tiles of training images, for the activations' ranges.
        say: takes lines of progress.
    """
    try:
        load(graph, "openvino")
    except DeviceError as error:
        say(f"int8: left out, for OpenVINO would run it, too, and it cannot be proven there ({error})")
        return None, {"tried": []}
    say(f"int8: ranges from {len(calibration)} tiles, then each part's sensitivity")
    ranges = activation_ranges(graph, calibration)
    few = chain.tiles[:2]
    ranked = by_sensitivity(graph, scratch, ranges, load, few, chain.maps(before)[:2])
    tried: list[dict[str, Any]] = []
    for left_out, nodes in candidates(ranked):
        target = scratch / f"int8-{left_out}.onnx"
        quantise(graph, target, ranges, nodes)
        engine = load(target)
        links = [chain.measure(before, "int8", engine, rewrites_only=False)]
        if links[0].passed:
            openvino = load(target, "openvino", "int8")
            links.append(chain.measure(before, "int8 in OpenVINO", openvino, rewrites_only=False))
        passed = all(link.passed for link in links)
        metrics = {name: max(link.metrics[name] for link in links) for name in links[0].metrics}
        gain = speed_ratio(load(graph), engine, few[:1])
        tried.append({"groups_left_out": left_out, "metrics": metrics, "passed": passed, "speed": gain})
        say(
            f"int8, the {left_out} most sensitive of {len(ranked)} parts left in fp32: "
            + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            + f" (gate {METRICS_GATE:g}), {gain:.2f} times as fast"
        )
        if passed and gain >= LEAST_GAIN:
            for link in links:
                chain.keep(link)
            return target, {"tried": tried, "left_in_fp32": [name for _, group in ranked[:left_out] for name in group]}
    say(f"int8: not shipped; none passes its gate and is {LEAST_GAIN} times as fast")
    return None, {"tried": tried}


def speed_ratio(one: Engine, other: Engine, tile: NDArray[np.uint8], rounds: int = 7) -> float:
    """Seconds of `one` over seconds of `other`, median of alternating runs."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for engine, times in zip((one, other), seconds, strict=True):
            begin = time.perf_counter()
            engine.run(tile)
            times.append(time.perf_counter() - begin)
    # The first run of each warms up.
    return statistics.median(seconds[0][1:]) / statistics.median(seconds[1][1:])

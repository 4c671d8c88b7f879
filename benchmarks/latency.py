"""Latency of the network on every engine, precision and batch at hand, and the share of the machine's peak it reaches.

Each setting runs in a process of its own: its memory and its start are its alone.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from arithmetic import matrix_rate, multiplications
from common_options import json_option, numbers
from peak_memory import peak_mb

from nsam.runtime.errors import InputError
from nsam.runtime.options import Command

DEVICES = (
    "cpu:fp32",
    "cpu:int8",
    "openvino:fp32",
    "openvino:bf16",
    "openvino:int8",
    "cuda:fp32",
    "cuda:fp16",
    "tensorrt:fp16",
)
WARM_UP = 3


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--model", type=click.Path(path_type=Path), help="A folder made by nsam-export. [default: nsam's own]")
@click.option("--engines", default=",".join(DEVICES), help="device:precision, separated by commas.")
@click.option("--batches", callback=numbers(int), default="1,4", help="Tiles a pass, separated by commas.")
@click.option("--sizes", callback=numbers(int), help="Sides of the tiles, px, separated by commas. [default: 448]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
@click.option("--passes", type=click.IntRange(1), default=20, help="Timed passes, after 3 that are not.")
@json_option
@click.option("--plot", type=click.Path(path_type=Path), help="Draw them here.")
@click.option("--compare", type=click.Path(path_type=Path, exists=True), help="JSON of an earlier run: print ratios.")
@click.option("--one", hidden=True, help="What the processes are started with.")
def main(
    model: Path | None,
    engines: str,
    batches: tuple[int, ...],
    sizes: tuple[int, ...] | None,
    threads: int | None,
    passes: int,
    json_path: Path | None,
    plot: Path | None,
    compare: Path | None,
    one: str | None,
) -> None:
    """Time the network; what cannot be had here is said and left out."""
    if one:
        device, precision, batch, size = one.split(":")
        print(json.dumps(measure(model, device, precision, int(batch), int(size), threads, passes)))
        return
    before = read_times(compare) if compare else None
    rows, missing = [], []
    for engine, batch, size in itertools.product(engines.split(","), batches, sizes or (0,)):
        click.echo(f"{engine}, batch {batch} ...", err=True)
        row = in_process(model, f"{engine}:{batch}:{size}", threads, passes)
        if "error" in row:
            missing.append(f"{engine}: {row['error']}")
        else:
            rows.append(row)
    rate = matrix_rate(threads)
    for row in rows:
        row["share_of_peak"] = row["gflop_per_s"] / rate
    result = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "fp32_matrix_gflop_per_s": rate,
        "rows": rows,
        "missing": sorted(set(missing)),
    }
    show(result, before)
    if json_path:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not rows:
        raise click.ClickException("no engine could be timed")
    if plot:
        draw(rows, plot)


def in_process(model: Path | None, one: str, threads: int | None, passes: int) -> dict[str, Any]:
    """`measure` in a new process; {"error": ...} where it fails."""
    command = [sys.executable, __file__, "--one", one, "--passes", str(passes)]
    command += ["--model", str(model)] if model else []
    command += ["--threads", str(threads)] if threads else []
    begin = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NSAM_BEGIN": str(begin)})
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(
    model: Path | None, device: str, precision: str, batch: int, size: int, threads: int | None, passes: int
) -> dict[str, Any]:
    """One setting: milliseconds of a pass alone, tiles/s, mm²/s, GFLOP/s, peak memory, and the start of the process.

    Rates are of many passes, as many at the same time as those of a slide. A `size` of 0 is `card.input.size`.
    """
    import numpy as np

    from nsam.runtime.engines import load

    engine = load(model, device, threads, precision=precision)  # type: ignore[arg-type]
    card = engine.card
    size = size or card.input.size
    shape = (batch, size, size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)  # cost does not depend on content
    engine.run(images)
    first = time.time() - float(os.environ.get("NSAM_BEGIN", "nan"))
    times_ms = []
    for _ in range(WARM_UP + passes):
        begin = time.perf_counter()
        engine.run(images)
        times_ms.append(1000 * (time.perf_counter() - begin))
    p50, p95, p99 = np.percentile(times_ms[WARM_UP:], [50, 95, 99])
    kept_um = (size - 2 * card.post.tile_halo_px) * card.input.mpp
    list(engine.run_all([images] * WARM_UP))
    begin = time.perf_counter()
    list(engine.run_all([images] * passes))
    tiles = batch * passes / (time.perf_counter() - begin)
    peak = peak_mb()  # taken before the multiplications are counted, which needs more
    return {
        "engine": f"{device}:{precision}",
        "device": engine.device,
        "batch": batch,
        "size": size,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "tiles_per_s": tiles,
        "mm2_per_s": tiles * (kept_um / 1000) ** 2,
        "gflop_per_s": tiles * 2 * multiplications(model, size) / 1e9,
        "peak_mb": peak,
        "start_to_first_result_s": first,
    }


def read_times(path: Path) -> dict[tuple[str, int, int], float]:
    """Of an earlier run's JSON: engine, batch and size -> its p50.

    Raises:
        InputError: it is not of this benchmark.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {(row["engine"], row["batch"], row["size"]): float(row["p50_ms"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"`--compare {path}`: not what latency.py --json has written; name a file of its") from error


def show(result: dict[str, Any], before: dict[tuple[str, int, int], float] | None) -> None:
    """The table; with an earlier run's times, the ratio of its p50 to this one's."""
    print(f"{result['machine']['cpu']}; a 2048 x 2048 fp32 product: {result['fp32_matrix_gflop_per_s']:.0f} GFLOP/s\n")
    head = "| engine | batch | tile px | p50 ms | p95 | p99 | tiles/s | mm²/s | GFLOP/s | of peak | MB | start s |"
    print(head + (" speed-up |" if before is not None else ""))
    print("|---" * (head.count("|") - 1 + (before is not None)) + "|")
    for r in result["rows"]:
        line = (
            f"| {r['engine']} | {r['batch']} | {r['size']} | {r['p50_ms']:.0f} | {r['p95_ms']:.0f} | {r['p99_ms']:.0f} "
            f"| {r['tiles_per_s']:.2f} | {r['mm2_per_s']:.4f} | {r['gflop_per_s']:.0f} | {r['share_of_peak']:.2f} "
            f"| {r['peak_mb']:.0f} | {r['start_to_first_result_s']:.1f} |"
        )
        if before is not None:
            ratio = before.get((r["engine"], r["batch"], r["size"]), float("nan")) / r["p50_ms"]
            line += f" {ratio:.2f} |"
        print(line)
    for line in result["missing"]:
        print(f"not here: {line}")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of mm²/s."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.5 + 0.4 * len(rows)))
    names = [f"{row['engine']}, {row['batch']} of {row['size']} px" for row in rows]
    axes.barh(names, [row["mm2_per_s"] for row in rows])
    axes.set_xlabel("mm² of tissue a second (network alone)")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cpu_name() -> str:
    """The processor as Linux calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()

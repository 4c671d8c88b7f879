"""Latency of the network on every engine, precision and batch at hand, and the share of the machine's peak it reaches.

Each setting runs in a process of its own: its memory and its start are its alone.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

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
MATRIX = 2048


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--model", type=click.Path(path_type=Path), help="A folder made by nsam-export. [default: nsam's own]")
@click.option("--engines", default=",".join(DEVICES), help="device:precision, separated by commas.")
@click.option("--batches", default="1,4", help="Tiles a pass, separated by commas.")
@click.option("--sizes", help="Sides of the tiles, px, separated by commas. [default: 448]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
@click.option("--passes", type=click.IntRange(1), default=20, help="Timed passes, after 3 that are not.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw them here.")
@click.option("--compare", type=click.Path(path_type=Path, exists=True), help="JSON of an earlier run: print ratios.")
@click.option("--one", hidden=True, help="What the processes are started with.")
def main(
    model: Path | None,
    engines: str,
    batches: str,
    sizes: str | None,
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
    rows, missing = [], []
    for engine, batch, size in itertools.product(engines.split(","), batches.split(","), (sizes or "0").split(",")):
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
    show(result, json.loads(compare.read_text(encoding="utf-8")) if compare else None)
    if json_path:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
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
    # Taken before the multiplications are counted, which needs more.
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
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
        "peak_mb": peak_mb,
        "start_to_first_result_s": first,
    }


def multiplications(model: Path | None, size: int) -> int:
    """Multiply-adds of matrix products and convolutions for one tile of a size, from the graph's shapes."""
    import onnx
    import onnxsim
    from onnx import numpy_helper

    import nsam.runtime

    folder = model or Path(nsam.runtime.__file__).parent / "default_model"
    # With its shapes fixed, onnxsim computes what depends on them, so that each node's can be told.
    fixed = {"image": [1, size, size, 3]}
    graph, _ = onnxsim.simplify(onnx.load(folder / "model.onnx"), check_n=0, overwrite_input_shapes=fixed)
    graph = onnx.shape_inference.infer_shapes(graph, data_prop=True)
    values = [*graph.graph.value_info, *graph.graph.output, *graph.graph.input]
    shapes = {v.name: [max(1, d.dim_value) for d in v.type.tensor_type.shape.dim] for v in values}
    shapes |= {t.name: list(numpy_helper.to_array(t).shape) for t in graph.graph.initializer}
    total = 0
    for node in graph.graph.node:
        if node.op_type not in ("Gemm", "MatMul", "Conv", "ConvTranspose"):
            continue
        attributes = {a.name: a for a in node.attribute}
        a, b, out = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
        if node.op_type == "Conv":
            each = product(b[1:])
        elif node.op_type == "ConvTranspose":
            out, each = a, product(b[1:])
        else:
            each = a[-2] if "transA" in attributes and attributes["transA"].i else a[-1]
        total += product(out) * each
    return total


def product(sides: list[int]) -> int:
    """Their product."""
    result = 1
    for side in sides:
        result *= side
    return result


def matrix_rate(threads: int | None) -> float:
    """GFLOP/s of a large fp32 matrix product on the same threads: what this machine can do."""
    count = str(threads or os.cpu_count() or 1)
    code = (
        f"import numpy as np, time; a = np.ones(({MATRIX}, {MATRIX}), np.float32); best = 9e9\n"
        "for _ in range(12):\n b = time.perf_counter(); a @ a; best = min(best, time.perf_counter() - b)\n"
        f"print(2 * {MATRIX} ** 3 / best / 1e9)"
    )
    env = {**os.environ, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout)


def show(result: dict[str, Any], old: dict[str, Any] | None) -> None:
    """The table; with an earlier run's, the ratio of its p50 to this one's."""
    before = {(row["engine"], row["batch"], row["size"]): row["p50_ms"] for row in old["rows"]} if old else {}
    print(f"{result['machine']['cpu']}; a 2048 x 2048 fp32 product: {result['fp32_matrix_gflop_per_s']:.0f} GFLOP/s\n")
    head = "| engine | batch | tile px | p50 ms | p95 | p99 | tiles/s | mm²/s | GFLOP/s | of peak | MB | start s |"
    print(head + (" speed-up |" if old else ""))
    print("|---" * (head.count("|") - 1 + bool(old)) + "|")
    for r in result["rows"]:
        line = (
            f"| {r['engine']} | {r['batch']} | {r['size']} | {r['p50_ms']:.0f} | {r['p95_ms']:.0f} | {r['p99_ms']:.0f} "
            f"| {r['tiles_per_s']:.2f} | {r['mm2_per_s']:.4f} | {r['gflop_per_s']:.0f} | {r['share_of_peak']:.2f} "
            f"| {r['peak_mb']:.0f} | {r['start_to_first_result_s']:.1f} |"
        )
        if old:
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

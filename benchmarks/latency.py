"""Latency of the network by batch size, on the device at hand, through the runtime's own engine."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np

from nsam.runtime.engines import load


def main() -> None:
    """Print a table, and write the same figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory [default: the one that comes with nsam]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or tensorrt [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [default: all cores]")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="tiles a pass [1 4]")
    parser.add_argument("--passes", type=int, default=20, help="timed passes, after 3 that are not [%(default)s]")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()

    began = time.perf_counter()
    engine = load(args.model, device=args.device, threads=args.threads)
    loading_s = time.perf_counter() - began
    card = engine.card
    kept = card.input.size - 2 * card.post.tile_halo_px
    tile_mm2 = (kept * card.input.mpp / 1000) ** 2
    rows = []
    for batch in args.batches:
        shape = (batch, card.input.size, card.input.size, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)  # cost does not depend on content
        times_ms = []
        for _ in range(3 + args.passes):
            began = time.perf_counter()
            engine.run(images)
            times_ms.append(1000 * (time.perf_counter() - began))
        p50, p95, p99 = np.percentile(times_ms[3:], [50, 95, 99])
        rate = 1000 * batch / p50
        rows.append(
            {"batch": batch, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}
            | {"tiles_per_s": rate, "mm2_per_s": rate * tile_mm2}
        )
    print(f"{engine.device}, {card.input.size} px tiles, loaded in {loading_s:.2f} s")
    print("| batch | p50 ms | p95 ms | p99 ms | tiles/s | mm²/s |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['batch']} | {row['p50_ms']:.0f} | {row['p95_ms']:.0f} | {row['p99_ms']:.0f} "
            f"| {row['tiles_per_s']:.2f} | {row['mm2_per_s']:.4f} |"
        )
    if args.json:
        machine = {"machine": platform.processor() or platform.machine(), "device": engine.device}
        args.json.write_text(json.dumps({**machine, "loading_s": loading_s, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

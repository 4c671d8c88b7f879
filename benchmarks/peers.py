"""nsam beside what a user would pick instead, on the same tissue, in the same run, each in an environment of its own.

Peers' pretrained weights are downloaded by their packages; where that cannot be done the same network runs with random
weights (its time does not depend on them). StarDist's post-processing is then timed on maps made from the true labels,
the others' not at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
#: name -> what pip installs, and the function of peer_worker.py that runs it.
PEERS = {
    "nsam": ([f"{HERE.parent}[openvino]"], "nsam"),
    "StarDist": (["stardist", "tensorflow-cpu"], "stardist"),
    "InstanSeg": (["instanseg-torch"], "instanseg"),
    "HoVer-Net": (["monai"], "hovernet"),
    "HoVer-NeXt": (["segmentation-models-pytorch"], "hovernext"),
    "Cellpose-SAM": (["cellpose >= 4.2"], "cellpose"),
    "classical chain": (["scikit-image", "opencv-python-headless"], "classical"),
}


@click.command(context_settings={"show_default": True})
@click.argument("image", type=click.Path(path_type=Path, exists=True))
@click.argument("labels", type=click.Path(path_type=Path, exists=True))
@click.option("--mpp", type=float, default=0.25, help="Scale of the image, µm/px.")
@click.option("--peers", default=",".join(PEERS), help="Which, separated by commas.")
@click.option("--envs", type=click.Path(path_type=Path), required=True, help="Folder for the environments (gigabytes).")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="CPU threads of each.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Each peer in turn, so often; the best counts.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
def main(
    image: Path,
    labels: Path,
    mpp: float,
    peers: str,
    envs: Path,
    threads: int,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Time peers on IMAGE, an RGB region, whose LABELS (uint16 or int32 TIFF) stand in where weights are missing."""
    chosen = {name: PEERS[name] for name in peers.split(",")}
    megabytes = {name: install(envs / task, packages) for name, (packages, task) in chosen.items()}
    results: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, (_, task) in chosen.items():
            click.echo(f"{name} ...", err=True)
            row = run(envs / task, task, image, labels, mpp, threads)
            if "error" in row:
                results.setdefault(name, row)
                continue
            before = results.get(name, {})
            for key in ("network_s", "post_s", "whole_s"):
                if key in row and key in before:
                    row[key] = min(row[key], before[key])
            results[name] = {**row, "install_mb": megabytes[name]}
    area = next((row["mm2"] for row in results.values() if "mm2" in row), float("nan"))
    print("| | network s | post-processing s | s/mm² | peak MB | install MB | weights |\n|---|---|---|---|---|---|---|")
    for name, row in results.items():
        if "error" in row:
            print(f"| {name} | not run: {row['error']} |")
            continue
        whole = row["whole_s"] if "whole_s" in row else row["network_s"] + row.get("post_s", 0)
        network, post = (f"{row[key]:.2f}" if key in row else "-" for key in ("network_s", "post_s"))
        print(
            f"| {name} | {network} | {post} | {whole / area:.1f} | {row['peak_mb']:.0f} "
            f"| {row['install_mb']:.0f} | {row['weights']} |"
        )
    if json_path:
        json_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def install(env: Path, packages: list[str]) -> float:
    """Make the environment if it is not there, with nsam as it is now; its size in MB."""
    pip = [env / "bin" / "pip", "install", "-q"]
    if not (env / "done").is_file():
        click.echo(f"installing {', '.join(packages)} ...", err=True)
        venv.create(env, with_pip=True, clear=True)
        subprocess.run([*pip, "tifffile", *packages], check=True)
        (env / "done").touch()
    elif packages == PEERS["nsam"][0]:
        subprocess.run([*pip, "--force-reinstall", "--no-deps", *packages], check=True)
    return sum(path.stat().st_size for path in env.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def run(env: Path, task: str, image: Path, labels: Path, mpp: float, threads: int) -> dict[str, Any]:
    """One peer in a process of its own."""
    try:
        row: dict[str, Any] = json.loads(
            answer(env, "peer_worker.py", task, image, labels, mpp, threads, threads=threads)
        )
    except PeerError as error:
        return {"error": str(error)}
    return row


class PeerError(Exception):
    """A peer's last words."""


def answer(env: Path, script: str, *arguments: object, threads: int) -> str:
    """The last line that a script of this folder prints, run in an environment.

    Raises:
        PeerError: it failed.
    """
    command = [env / "bin" / "python", HERE / script, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=surroundings(threads))
    if done.returncode:
        raise PeerError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout.splitlines()[-1]


def surroundings(threads: int) -> dict[str, str]:
    """Environment variables that hold every library to so many threads."""
    names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    variables = {**os.environ, **dict.fromkeys(names, str(threads))}
    variables.pop("PYTHONPATH", None)
    return {**variables, "TF_NUM_INTEROP_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


if __name__ == "__main__":
    sys.exit(main())

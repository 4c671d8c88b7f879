"""nsam beside what a user would pick instead, on the same tissue, in the same run, each in an environment of its own.

Peers' pretrained weights are downloaded by their packages; where that cannot be done the same network runs with random
weights (its time does not depend on them). StarDist's post-processing is then timed on maps made from the true labels,
the others' not at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import venv
from pathlib import Path
from typing import Any, NamedTuple

import click
import tifffile
from common_options import json_option

from nsam.runtime.errors import NsamError
from nsam.runtime.options import Command, names_of
from nsam.runtime.slides import open_slide

HERE = Path(__file__).resolve().parent


class Peer(NamedTuple):
    """What is timed."""

    packages: list[str]  # what pip installs
    env: str  # folder of its environment
    task: str  # what of peer_worker.py runs it


_STARDIST = ["stardist", "tensorflow-cpu"]
PEERS = {
    "nsam": Peer([f"{HERE.parent}[openvino]"], "nsam", "nsam"),
    "StarDist": Peer(_STARDIST, "stardist", "stardist"),
    "StarDist-0.5": Peer(_STARDIST, "stardist", "stardist-0.5"),
    "InstanSeg": Peer(["instanseg-torch"], "instanseg", "instanseg"),
    "HoVer-Net": Peer(["monai"], "hovernet", "hovernet"),
    "HoVer-NeXt": Peer(["segmentation-models-pytorch"], "hovernext", "hovernext"),
    "Cellpose-SAM": Peer(["cellpose >= 4.2"], "cellpose", "cellpose"),
    "classical chain": Peer(["scikit-image", "opencv-python-headless"], "classical", "classical"),
}


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("image", type=click.Path(path_type=Path, exists=True))
@click.argument("labels", type=click.Path(path_type=Path, exists=True))
@click.option("--mpp", type=float, default=0.25, help="Scale of the image, µm/px.")
@click.option("--peers", callback=names_of(PEERS), default=",".join(PEERS), help="Which, separated by commas.")
@click.option("--envs", type=click.Path(path_type=Path), required=True, help="Folder for the environments (gigabytes).")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="CPU threads of each.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, help="Each peer in turn, so often; its fastest whole run counts."
)
@json_option
def main(
    image: Path,
    labels: Path,
    mpp: float,
    peers: tuple[str, ...],
    envs: Path,
    threads: int,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Time peers on IMAGE, an RGB region (TIFF, PNG or JPEG).

    Its LABELS (uint16 or int32 TIFF) stand in where weights are missing.
    """
    with open_slide(image) as slide:
        pixels = slide.read_region(0, 0, 0, *slide.size_wh)
    megabytes = {name: install(envs / PEERS[name].env, PEERS[name].packages) for name in peers}
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        region = Path(folder, "region.tif")  # what the workers can read, whatever their environments hold
        tifffile.imwrite(region, pixels, photometric="rgb")
        for _ in range(rounds):
            for name in peers:
                click.echo(f"{name} ...", err=True)
                row = run(envs / PEERS[name].env, PEERS[name].task, region, labels, mpp, threads)
                before = results.get(name)
                if before is None or "error" in before or ("error" not in row and whole_s(row) < whole_s(before)):
                    results[name] = {**row, "install_mb": megabytes[name]}
    area = next((row["mm2"] for row in results.values() if "mm2" in row), float("nan"))
    print("| | network s | post-processing s | s/mm² | peak MB | install MB | weights |\n|---|---|---|---|---|---|---|")
    for name, row in results.items():
        if "error" in row:
            print(f"| {name} | not run: {row['error']} |")
            continue
        network, post = (f"{row[key]:.2f}" if key in row else "-" for key in ("network_s", "post_s"))
        print(
            f"| {name} at {row['seen_mpp']:g} µm/px | {network} | {post} | {whole_s(row) / area:.1f} "
            f"| {row['peak_mb']:.0f} | {row['install_mb']:.0f} | {row['weights']} |"
        )
    if json_path:
        json_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if all("error" in row for row in results.values()):
        raise click.ClickException("no peer could be run")


def whole_s(row: dict[str, Any]) -> float:
    """Seconds of all that a peer was timed with."""
    whole: float = row["whole_s"] if "whole_s" in row else row["network_s"] + row.get("post_s", 0)
    return whole


def install(env: Path, packages: list[str]) -> float:
    """Make the environment if it is not there, with nsam as it is now; its size in MB.

    Raises:
        NsamError: pip cannot install it.
    """
    pip = [env / "bin" / "pip", "install", "-q"]
    try:
        if not (env / "done").is_file():
            click.echo(f"installing {', '.join(packages)} ...", err=True)
            venv.create(env, with_pip=True, clear=True)
            subprocess.run([*pip, "tifffile", *packages], check=True)
            (env / "done").touch()
        elif packages == PEERS["nsam"].packages:
            subprocess.run([*pip, "--force-reinstall", "--no-deps", *packages], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NsamError(f"`{env}`: {', '.join(packages)} cannot be installed there ({error})") from error
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
    main()

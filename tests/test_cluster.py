"""A real Dask scheduler and real workers: the bytes of one machine, though a worker dies on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner, Result

from nsam.runtime import cluster
from nsam.runtime.bands import FOLDER
from nsam.runtime.cli import main
from nsam.runtime.settings import OUTPUTS

pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, draw_discs: Any) -> Path:
    """Two small images, one of six bands, and one that is none."""
    folder = tmp_path_factory.mktemp("slides")
    rng = np.random.default_rng(0)
    for name, times in {"a": 1, "b": 2, "large": 12}.items():
        image = np.tile(draw_discs((800, 1000), rng.uniform(20, 780, (12, 2)), 9), (times, 1, 1))
        tifffile.imwrite(folder / f"{name}.tif", image, photometric="rgb", compression="zlib", tile=(256, 256))
    (folder / "none.tif").write_bytes(b"II*\0 no slide")
    return folder


def infer(slides: Path, model: Path, out: Path, *more: str) -> Result:
    options = ["--model", model, "--mpp", "0.25", "--device", "cpu", "--threads", "1", "--outputs", ",".join(OUTPUTS)]
    return CliRunner().invoke(main, list(map(str, [slides, "--out", out, *options, *more])))


def results(out: Path) -> dict[str, bytes]:
    files = [out / slide / file for slide in ("a", "b", "large") for file in OUTPUTS.values()]
    return {str(path.relative_to(out)): path.read_bytes() for path in [*files, out / "failed.csv"]}


@pytest.fixture(scope="module")
def here(slides: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one machine makes of the slides."""
    out = tmp_path_factory.mktemp("here")
    assert infer(slides, tiny_model, out).exit_code == 1
    return results(out)


class Dask:
    """A scheduler and workers as a site starts them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.file = folder / "scheduler.json"
        self._scheduler = self._start("distributed.cli.dask_scheduler", "--port", "0", "--dashboard-address", ":0")
        deadline = time.monotonic() + 60
        while not self.file.is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.workers = [self.add_worker() for _ in range(2)]
        self.wait()

    def wait(self) -> None:
        """Until all workers are there."""
        from distributed import Client

        with Client(scheduler_file=str(self.file)) as client:
            client.wait_for_workers(len(self.workers), timeout=60)

    def add_worker(self) -> subprocess.Popen[bytes]:
        # Resources are labels to Dask: a task that asks for a GPU must find the worker that says it has one.
        options = ("--no-dashboard", "--resources", "GPU=1")
        return self._start("distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", *options)

    def _start(self, module: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", module, "--scheduler-file", str(self.file), *options]
        environment = {
            **os.environ,
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "2",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=self._folder, env=environment, **quiet)

    def stop(self) -> None:
        for process in (*self.workers, self._scheduler):
            process.kill()
            process.wait()


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[Dask]:
    site = Dask(tmp_path)
    yield site
    site.stop()


def test_two_workers_of_which_one_is_killed(
    slides: Path, tiny_model: Path, here: dict[str, bytes], dask: Dask, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed = threading.Event()

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if list(out.glob(f"large/{FOLDER}/*.npz")):  # in the middle of the large one
                dask.workers[0].send_signal(signal.SIGKILL)
                killed.set()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    result = infer(slides, tiny_model, out, "--cluster", str(dask.file))
    thread.join()
    assert killed.is_set()
    assert result.exit_code == 1, result.output
    assert "device: 2 workers of " in result.output
    # One that was finished when its worker died, before it could say so, is found done.
    assert re.search("(3 slides done, 0|2 slides done, 1) skipped, 1 failed", result.output)
    assert results(out) == here
    assert not list(out.rglob("*.part"))
    again = infer(slides, tiny_model, out, "--cluster", str(dask.file))
    assert "0 slides done, 3 skipped, 1 failed" in again.output


def test_a_slide_that_kills_its_workers_is_given_up(
    slides: Path, tiny_model: Path, dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three workers die over it, and the others are done by the rest."""
    monkeypatch.setattr(cluster, "begin_slide", _deadly)
    dask.workers += [dask.add_worker() for _ in range(2)]
    dask.wait()
    out = tmp_path / "out"
    result = infer(slides / "a.tif", tiny_model, out, "--cluster", str(dask.file))
    assert result.exit_code == 1, result.output
    assert "it killed 3 workers" in result.stderr
    assert ',cluster,"it killed 3 workers' in (out / "failed.csv").read_text()


def _deadly(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_local_cluster(slides: Path, tiny_model: Path, here: dict[str, bytes], tmp_path: Path) -> None:
    result = infer(slides, tiny_model, tmp_path, "--cluster", "local:2")
    assert "device: 2 workers of local:2, dashboard http" in result.output
    assert results(tmp_path) == here


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "missing.json", "local:none"])
def test_no_such_cluster(slides: Path, tiny_model: Path, tmp_path: Path, address: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    result = infer(slides, tiny_model, tmp_path, "--cluster", address)
    assert result.exit_code == 2
    assert f"`--cluster {address}`: cannot be reached" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1

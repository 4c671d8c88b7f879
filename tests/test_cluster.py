"""A real Dask scheduler and real workers: the bytes of one machine, though a worker dies on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import tifffile
from click.testing import CliRunner, Result

from nsam.runtime import cluster
from nsam.runtime.card import InputSpec, ModelCard
from nsam.runtime.cli import main
from nsam.runtime.cluster import cut, idle_share
from nsam.runtime.settings import BANDS_NAME, OUTPUTS

pytest.importorskip("distributed")


class Work(NamedTuple):
    """Slides of which one cannot be done, and what one machine makes of them."""

    table: Path
    model: Path
    large: str
    done: int
    here: dict[str, Any]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, draw_discs: Any, tiny_model: Path) -> Work:
    """Two small images, one of ten bands, and one that is none."""
    folder = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(0)
    for name, times in {"a": 1, "b": 2, "large": 12}.items():
        image = np.tile(draw_discs((800, 1000), rng.uniform(20, 780, (12, 2)), 9), (times, 1, 1))
        write_tiff(folder / f"{name}.tif", image)
    (folder / "none.tif").write_bytes(b"II*\0 no slide")
    table = write_table(folder, {folder / f"{name}.tif": 0.25 for name in ("a", "b", "large", "none")})
    return Work(table, tiny_model, "large", 3, results_here(table, tiny_model))


@pytest.fixture(scope="module")
def real(
    data_dir: Path, tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable[[Path, ModelCard], Path]
) -> Work:
    """All real slides; one tells no mpp, in its metadata or in the table."""
    folder = tmp_path_factory.mktemp("real")
    # Larger tiles than the tiny model's: there is more tissue than in drawings.
    card = ModelCard(name="tiny", version="1", licence="Apache-2.0", input=InputSpec(sizes=(256,), mpp=0.25))
    model = make_tiny_model(folder / "model", card)
    slides = sorted((data_dir / "slides").iterdir())
    table = write_table(folder, {slide: 0.25 if slide.suffix == ".jpg" else None for slide in slides})
    here = results_here(table, model)
    assert b"TCGA-CR-7395-01A-01-TS1.svs`: no mpp in its metadata; pass --mpp" in here["failed.csv"]
    return Work(table, model, "CMU-1-Small-Region", len(slides) - 1, here)


def write_tiff(path: Path, image: np.ndarray) -> None:
    tifffile.imwrite(path, image, photometric="rgb", compression="zlib", tile=(256, 256))


def write_table(folder: Path, mpps: dict[Path, float | None]) -> Path:
    path = folder / "slides.csv"
    path.write_text("path,mpp\n" + "".join(f"{slide},{mpp or ''}\n" for slide, mpp in mpps.items()))
    return path


def arguments(slides: Path, model: Path, out: Path, *more: str) -> list[str]:
    options = ["--model", model, "--device", "cpu", "--threads", "1", "--outputs", ",".join(OUTPUTS)]
    return list(map(str, [slides, "--out", out, *options, *more]))


def infer(slides: Path, model: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(main, arguments(slides, model, out, *more))


def results(out: Path) -> dict[str, Any]:
    """The bytes of all that a run leaves, but of what tells the time."""
    found: dict[str, Any] = {}
    for path in out.rglob("*"):
        if path.is_file() and path.name not in ("run.json", "report.html"):
            found[str(path.relative_to(out))] = path.read_bytes()
            if path.name == "slide.json":
                found[str(path.relative_to(out))] = {**json.loads(path.read_text(encoding="utf-8")), "seconds": 0}
    return found


def results_here(table: Path, model: Path) -> dict[str, Any]:
    out = table.parent / "here"
    assert infer(table, model, out).exit_code == 1
    return results(out)


class Dask:
    """A scheduler and workers as a site starts them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.file = folder / "scheduler.json"
        self.scheduler = self._start("distributed.cli.dask_scheduler", "--port", "0", "--dashboard-address", ":0")
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
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[Dask]:
    site = Dask(tmp_path)
    yield site
    site.stop()


@pytest.mark.parametrize("name", ["drawn", "real"])
def test_two_workers_of_which_one_is_killed(
    name: str, dask: Dask, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    work = request.getfixturevalue(name)
    out = tmp_path / "out"
    killed: list[int] = []

    def kill() -> None:
        """The worker that is in the middle of the large slide: it has files of that name open."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            time.sleep(0.005)
            if list(out.glob(f"{work.large}/{BANDS_NAME}/*.npz")):
                for worker in dask.workers:
                    if any(f"/{work.large}" in file.path for file in psutil.Process(worker.pid).open_files()):
                        worker.send_signal(signal.SIGKILL)
                        killed.append(worker.pid)
                        break

    thread = threading.Thread(target=kill)
    thread.start()
    result = infer(work.table, work.model, out, "--cluster", str(dask.file))
    thread.join()
    assert killed
    assert result.exit_code == 1, result.output
    assert "device: 2 workers of " in result.output
    # One that was finished when its worker died, before it could say so, is found done.
    done = f"({work.done} slides done, 0|{work.done - 1} slides done, 1) skipped, 1 failed"
    assert re.search(done, result.output)
    assert results(out) == work.here
    again = infer(work.table, work.model, out, "--cluster", str(dask.file))
    assert f"0 slides done, {work.done} skipped, 1 failed" in again.output
    assert results(out) == work.here
    assert not list(out.rglob("*.part"))


def test_a_slide_that_kills_its_workers_is_given_up(
    drawn: Work, dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three workers die over it; the fourth lives."""
    monkeypatch.setattr(cluster, "begin_slide", _deadly)
    dask.workers += [dask.add_worker() for _ in range(2)]
    dask.wait()
    out = tmp_path / "out"
    table = write_table(tmp_path, {drawn.table.parent / "a.tif": 0.25})
    result = infer(table, drawn.model, out, "--cluster", str(dask.file))
    assert result.exit_code == 1, result.output
    assert "it killed 3 workers" in result.stderr
    assert re.search(r',cluster,"`.*a.tif`: it killed 3 workers', (out / "failed.csv").read_text())
    assert [worker.poll() for worker in dask.workers].count(None) == 1


def test_a_scheduler_that_dies_is_one_line_a_slide(drawn: Work, dask: Dask, tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = write_table(tmp_path, {drawn.table.parent / "large.tif": 0.25})
    options = arguments(table, drawn.model, out, "--cluster", str(dask.file))
    command = [sys.executable, "-m", "nsam.runtime.cli", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob(f"large/{BANDS_NAME}/*.npz")) and time.monotonic() < deadline:
        time.sleep(0.005)
    dask.scheduler.kill()
    told = "the scheduler is gone; see its log, and run again: what is finished is skipped"
    slide = drawn.table.parent / "large.tif"
    assert process.communicate(timeout=60)[1] == f"failed: `{slide}`: {told}\n"
    assert process.returncode == 1
    assert f',cluster,"`{slide}`: {told}"' in (out / "failed.csv").read_text()


def test_where_no_worker_is_left_somebody_says_so(
    drawn: Work, dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers die over a slide, and then it waits; a third does it in."""
    monkeypatch.setattr(cluster, "begin_slide", _deadly)
    monkeypatch.setattr(cluster, "WATCH_SECONDS", 1)
    told = threading.Event()
    real = cluster.Cluster._tell_of_rest

    def tell(self: cluster.Cluster, bar: Any) -> None:
        real(self, bar)
        if all(worker.poll() is not None for worker in dask.workers):
            told.set()

    monkeypatch.setattr(cluster.Cluster, "_tell_of_rest", tell)

    def come() -> None:
        told.wait(60)
        dask.workers.append(dask.add_worker())

    thread = threading.Thread(target=come)
    thread.start()
    table = write_table(tmp_path, {drawn.table.parent / "a.tif": 0.25})
    result = infer(table, drawn.model, tmp_path / "out", "--cluster", str(dask.file))
    thread.join()
    assert f"waiting: no worker with a GPU of {dask.file} runs (none is there); see their logs" in result.stderr
    assert "it killed 3 workers" in result.stderr


def test_a_slide_whose_regions_kill_their_workers_is_listed_once(
    drawn: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others are done by the workers that take the place of the dead."""
    monkeypatch.setattr(cluster, "make_region", _deadly)
    result = infer(drawn.table, drawn.model, tmp_path, "--cluster", "local:2")
    assert "2 failed" in result.output
    assert re.findall(r"(\w+).tif,(\w+),", (tmp_path / "failed.csv").read_text()) == [
        ("large", "cluster"),
        ("none", "open"),
    ]
    small = {name: content for name, content in drawn.here.items() if name.startswith(("a/", "b/"))}
    assert small.items() <= results(tmp_path).items()


def _deadly(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_local_cluster(drawn: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    sent: list[Any] = []
    limits: set[int] = set()
    submit, states = distributed.Client.submit, cluster.Cluster._states

    def told(self: cluster.Cluster) -> list[dict[str, Any]]:
        found = states(self)
        limits.update(worker["memory_limit"] for worker in found)
        return found

    monkeypatch.setattr(distributed.Client, "submit", lambda *a, **k: sent.append(a) or submit(*a, **k))
    monkeypatch.setattr(cluster.Cluster, "_states", told)
    result = infer(drawn.table, drawn.model, tmp_path, "--cluster", "local:2")
    assert "device: 2 workers of local:2, dashboard http" in result.output
    assert results(tmp_path) == drawn.here
    assert {task[2].settings.inputs for task in sent} == {()}, "of thousands each task would carry all"
    assert limits == {0}, "at a limit Dask would pause a worker for ever"


@pytest.mark.parametrize("there", ["another's file", "other settings"])
def test_results_that_may_not_be_replaced_are_refused_before_regions_are_made(
    drawn: Work, tmp_path: Path, there: str
) -> None:
    table, folder = write_table(tmp_path, {drawn.table.parent / "large.tif": 0.25}), tmp_path / "out" / "large"
    folder.mkdir(parents=True)
    if there == "another's file":
        (folder / "nuclei.csv").write_text("mine")
    else:
        slide = str((drawn.table.parent / "large.tif").resolve())
        (folder / "slide.json").write_text(json.dumps({"path": slide, "made_with": {"mpp": 0.1}}))
    result = infer(table, drawn.model, tmp_path / "out", "--cluster", "local:2")
    assert result.exit_code == 1
    assert ("is of no run of nsam" if there == "another's file" else "holds results of other settings") in result.stderr
    assert len(list(folder.iterdir())) == 1


def test_of_two_errors_in_a_slide_that_of_one_machine_is_told(tiny_model: Path, tmp_path: Path) -> None:
    """Though the region of the second may come to it sooner."""
    path = tmp_path / "damaged.tif"
    write_tiff(path, np.zeros((10 * 1024, 512, 3), np.uint8))
    with tifffile.TiffFile(path) as file:
        offsets = file.pages[0].dataoffsets
    with path.open("r+b") as stream:
        for tile, content in ((20, b"no zlib"), (len(offsets) // 2 + 2, zlib.compress(b"too short"))):
            stream.seek(offsets[tile])
            stream.write(content)
    table = write_table(tmp_path, {path: 0.25})
    failures = []
    for out, options in ((tmp_path / "here", ()), (tmp_path / "there", ("--cluster", "local:2"))):
        assert infer(table, tiny_model, out, "--no-tissue-mask", *options).exit_code == 1
        failures.append((out / "failed.csv").read_bytes())
    assert failures[0] == failures[1]
    assert b",read," in failures[0]


def test_paths_are_those_of_the_command_though_workers_run_elsewhere(
    drawn: Work, dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(drawn.table.parent)
    model, table = Path(os.path.relpath(drawn.model)), Path("relative.csv")
    table.write_text("path,mpp\na.tif,0.25\nnone.tif,0.25\n")
    assert infer(table, model, Path("alone")).exit_code == 1
    result = infer(table, model, Path("shared"), "--cluster", str(dask.file))
    assert "a.tif: 12 nuclei" in result.output
    gone = Path("none.tif").absolute()
    assert Path("shared/failed.csv").read_text().startswith(f"slide,stage,reason\n{gone},open,`none.tif`: ")
    assert results(Path("shared")) == results(Path("alone"))


def test_interrupted(drawn: Work, tmp_path: Path) -> None:
    """Ctrl-C, as a terminal sends it to every process: one line, nothing that lives on, and the next run goes on."""
    out = tmp_path / "out"
    table = write_table(tmp_path, {drawn.table.parent / "large.tif": 0.25})
    options = arguments(table, drawn.model, out, "--cluster", "local:2")
    process = subprocess.Popen(
        [sys.executable, "-m", "nsam.runtime.cli", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C and hand that down: tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(out.glob(f"large/{BANDS_NAME}/*.npz")) and time.monotonic() < deadline:
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted; finished slides are kept\n"
    assert process.returncode == 130
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert infer(table, drawn.model, out, "--cluster", "local:2").exit_code == 0
    assert results(out) == {name: content for name, content in drawn.here.items() if name.startswith("large/")}


@pytest.mark.parametrize("parts", [1, 2, 3, 16])
def test_regions_are_all_of_a_slide_and_even(parts: int) -> None:
    for bands in range(1, 70):
        regions = cut(bands, parts)
        sizes = [last - first for first, last in regions]
        assert (regions[0][0], regions[-1][1]) == (0, bands)
        assert all(last == first for (_, last), (first, _) in pairwise(regions))
        assert max(sizes) <= min(8, min(sizes) + 1)
        assert min(sizes) >= min(2, bands)


def test_where_workers_would_idle_slides_are_cut_for_each_of_them() -> None:
    assert idle_share([4, 1, 1, 1, 1], 2) == 0
    assert idle_share([6, 2], 2) == pytest.approx(1 / 3)
    assert idle_share([], 3) == idle_share([0], 3) == 0
    assert cut(6, 1) == [(0, 6)]
    assert cut(6, 2) == [(0, 3), (3, 6)]
    assert len(cut(59, 1)) == 8
    assert len(cut(59, 3)) == 9


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "missing.json", "local:none"])
def test_no_such_cluster(tiny_model: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    write_tiff(tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint8))
    result = infer(tmp_path / "a.tif", tiny_model, tmp_path / "out", "--cluster", address)
    assert result.exit_code == 2
    assert f"`--cluster {address}`: cannot be reached" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1

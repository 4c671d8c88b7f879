"""Several runs into one folder, as the jobs of an array: none disturbs another."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from nsam.runtime import batch, job, lock, report
from nsam.runtime.bands import BandStore
from nsam.runtime.cli import main
from nsam.runtime.errors import OutputError
from nsam.runtime.inputs import Source
from nsam.runtime.lock import alone
from nsam.runtime.outcome import Outcome
from nsam.runtime.results import read_failures


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path) -> list[str]:
    return ["--out", str(tmp_path / "out"), "--model", str(tiny_model), "--device", "cpu", "--threads", "1"]


@pytest.fixture
def infer(arguments: list[str]) -> Callable[..., Result]:
    return lambda *more: CliRunner().invoke(main, [*arguments, *map(str, more)], catch_exceptions=False)


@pytest.fixture
def slides(draw_discs: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in "abcd":
        Image.fromarray(draw_discs((200, 150), [(60, 60), (140, 100)], 16)).save(folder / f"{name}.png")
    return folder


def test_a_slide_that_another_run_is_writing_is_left_to_it(
    infer: Callable[..., Result], slides: Path, tmp_path: Path
) -> None:
    held = tmp_path / "out" / "b"
    with alone(held):
        result = infer(slides, "--mpp", 0.25)
        with pytest.raises(OutputError, match="another run is writing it"), alone(held):
            pass
    assert result.exit_code == 1
    assert "3 slides done, 0 skipped, 1 failed" in result.stdout
    assert result.stderr.strip() == (
        f"failed: `{held}`: another run is writing it; wait for its end, or pass another --out"
    )
    assert [row[:2] for row in read_failures(tmp_path / "out" / "failed.csv")] == [(str(slides / "b.png"), "busy")]
    assert not list(held.iterdir())
    assert infer(slides, "--mpp", 0.25).exit_code == 0
    assert not (tmp_path / "out" / "failed.csv").exists()


def test_a_slide_that_was_busy_is_looked_at_again(
    infer: Callable[..., Result], slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ExitStack()
    other.enter_context(alone(tmp_path / "out" / "b"))
    real = job.write_results

    def write(*arguments: Any) -> Any:
        if arguments[3].name == "c":
            other.close()  # it dies while this run does another slide
        return real(*arguments)

    monkeypatch.setattr(job, "write_results", write)
    result = infer(slides, "--mpp", 0.25)
    assert result.exit_code == 0, result.output
    assert f"{slides / 'b.png'}: another run is writing it; looked at again" in result.stdout
    assert "4 slides done, 0 skipped, 0 failed" in result.stdout


def test_a_slide_that_was_busy_twice_and_is_done_at_the_end(
    infer: Callable[..., Result], slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are busy; the other run ends one of them while this one works on the second."""
    out, opened = tmp_path / "out", []
    others = {name: ExitStack() for name in "ab"}
    for name, held in others.items():
        held.enter_context(alone(out / name))
    real = job.Job.opened

    @contextmanager
    def slow(self: job.Job, source: Source) -> Iterator[Any]:
        with real(self, source) as found:
            opened.append(source.path.stem)
            if opened.count("b") == 2 and source.path.stem == "b":
                for held in others.values():
                    held.close()
                assert "1 slides done" in infer(slides / "a.png", "--mpp", 0.25).stdout
            yield found

    monkeypatch.setattr(job.Job, "opened", slow)
    result = infer(slides, "--mpp", 0.25)
    assert result.exit_code == 0, result.output
    assert "3 slides done, 1 skipped, 0 failed" in result.stdout
    assert not (out / "failed.csv").exists()


def test_runs_do_not_lose_each_others_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = batch.read_failures

    def slow(path: Path) -> list[tuple[str, str, str]]:
        found = real(path)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(batch, "read_failures", slow)
    paths = [tmp_path / f"{name}.png" for name in "abcd"]

    def note(path: Path) -> None:
        table = tmp_path / "failed.csv"
        failed = [Outcome(Source(path), failure=("open", "broken"))]
        batch._write_failures(table, {str(path)}, failed, lock.Turns(table))

    with ThreadPoolExecutor(len(paths)) as pool:
        list(pool.map(note, paths))
    assert sorted(slide for slide, *_ in real(tmp_path / "failed.csv")) == sorted(map(str, paths))


def test_runs_write_their_report_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def write(out: Path) -> None:
        steps.append("begun")
        time.sleep(0.1)
        steps.append("ended")

    def run(_: int) -> None:
        with report.report_at_end(tmp_path):
            pass

    monkeypatch.setattr(report, "write_report", write)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    assert steps == ["begun", "ended"] * 3


def test_a_run_that_was_stopped_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.2)
    stopped, turns = lock.Turns(tmp_path / "a.csv"), lock.Turns(tmp_path / "a.csv")
    seconds = []
    with stopped.next():
        for _ in range(3):
            begin = time.monotonic()
            with turns.next():
                seconds.append(time.monotonic() - begin)
    assert seconds[0] > 0.2
    assert max(seconds[1:]) < 0.1
    assert caplog.text.count("another run holds it, and seems to be stopped; going on") == 1
    assert not list(tmp_path.iterdir())


def test_a_slide_that_another_run_ended_while_this_one_opened_it(
    infer: Callable[..., Result], slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, inside = job.Job.opened, []

    @contextmanager
    def slow(self: job.Job, source: Source) -> Iterator[Any]:
        with real(self, source) as found:
            if not inside:
                inside.append(source)
                assert "1 slides done" in infer(source.path, "--mpp", 0.25).stdout
            yield found

    monkeypatch.setattr(job.Job, "opened", slow)
    assert "0 slides done, 1 skipped, 0 failed" in infer(slides / "a.png", "--mpp", 0.25).stdout
    inside.clear()
    result = infer(slides / "b.png", "--mpp", 0.5)
    assert result.exit_code == 1
    assert "holds results of other settings" in result.stderr


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_name_that_another_run_has_taken_is_left_to_it(
    infer: Callable[..., Result],
    slides: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    """Runs choose names where they begin: of two that begin together both may choose the same for two slides."""
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        shutil.copyfile(slides / "a.png", tmp_path / folder / "a.png")
    infer(tmp_path / "x" / "a.png", "--mpp", 0.25)
    there = (tmp_path / "out" / "a" / "slide.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(batch, "folder_names", lambda paths, out: dict.fromkeys(paths, "a"))
        result = infer(tmp_path / "y" / "a.png", "--mpp", 0.25, *options)
    assert result.exit_code == 1
    assert f"another run has put results of `{tmp_path / 'x' / 'a.png'}` there; run this one again" in result.stderr
    assert (tmp_path / "out" / "a" / "slide.json").read_bytes() == there
    assert "1 slides done" in infer(tmp_path / "y" / "a.png", "--mpp", 0.25, *options).stdout
    assert (tmp_path / "out" / "y_a" / "slide.json").exists()


def test_what_a_killed_run_has_done_is_found_beside_more_slides(
    infer: Callable[..., Result], slides: Path, tmp_path: Path
) -> None:
    slide = slides / "a.png"
    BandStore(tmp_path / "out" / "a", {"path": str(slide), "run_hash": ""}).write(0, [])
    (tmp_path / "x").mkdir()
    shutil.copyfile(slide, tmp_path / "x" / "a.png")
    infer(slides, tmp_path / "x", "--mpp", 0.25)
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {"a", "b", "c", "d", "x_a"}
    assert json.loads((tmp_path / "out" / "a" / "slide.json").read_text())["path"] == str(slide)


def test_runs_of_other_settings_share_no_band(tmp_path: Path) -> None:
    ours, others = BandStore(tmp_path, {"key": "mpp .25"}), BandStore(tmp_path, {"key": "mpp .5"})
    ours.write(0, [])
    others.write(1, [])
    assert ours.has(0)
    assert not ours.has(1)
    assert not others.has(0)
    assert others.read(0) is None
    assert BandStore(tmp_path, {"key": "mpp .25"}).read(0) == []


def test_where_there_are_no_locks_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    for _ in range(2):
        with alone(tmp_path / "a"):
            pass
    assert caplog.text.count("files cannot be locked there (No locks available)") == 1
    assert not list((tmp_path / "a").iterdir())


def test_the_jobs_of_an_array_at_once(arguments: list[str], slides: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nsam.runtime.cli", *arguments, "--mpp", "0.25"]
    jobs = [
        subprocess.Popen([*command, str(slide)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for slide in sorted(slides.iterdir())
    ]
    told = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, told
    out = tmp_path / "out"
    for name in "abcd":
        assert json.loads((out / name / "slide.json").read_text())["nuclei"] == 2
    assert not list(out.rglob("*.part"))


def test_failures_of_other_slides_stay(infer: Callable[..., Result], slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (slides / "a.png").write_bytes(b"no image")
    assert infer(slides / "a.png", "--mpp", 0.25).exit_code == 1
    assert infer(slides / "b.png", "--mpp", 0.25).exit_code == 0
    assert [Path(slide).name for slide, *_ in read_failures(out / "failed.csv")] == ["a.png"]
    assert "a.png" in (out / "report.html").read_text(encoding="utf-8")
    (slides / "b.png").write_bytes(b"no image")
    infer(slides / "b.png", "--mpp", 0.25, "--overwrite")
    assert [Path(slide).name for slide, *_ in read_failures(out / "failed.csv")] == ["a.png", "b.png"]
    for name in "ab":
        (slides / f"{name}.png").write_bytes((slides / "c.png").read_bytes())
    assert infer(slides, "--mpp", 0.25, "--overwrite").exit_code == 0
    assert not (out / "failed.csv").exists()

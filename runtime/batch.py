"""A run over many slides: one's failure does not end it, and what is finished is kept."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from nsam.runtime import engines
from nsam.runtime.card import ModelCard
from nsam.runtime.errors import InputError, NsamError, OutputError
from nsam.runtime.inputs import find_slides, folder_names
from nsam.runtime.pipeline import segment_slide
from nsam.runtime.progress import progress
from nsam.runtime.report import report_at_end
from nsam.runtime.results import read_json
from nsam.runtime.settings import DONE_NAME, OUTPUTS, Settings
from nsam.runtime.sinks import check_parquet
from nsam.runtime.slides import Slide, open_slide
from nsam.runtime.writers import output_errors, write_results, write_text

_log = logging.getLogger(__name__)
_LIBRARIES = ("numpy", "opencv-python-headless", "scikit-image", "pillow", "tifffile", "openslide-python")


def run(settings: Settings) -> int:
    """Segment all slides of `settings.inputs` into `settings.out`, and tell the terminal of it.

    Returns:
        How many slides failed; `failed.csv` says why.

    Raises:
        NsamError: nothing was begun; inputs, output folder, model or device do not fit.
    """
    begin = time.monotonic()
    paths = find_slides(settings.inputs)
    if "parquet" in settings.outputs:
        check_parquet()
    _check_writable(settings.out)
    engine = engines.load(settings.model, settings.device, settings.threads, settings.tta)
    click.echo(f"device: {engine.device}")
    job = _Job(settings, engine, _run_hash(engine.card, settings))
    failed_csv = settings.out / "failed.csv"
    write_text(settings.out / "run.json", job.description())
    with output_errors(failed_csv):
        failed_csv.unlink(missing_ok=True)

    failures: list[tuple[Path, str, str]] = []
    done = skipped = nuclei = 0
    with report_at_end(settings.out), progress(len(paths)) as bar:
        for path, name in folder_names(paths).items():
            bar.begin(name)
            start = time.monotonic()
            try:
                found = job.segment(path, settings.out / name, bar.tiles)
            except _Failed as failure:
                bar.say(f"failed: {failure.reason}", error=True)
                _log.debug("%s", path, exc_info=failure.__cause__)
                failures.append((path, failure.stage, failure.reason))
                _write_failures(failed_csv, failures)
                continue
            if found is None:
                skipped += 1
                bar.say(f"{path}: done before, skipped")
            else:
                done, nuclei = done + 1, nuclei + found
                bar.say(f"{path}: {found} nuclei in {time.monotonic() - start:.1f} s")
    click.echo(
        f"{done} slides done, {skipped} skipped, {len(failures)} failed; "
        f"{nuclei} nuclei in {time.monotonic() - begin:.1f} s"
    )
    return len(failures)


class _Failed(Exception):
    """A slide failed at a stage: open, mpp, read, infer or write."""

    def __init__(self, stage: str, error: Exception) -> None:
        # Reading and writing go on while the network runs; their errors say so themselves.
        if stage == "infer" and isinstance(error, InputError):
            stage = "read"
        elif stage == "infer" and isinstance(error, OutputError):
            stage = "write"
        self.stage = stage
        self.reason = str(error)
        if not isinstance(error, NsamError):
            self.reason = f"unexpected: {type(error).__name__}: {error} (run with -v for the traceback)"


@contextmanager
def _at(stage: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _Failed(stage, error) from error


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is the same for all slides of a run."""

    settings: Settings
    engine: engines.Engine
    run_hash: str

    def description(self) -> str:
        """`run.json`."""
        card = self.engine.card
        return _json(
            {
                "settings": dataclasses.asdict(self.settings),
                "model": {
                    "name": card.name,
                    "version": card.version,
                    "sha256": card.files["model.onnx"].sha256,
                },
                "device": self.engine.device,
                "nsam": version("nsam"),
                "libraries": {name: version(name) for name in _LIBRARIES},
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "run_hash": self.run_hash,
            }
        )

    def segment(self, path: Path, folder: Path, on_progress: Callable[[int, int], None]) -> int | None:
        """Segment a slide and write its results; the number of nuclei, or None when that was done before.

        Raises:
            _Failed: with stage and reason.
        """
        outputs = self.settings.outputs
        with _at("write"):
            before = read_json(folder / DONE_NAME)  # empty if broken, for then nothing is finished
            same = before.get("run_hash") == self.run_hash and before.get("path") == str(path.resolve())
            if same and all((folder / OUTPUTS[name]).is_file() for name in outputs):
                return None
            if before and not same and not self.settings.overwrite:
                raise OutputError(
                    f"`{folder}`: holds results of other settings or of another slide "
                    f"({before.get('path')}); pass --overwrite, or another --out"
                )
        start = time.monotonic()
        with _at("open"):
            slide = open_slide(path)
        with slide:
            with _at("mpp"):
                mpp, mpp_source = _mpp(slide, self.settings.mpp)
            with _at("infer"):
                strips = segment_slide(slide, self.engine, mpp, batch=self.settings.batch, on_progress=on_progress)
                found = write_results(strips, slide, mpp, folder, outputs)
        width, height = slide.size_wh
        area_mm2 = width * height * mpp**2 / 1e6
        done = {
            "path": str(path.resolve()),
            "size_wh_px": [width, height],
            "mpp": mpp,
            "mpp_source": mpp_source,
            **found,
            "area_mm2": area_mm2,  # of the whole image, glass included
            "nuclei_per_mm2": found["nuclei"] / area_mm2,
            "seconds": round(time.monotonic() - start, 3),
            "nsam": version("nsam"),
            "run_hash": self.run_hash,
        }
        with _at("write"):
            if not same:  # what other settings left must not pass for a result of these
                for name in OUTPUTS.keys() - set(outputs):
                    (folder / OUTPUTS[name]).unlink(missing_ok=True)
            write_text(folder / DONE_NAME, _json(done))
        nuclei: int = found["nuclei"]
        return nuclei


def _mpp(slide: Slide, asked: float | None) -> tuple[float, str]:
    """µm per level-0 px, and who says so."""
    if asked is not None:
        return asked, "--mpp"
    if slide.mpp is None:
        raise InputError(f"`{slide.path}`: {slide.mpp_source}; pass --mpp (µm per px; 0.25 for most 40x scans)")
    return slide.mpp, slide.mpp_source


def _run_hash(card: ModelCard, settings: Settings) -> str:
    """A hash of all that changes the results."""
    parts = {
        "nsam": version("nsam"),
        "model": card.files["model.onnx"].sha256,
        "post": dataclasses.asdict(card.post),
        "mpp": settings.mpp,
        "tta": settings.tta,
    }
    return hashlib.sha256(_json(parts).encode()).hexdigest()[:16]


def _check_writable(out: Path) -> None:
    """Know before the work, not after it, that the results will have a place."""
    probe = out / ".nsam.part"
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def _write_failures(path: Path, failures: list[tuple[Path, str, str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("slide", "stage", "reason"))
    writer.writerows(failures)
    try:
        write_text(path, text.getvalue())
    except OutputError as error:  # a full disk, say; other slides may still be skipped or be told why they fail
        click.echo(str(error), err=True)


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n"

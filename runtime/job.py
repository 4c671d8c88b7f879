"""What is done with one slide, the same on one machine and on each worker of a cluster."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from nsam.runtime import engines
from nsam.runtime.bands import BandStore
from nsam.runtime.card import ModelCard
from nsam.runtime.errors import InputError, NsamError, OutputError
from nsam.runtime.frame import Frame
from nsam.runtime.pipeline import Progress, make_bands, segment_slide
from nsam.runtime.results import read_json
from nsam.runtime.settings import DONE_NAME, OUTPUTS, Settings
from nsam.runtime.slides import Slide, open_slide
from nsam.runtime.writers import write_results, write_text

_log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What became of a slide."""

    path: Path
    nuclei: int | None = None  # None: done before, or failed
    seconds: float = 0.0
    failure: tuple[str, str] | None = None  # stage and reason


class Failed(Exception):
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
def at(stage: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Failed(stage, error) from error


@dataclasses.dataclass(frozen=True)
class Job:
    """What is the same for all slides of a run; it travels to the workers of a cluster."""

    settings: Settings
    run_hash: str

    @classmethod
    def of(cls, settings: Settings, card: ModelCard) -> Job:
        """The job of a run with a model."""
        return cls(settings, run_hash_of(card, settings))

    def engine(self) -> engines.Engine:
        """The network, loaded once in each process.

        Raises:
            ModelError, DeviceError: see `engines.load`.
        """
        s = self.settings
        return _engine(self.run_hash, s.model, s.device, s.threads, s.tta, s.precision)

    def outcome(self, path: Path, folder: Path, on_progress: Progress = lambda done, total: None) -> Outcome:
        """Segment a slide and write its results; a failure is an outcome, too."""
        start = time.monotonic()
        try:
            nuclei = self.segment(path, folder, on_progress)
        except Failed as failure:
            _log.debug("%s", path, exc_info=failure.__cause__)
            return Outcome(path, failure=(failure.stage, failure.reason))
        return Outcome(path, nuclei, time.monotonic() - start)

    def segment(self, path: Path, folder: Path, on_progress: Progress) -> int | None:
        """Segment a slide and write its results; the number of nuclei, or None when that was done before.

        Raises:
            Failed: with stage and reason.
        """
        outputs = self.settings.outputs
        with at("write"):
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
        with self._opened(path) as (slide, mpp, mpp_source):
            store = self._store(path, folder, mpp)
            with at("infer"):
                strips = segment_slide(
                    slide,
                    self.engine(),
                    mpp,
                    batch=self.settings.batch,
                    workers=self._workers(),
                    store=store,
                    on_progress=on_progress,
                )
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
        with at("write"):
            if not same:  # what other settings left must not pass for a result of these
                for name in OUTPUTS.keys() - set(outputs):
                    (folder / OUTPUTS[name]).unlink(missing_ok=True)
            write_text(folder / DONE_NAME, to_json(done))
            store.clear()
        nuclei: int = found["nuclei"]
        return nuclei

    def count_bands(self, path: Path) -> int:
        """Bands of a slide.

        Raises:
            Failed: it cannot be read.
        """
        with self._opened(path) as (slide, mpp, _):
            return len(Frame.of(slide, engines.read_card(self.settings.model), mpp).bands)

    def make_bands(self, path: Path, folder: Path, first: int, last: int) -> None:
        """Make those of the bands [first, last) that are not there yet, for `segment` to find.

        Raises:
            Failed: with stage and reason.
        """
        with self._opened(path) as (slide, mpp, _), at("infer"):
            engine, store = self.engine(), self._store(path, folder, mpp)
            frame = Frame.of(slide, engine.card, mpp)
            first = next((band for band in range(first, last) if not store.has(band)), last)
            if first < last:
                made = make_bands(slide, engine, frame, first, last, batch=self.settings.batch, workers=self._workers())
                for band, nuclei in enumerate(made, first):
                    store.write(band, nuclei)

    @contextmanager
    def _opened(self, path: Path) -> Iterator[tuple[Slide, float, str]]:
        """The slide, its µm per px, and who says so."""
        with at("open"):
            slide = open_slide(path)
        with slide:
            with at("mpp"):
                mpp, source = _mpp(slide, self.settings.mpp)
            yield slide, mpp, source

    def _store(self, path: Path, folder: Path, mpp: float) -> BandStore:
        return BandStore(folder, f"{self.run_hash} {path.resolve()} {path.stat().st_mtime_ns} {mpp}")

    def _workers(self) -> int:
        return self.settings.workers or max(1, engines.available_cores() // 2)


@lru_cache(maxsize=1)
def _engine(run_hash: str, *arguments: Any) -> engines.Engine:
    return engines.load(*arguments)


def _mpp(slide: Slide, asked: float | None) -> tuple[float, str]:
    """µm per level-0 px, and who says so."""
    if asked is not None:
        return asked, "--mpp"
    if slide.mpp is None:
        raise InputError(f"`{slide.path}`: {slide.mpp_source}; pass --mpp (µm per px; 0.25 for most 40x scans)")
    return slide.mpp, slide.mpp_source


def run_hash_of(card: ModelCard, settings: Settings) -> str:
    """A hash of all that changes the results."""
    parts = {
        "nsam": version("nsam"),
        "model": card.files["model.onnx"].sha256,
        "post": dataclasses.asdict(card.post),
        "mpp": settings.mpp,
        "tta": settings.tta,
    }
    return hashlib.sha256(to_json(parts).encode()).hexdigest()[:16]


def to_json(data: dict[str, Any]) -> str:
    """Text of a JSON file."""
    return json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n"

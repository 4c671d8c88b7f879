"""What is done with one slide, the same on one machine and on each worker of a cluster."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from nsam.runtime import engines
from nsam.runtime.bands import BandStore
from nsam.runtime.card import ModelCard
from nsam.runtime.done import about, earlier, made_with
from nsam.runtime.errors import InputError
from nsam.runtime.files import output_errors, printable, to_json, write_text
from nsam.runtime.frame import Frame
from nsam.runtime.inputs import Source
from nsam.runtime.lock import alone
from nsam.runtime.outcome import Failed, Outcome, at
from nsam.runtime.pipeline import Progress, make_bands, segment_slide
from nsam.runtime.region import Region
from nsam.runtime.settings import DONE_NAME, OUTPUTS, Settings
from nsam.runtime.slides import Slide, open_slide
from nsam.runtime.writers import write_results

_log = logging.getLogger(__name__)

#: Of the user's and the slide's own mpp: more is worth a word, for sizes and densities hang on it.
_MPP_DIFFERS, _AGAINST = 0.05, ", against "
#: Times the mpp at which the network was trained.
_COARSE = 2


@dataclasses.dataclass(frozen=True)
class Job:
    """What is the same for all slides of a run; it travels to the workers of a cluster."""

    settings: Settings
    card: ModelCard  # the model's, at the scale that was asked for
    trained_mpp: float  # the model's own scale
    made_with: dict[str, Any]  # see `done.made_with`

    @classmethod
    def of(cls, settings: Settings) -> Job:
        """The job of a run.

        Raises:
            ModelError: see `engines.read_card` and `ModelCard.shown_at`.
        """
        own = engines.read_card(settings.model)
        card = own.shown_at(settings.network_mpp)
        return cls(settings, card, own.input.mpp, made_with(card, settings))

    def engine(self) -> engines.Engine:
        """The network, loaded once in each process.

        Raises:
            ModelError, DeviceError: see `engines.load`.
        """
        s = self.settings
        return _engine(self.card.to_json(), s.model, s.device, s.threads, s.tta, s.precision, s.network_mpp)

    def outcome(self, source: Source, folder: Path, on_progress: Progress = lambda done, total: None) -> Outcome:
        """Segment a slide and write its results; a failure is an outcome, too."""
        start = time.monotonic()
        try:
            done = self.segment(source, folder, on_progress)
        except Failed as failure:
            _log.debug("%s", source.path, exc_info=failure.__cause__)
            return Outcome(source, failure=(failure.stage, failure.reason))
        if done is None:
            return Outcome(source)
        return Outcome(
            source,
            done["nuclei"],
            done["region_mm2"],
            time.monotonic() - start,
            (*_remarks(done), *self.too_coarse(done["mpp"])),
        )

    def segment(self, source: Source, folder: Path, on_progress: Progress) -> dict[str, Any] | None:
        """Segment a slide and write its results; what `slide.json` says, or None when that was done before.

        Raises:
            Failed: with stage and reason.
        """
        wanted = self._about(source)
        if self._earlier(wanted, folder)[1]:
            return None
        start = time.monotonic()
        with self.opened(source) as (slide, frame, mpp_source), at("infer"), alone(folder):
            if self._earlier(wanted, folder)[1]:  # another run may have ended by now
                return None
            engine = self.engine()
            # What is added to earlier results must be of their precision, and so must bands.
            wanted = {**wanted, "precision": engine.precision}
            same, _ = self._earlier(wanted, folder)
            store = BandStore(folder, {**wanted, "mpp": frame.mpp})
            strips = segment_slide(
                slide,
                engine,
                frame.mpp,
                region=frame.region,
                batch=self.settings.batch,
                workers=self._workers(),
                store=store,
                on_progress=on_progress,
            )
            # Closed before the slide is: what is suspended in it has threads that read.
            with closing(strips):
                found = write_results(strips, slide, frame.mpp, folder, self.settings.outputs, frame.region)
            done = {
                **wanted,
                **_facts(slide, frame, mpp_source, found),
                "seconds": round(time.monotonic() - start, 3),
                "device": engine.device,
            }
            if not same:  # what other settings left must not pass for a result of these
                with output_errors(folder):
                    for name in OUTPUTS.keys() - set(self.settings.outputs):
                        (folder / OUTPUTS[name]).unlink(missing_ok=True)
            write_text(folder / DONE_NAME, to_json(done))
            store.clear()
        return done

    def too_coarse(self, mpp: float) -> tuple[str, ...]:
        """A remark where a slide cannot show the network what it was trained on."""
        if mpp <= _COARSE * self.trained_mpp:
            return ()
        trained = f"a network that was trained at {self.trained_mpp:g}"
        return (f"{mpp:g} µm/px is too coarse for {trained}: nuclei will be missed",)

    def is_done(self, source: Source, folder: Path) -> bool:
        """Whether all that is asked for of a slide is there.

        Raises:
            Failed: there are other results, which may not be overwritten.
        """
        return self._earlier(self._about(source), folder)[1]

    def make_bands(self, source: Source, folder: Path, first: int, last: int) -> None:
        """Make those of the bands [first, last) that are not there yet, for `segment` to find.

        Raises:
            Failed: with stage and reason.
        """
        wanted = self._about(source)
        with self.opened(source) as (slide, frame, _), at("infer"):
            engine = self.engine()
            wanted = {**wanted, "precision": engine.precision}
            self._earlier(wanted, folder)  # here, not after hours
            store = BandStore(folder, {**wanted, "mpp": frame.mpp})
            first = next((band for band in range(first, last) if not store.has(band)), last)
            if first < last:
                made = make_bands(slide, engine, frame, first, last, batch=self.settings.batch, workers=self._workers())
                with closing(made):
                    for band, nuclei in enumerate(made, first):
                        store.write(band, nuclei)

    @contextmanager
    def opened(self, source: Source) -> Iterator[tuple[Slide, Frame, str]]:
        """A slide, how it is cut, and who says its mpp.

        Raises:
            Failed: with stage and reason.
        """
        s = self.settings
        with at("open"):
            _check_name(source.path)
            slide = open_slide(source.path)
        with slide:
            with at("mpp"):
                mpp, mpp_source = _mpp(slide, source.mpp, s.mpp)
            with at("mask" if source.mask else "read"):
                region = Region.of(slide, mpp, mask=source.mask, tissue=s.tissue_mask, roi=s.roi)
            yield slide, Frame.of(slide, self.card, mpp, region), mpp_source

    def _about(self, source: Source) -> dict[str, Any]:
        with at("mask"):
            return about(source, self.made_with, self.settings.precision)

    def _earlier(self, wanted: dict[str, Any], folder: Path) -> tuple[bool, bool]:
        with at("write"):
            return earlier(folder, wanted, self.settings, self.card)

    def _workers(self) -> int:
        return self.settings.workers or max(1, engines.available_cores() // 2)


@lru_cache(maxsize=1)
def _engine(card: str, *arguments: Any) -> engines.Engine:
    return engines.load(*arguments)


def _facts(slide: Slide, frame: Frame, mpp_source: str, found: dict[str, Any]) -> dict[str, Any]:
    """What `slide.json` says of the slide and of the part of it that was worked on."""
    mpp = frame.mpp
    width, height = slide.size_wh
    region_mm2 = frame.region.area_px * mpp**2 / 1e6
    tiles = sum(map(len, frame.tiles))
    return {
        "size_wh_px": [width, height],
        "mpp": mpp,
        "mpp_source": mpp_source,
        "origin_xy_px": list(slide.origin_xy),  # of the GeoJSON; all else counts from the file's own corner
        **found,
        "area_mm2": width * height * mpp**2 / 1e6,
        "region_mm2": region_mm2,  # tissue, the mask or the rectangle
        "nuclei_per_mm2": found["nuclei"] / region_mm2 if region_mm2 else 0.0,
        "tile_px": frame.tile_px,  # side of the network's tiles, px at the model's scale
        "tiles": tiles,
        "tiles_skipped": tiles - frame.tiles_wanted,
    }


def _check_name(path: Path) -> None:
    """Results hold the slide's name, as text."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"`{printable(path)}`: its name is no UTF-8; rename it") from error


def _mpp(slide: Slide, *asked: float | None) -> tuple[float, str]:
    """µm per level-0 px, and who says so: the table, the command, or the slide; and who says otherwise."""
    own, said_by = slide.mpp, slide.mpp_source
    for mpp, name in zip(asked, ("the table", "--mpp"), strict=True):
        if mpp is not None:
            differs = own is not None and not said_by.startswith("assumed") and abs(mpp / own - 1) > _MPP_DIFFERS
            return mpp, f"{name}{_AGAINST}{own:.4g} by {said_by}" if differs else name
    if own is None:
        raise InputError(
            f"`{slide.path}`: {said_by}; pass --mpp (µm per px; 0.25 for most 40x scans), which holds for all slides, "
            "or a table with the column mpp"
        )
    return own, said_by


def _remarks(done: dict[str, Any]) -> tuple[str, ...]:
    remarks = []
    if done["mpp_source"].startswith("assumed"):
        remarks.append(f"{done['mpp']:g} µm/px is {done['mpp_source']}; pass --mpp if that is wrong")
    elif _AGAINST in done["mpp_source"]:
        table = "; a table gives each slide its own" if done["mpp_source"].startswith("--mpp") else ""
        remarks.append(f"{done['mpp']:g} µm/px by {done['mpp_source']}{table}")
    if done["cut_by_halo"]:
        remarks.append(
            f"{done['cut_by_halo']} nuclei are larger than what a block reads, or lie in one that is, and may be cut"
        )
    return tuple(remarks)

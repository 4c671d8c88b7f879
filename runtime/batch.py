"""A run over many slides: one's failure does not end it, and what is finished is kept."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import click

from nsam.runtime.done import hash_of
from nsam.runtime.errors import OutputError
from nsam.runtime.files import output_errors, printable, to_json, write_csv, write_text
from nsam.runtime.inputs import Source, find_slides, folder_names
from nsam.runtime.job import Job
from nsam.runtime.lock import Turns
from nsam.runtime.outcome import Failed, Outcome
from nsam.runtime.progress import Progress, progress
from nsam.runtime.report import report_at_end
from nsam.runtime.results import FAILED_NAME, RUN_NAME, RUN_NAMES, UNREADABLE, read_failures, read_json
from nsam.runtime.settings import Settings
from nsam.runtime.sinks import check_parquet

_LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "tifffile", "openslide-python")


def run(settings: Settings) -> int:
    """Segment all slides of `settings.inputs` into `settings.out`, and tell the terminal of it.

    Returns:
        How many slides failed; `failed.csv` says why.

    Raises:
        NsamError: nothing was begun; inputs, output folder, model, device or cluster do not fit.
    """
    begin = time.monotonic()
    sources = find_slides(settings.inputs, settings.mask_dir)
    if "parquet" in settings.outputs:
        check_parquet()
    _check_writable(settings.out)
    if not settings.overwrite:
        _check_ours(settings.out)
    job = Job.of(settings)
    with _place(settings) as place, progress(len(sources)) as bar:
        device = place.begin(job)
        bar.say(f"device: {device}")
        write_text(settings.out / RUN_NAME, describe(job, device))
        with report_at_end(settings.out):
            tally = _segment(sources, place, job, bar)
    seconds = time.monotonic() - begin
    click.echo(
        f"{tally.done} slides done, {tally.skipped} skipped, {len(tally.failures)} failed; "
        f"{tally.nuclei} nuclei in {tally.mm2:.3g} mm², {seconds:.1f} s ({tally.mm2 / seconds:.2g} mm²/s)"
    )
    return len(tally.failures)


@dataclasses.dataclass
class _Tally:
    """What has become of a run's slides."""

    done: int = 0
    skipped: int = 0
    nuclei: int = 0
    mm2: float = 0.0
    failures: list[Outcome] = dataclasses.field(default_factory=list)


def _segment(sources: list[Source], place: Place, job: Job, bar: Progress) -> _Tally:
    """Work on all slides, tell of each, and keep `failed.csv`."""
    out = job.settings.out
    names = folder_names([source.path for source in sources], out)
    work = {source: out / names[source.path] for source in sources}
    order = {source: i for i, source in enumerate(sources)}
    ours = {printable(name) for source in sources for name in (source.path.absolute(), source.real_path)}
    tally, turns = _Tally(), Turns(out / FAILED_NAME)

    def note() -> None:
        try:
            _write_failures(out / FAILED_NAME, ours, tally.failures, turns)
        except OutputError as error:  # a full disk, say; others may still be skipped or be told why they fail
            bar.say(str(error), error=True)

    _write_failures(out / FAILED_NAME, ours, [], turns)
    for outcome in _outcomes(place, job, work, bar):
        path = outcome.source.path
        if outcome.failure:
            bar.say(f"failed: {outcome.failure[1]}", error=True)
            tally.failures = sorted([*tally.failures, outcome], key=lambda failed: order[failed.source])
            note()
        elif outcome.nuclei is None:
            tally.skipped += 1
            bar.say(f"{path}: done before, skipped")
        else:
            tally.done += 1
            tally.nuclei += outcome.nuclei
            tally.mm2 += outcome.mm2
            bar.say(
                f"{path}: {outcome.nuclei} nuclei in {outcome.mm2:.3g} mm², {outcome.seconds:.1f} s "
                f"({outcome.mm2 / outcome.seconds:.2g} mm²/s)"
            )
            for remark in outcome.remarks:
                bar.say(f"{path}: {remark}")
    note()  # another run, too, may have said something of these slides that no longer holds
    return tally


def _outcomes(place: Place, job: Job, work: dict[Source, Path], bar: Progress) -> Iterator[Outcome]:
    """What becomes of each slide; those that another run is writing are looked at again when the others are done."""
    busy: dict[Source, Path] = {}
    for outcome in place.outcomes(job, work, bar):
        if _is_busy(outcome):
            busy[outcome.source] = work[outcome.source]
            bar.say(f"{outcome.source.path}: another run is writing it; looked at again when the others are done")
        else:
            yield outcome
    still = []
    for outcome in place.outcomes(job, busy, bar) if busy else ():
        if _is_busy(outcome):
            still.append(outcome)
        else:
            yield outcome
    for outcome in still:  # it may have ended while this run did others
        try:
            done = job.is_done(outcome.source, work[outcome.source])
        except Failed as failure:
            yield Outcome(outcome.source, failure=(failure.stage, failure.reason))
        else:
            yield Outcome(outcome.source) if done else outcome


def _is_busy(outcome: Outcome) -> bool:
    return outcome.failure is not None and outcome.failure[0] == "busy"


class Place(Protocol):
    """Where the slides of a run are worked on."""

    def begin(self, job: Job) -> str:
        """Get ready; what runs the network, for people.

        Raises:
            NsamError: it cannot.
        """

    def outcomes(self, job: Job, work: dict[Source, Path], bar: Progress) -> Iterator[Outcome]:
        """Work on each slide into its folder; outcomes as they come."""


class Here:
    """This process, one slide after the other."""

    def begin(self, job: Job) -> str:
        """See `Place`."""
        return job.engine().device

    def outcomes(self, job: Job, work: dict[Source, Path], bar: Progress) -> Iterator[Outcome]:
        """See `Place`."""
        for source, folder in work.items():
            bar.begin(folder.name)
            yield job.outcome(source, folder, bar.tiles)


@contextmanager
def _place(settings: Settings) -> Iterator[Place]:
    if settings.cluster is None:
        yield Here()
        return
    # Late: most runs need no Dask.
    from nsam.runtime.cluster import Cluster

    with Cluster(settings.cluster) as cluster:
        yield cluster


def describe(job: Job, device: str) -> str:
    """`run.json`."""
    card = job.card
    return to_json(
        {
            "settings": dataclasses.asdict(job.settings),
            "model": {"name": card.name, "version": card.version, "sha256": card.files["model.onnx"].sha256},
            "device": device,
            "nsam": version("nsam"),
            "libraries": {name: version(name) for name in _LIBRARIES},
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "run_hash": hash_of(job.made_with),
            "made_with": job.made_with,
        }
    )


def _check_writable(out: Path) -> None:
    """Know before the work, not after it, that the results will have a place."""
    probe = out / ".nsam.part"
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # by another run


def _check_ours(out: Path) -> None:
    """Files of these names may be somebody else's."""
    there = [out / name for name in RUN_NAMES if (out / name).exists()]
    if there and not {"nsam", "settings"} <= read_json(out / RUN_NAME).keys():
        raise OutputError(f"`{there[0]}`: is of no run of nsam; pass --overwrite to replace it, or another --out")


def _write_failures(path: Path, ours: set[str], failures: list[Outcome], turns: Turns) -> None:
    """`failed.csv`: what earlier runs, or others beside this one, say of slides that are not of this run; then its own.

    Raises:
        OutputError: it cannot be written.
    """
    with turns.next():  # runs that share it would lose each other's lines
        # By its name first: to follow this run's own links again at each failure would take the square of their number.
        rows = [
            row
            for row in read_failures(path)
            if row[1] != UNREADABLE and row[0] not in ours and os.path.realpath(row[0]) not in ours
        ]
        # Whole paths: the next run may begin in another folder.
        rows += [(str(failed.source.path.absolute()), *(failed.failure or ("", ""))) for failed in failures]
        if not rows:
            with output_errors(path):
                path.unlink(missing_ok=True)
            return
        write_csv(path, ("slide", "stage", "reason"), rows)

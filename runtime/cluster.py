"""A run over the workers of a Dask cluster: slides, and regions of large ones, go where there is room.

Workers need the light runtime, the slides and the output folder at the same paths. What a worker does is what one
machine does (`Job`); bands of a slide that several of them make are put together as after a resumed run. So the
results are the same to the byte, and a worker that dies loses its present task only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from heapq import heapreplace
from importlib import import_module
from itertools import pairwise
from multiprocessing import resource_tracker
from operator import itemgetter
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from nsam.runtime.engines import available_cores
from nsam.runtime.errors import DeviceError, first_line
from nsam.runtime.inputs import Source
from nsam.runtime.interrupts import uninterrupted
from nsam.runtime.job import Job
from nsam.runtime.outcome import Failed, Outcome
from nsam.runtime.progress import Progress

#: Bands of 1024 px that go to one worker at a time: some minutes on a CPU. A region and the next both predict the tiles
#: between them: 2 to 8 % more.
REGION_BANDS = 8
#: The least that is worth a region where workers would idle: 6 to 30 % more.
LEAST_BANDS = 2
#: Idle share of the workers' time that is not worth such regions.
IDLE = 0.1
#: Workers that may die over a task before it is given up, where the scheduler is ours.
TRIES = 3
CONNECT_SECONDS = 30
#: Without a result, after which somebody looks whether any worker works.
WATCH_SECONDS = 60

#: A worker of several threads still runs one network at a time: it has all of them.
_turn = threading.Lock()


class Cluster:
    """A place for slides; see `batch.Place`."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: `tcp://host:port`, the path of a scheduler file, `local` or `local:N`.
        """
        self._address = address
        self._client: Any = None
        self._local: Any = None
        self._workers = 1
        #: Of a task: where workers say that they have GPUs (`dask worker --resources GPU=1`), one of them.
        self._resources: dict[str, int] = {}

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for part in (self._client, self._local):
            if part is not None:
                part.close(timeout=5)

    def begin(self, job: Job) -> str:
        """Connect, and wait for a worker.

        Raises:
            DeviceError: Dask is missing, or there is no such cluster.
        """
        try:
            dask, distributed = _dask()
        except ImportError as error:
            raise DeviceError("`--cluster`: Dask is not installed; pip install 'nsam[cluster]'") from error
        if not logging.getLogger("nsam").isEnabledFor(logging.DEBUG):
            for name in ("distributed", "distributed.client"):  # what matters comes back as an outcome
                logging.getLogger(name).setLevel(logging.CRITICAL)
        dask.config.set(
            {
                "distributed.scheduler.allowed-failures": TRIES - 1,
                # How often slides that wait behind a long one go to a worker that idles; 1 s elsewhere.
                "distributed.scheduler.work-stealing-interval": "100ms",
                "distributed.logging.distributed": "error",
            }
        )
        try:
            if self._address.partition(":")[0] == "local":
                resource_tracker.ensure_running()  # multiprocessing's: started inside, it would let Ctrl-C in
                # Dask's start answers Ctrl-C with tracebacks, and so do workers, to which a terminal sends it as well.
                with uninterrupted():
                    self._local = distributed.LocalCluster(
                        n_workers=_count(self._address),
                        threads_per_worker=1,
                        memory_limit=None,  # what a slide needs does not shrink by waiting
                        dashboard_address=":0",
                        silence_logs=50,
                    )
                    self._client = distributed.Client(self._local)
            elif "://" in self._address:
                self._client = distributed.Client(self._address, timeout=CONNECT_SECONDS)
            elif not Path(self._address).is_file():  # Dask would wait for it without end
                raise ValueError("no such scheduler file")
            else:
                self._client = distributed.Client(scheduler_file=self._address, timeout=CONNECT_SECONDS)
            self._client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except (OSError, TimeoutError, asyncio.TimeoutError, ValueError) as error:  # the third: Python 3.10
            raise DeviceError(
                f"`--cluster {self._address}`: cannot be reached ({error}); give the scheduler's tcp://HOST:PORT, its "
                "file, or local:N"
            ) from error
        workers = self._states()
        gpus = sum("GPU" in worker["resources"] for worker in workers)
        self._resources = {"GPU": 1} if gpus else {}
        self._workers = gpus or len(workers)
        return f"{len(workers)} workers of {self._address}, dashboard {self._client.dashboard_link}"

    def outcomes(self, job: Job, work: dict[Source, Path], bar: Progress) -> Iterator[Outcome]:
        """See `batch.Place`."""
        settings = job.settings
        if self._local and settings.threads is None:  # elsewhere a worker takes what its machine gives it
            settings = dataclasses.replace(settings, threads=max(1, available_cores() // self._workers))
        model = settings.model and settings.model.absolute()  # a worker may run in another folder
        job = dataclasses.replace(job, settings=dataclasses.replace(settings, model=model, inputs=()))  # thousands
        regions_left: dict[Source, int] = {}
        sources: dict[Any, Source] = {}
        ended: Queue[Any] = Queue()

        def submit(priority: int, kind: Any, source: Source, *arguments: Any) -> None:
            there = source._replace(path=source.path.absolute(), mask=source.mask and source.mask.absolute())
            task = (kind, job, there, work[source].absolute(), *arguments)
            future = self._client.submit(*task, pure=False, resources=self._resources, priority=priority)
            sources[future] = source
            future.add_done_callback(ended.put)

        # Largest first, by the files' sizes, as thousands may be waiting: the small ones fill what is left of the
        # workers' time at the end.
        slides = sorted(((source.size, source) for source in work), key=itemgetter(0), reverse=True)
        idle = idle_share([size for size, _ in slides], self._workers)
        for _, source in slides:
            submit(0, begin_slide, source, self._workers if idle > IDLE else 1)
        while sources:
            try:
                future = ended.get(timeout=WATCH_SECONDS)
            except Empty:
                self._tell_of_rest(bar)
                continue
            if future not in sources:  # of a slide that was given up
                continue
            source = sources.pop(future)
            try:
                result = future.result()
            except Exception as error:  # Dask's own: a task that killed its workers, a lost connection
                result = Outcome(source, failure=("cluster", f"`{source.path}`: {_reason(error)}"))
                for other in [other for other, its in sources.items() if its == source]:
                    del sources[other]
                    self._client.cancel(other)
            # What is begun goes first: else a large slide would be put together last, by one worker alone.
            if isinstance(result, list):
                regions_left[source] = len(result)
                for region in result:
                    submit(1, make_region, source, *region)
            elif result is None:  # a region is made
                regions_left[source] -= 1
                if regions_left[source] == 0:
                    submit(2, finish_slide, source)
            else:
                bar.begin(work[source].name)
                yield _as_given(result, source, work[source])

    def _states(self) -> list[dict[str, Any]]:
        return list(self._client.scheduler_info(n_workers=-1)["workers"].values())

    def _tell_of_rest(self, bar: Progress) -> None:
        """Say so where slides wait, and no worker works."""
        fit = [worker for worker in self._states() if self._resources.keys() <= worker["resources"].keys()]
        states = Counter(worker["status"] for worker in fit)
        if not states["running"]:
            told = ", ".join(f"{count} {state}" for state, count in states.items()) or "none is there"
            gpu = " with a GPU" if self._resources else ""
            bar.say(
                f"waiting: no worker{gpu} of {self._address} runs ({told}); see their logs, or add workers", error=True
            )


def begin_slide(job: Job, source: Source, folder: Path, parts: int) -> Outcome | list[tuple[int, int]]:
    """On a worker: segment a small slide whole; of a large one only the bands [first, last) of its regions."""
    regions = []
    with suppress(Failed):  # `finish_slide` meets it again, and tells
        if not job.is_done(source, folder):
            with job.opened(source) as (_, frame, _):
                regions = cut(len(frame.bands), parts)
    return regions if len(regions) > 1 else finish_slide(job, source, folder)


def make_region(job: Job, source: Source, folder: Path, first: int, last: int) -> None:
    """On a worker: make bands [first, last) and keep them beside the results.

    What fails is left to `finish_slide`: of several errors in a slide it tells the one that one machine meets first.
    """
    with _turn, suppress(Failed):
        job.make_bands(source, folder, first, last)


def finish_slide(job: Job, source: Source, folder: Path) -> Outcome:
    """On a worker: all that is left of a slide."""
    with _turn:
        return job.outcome(source, folder)


def cut(bands: int, parts: int) -> list[tuple[int, int]]:
    """Even regions [first, last) of a slide, at most `REGION_BANDS` each; a multiple of `parts` if it is so large."""
    count = -(-bands // REGION_BANDS)
    if parts > 1:
        count = max(count, min(-(-count // parts) * parts, bands // LEAST_BANDS))
    return list(pairwise(bands * i // count for i in range(count + 1)))


def idle_share(sizes: list[int], workers: int) -> float:
    """Share of the workers' time that is idle when each takes the next of these as soon as it is free."""
    loads = [0] * workers
    for size in sizes:
        heapreplace(loads, loads[0] + size)
    return 1 - sum(sizes) / (max(loads) * workers) if any(sizes) else 0.0


def _as_given(outcome: Outcome, source: Source, folder: Path) -> Outcome:
    """A worker's outcome with the user's paths, as one machine tells it."""
    stage, reason = outcome.failure or ("", "")
    for path in filter(None, (source.path, source.mask, folder)):
        reason = reason.replace(str(path.absolute()), str(path))
    return outcome._replace(source=source, failure=(stage, reason) if outcome.failure else None)


def _dask() -> tuple[Any, Any]:
    """The modules dask and distributed, which are untyped."""
    return import_module("dask"), import_module("distributed")


def _count(address: str) -> int:
    number = address.partition(":")[2] or str(max(1, available_cores() // 2))
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"`{number}` is no number of processes")
    return int(number)


def _reason(error: Exception) -> str:
    if isinstance(error, _dask()[1].KilledWorker):
        # How many are allowed is the scheduler's setting, distributed.scheduler.allowed-failures.
        return f"it killed {error.allowed_failures + 1} workers, one after the other; see their logs (out of memory?)"
    if isinstance(error, CancelledError):
        return "the scheduler is gone; see its log, and run again: what is finished is skipped"
    return f"unexpected: {type(error).__name__}: {first_line(error)}"

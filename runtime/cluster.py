"""A run over the workers of a Dask cluster: slides, and regions of large ones, go where there is room.

Workers need the light runtime, the slides and the output folder at the same paths. What a worker does is what one
machine does (`Job`); bands of a slide that several of them make are put together as after a resumed run. So the
results are the same to the byte, and a worker that dies loses its present task only.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from nsam.runtime.errors import DeviceError, NsamError, first_line
from nsam.runtime.inputs import Source
from nsam.runtime.job import Job
from nsam.runtime.outcome import Failed, Outcome
from nsam.runtime.progress import Progress

#: Bands of 1024 px that go to one worker at a time: some minutes on a CPU.
REGION_BANDS = 8
#: Workers that may die over a task before it is given up, where the scheduler is ours.
TRIES = 3
CONNECT_SECONDS = 30

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
            logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters comes back as an outcome
        dask.config.set(
            {"distributed.scheduler.allowed-failures": TRIES - 1, "distributed.logging.distributed": "error"}
        )
        try:
            if self._address.partition(":")[0] == "local":
                self._local = distributed.LocalCluster(
                    n_workers=_count(self._address), threads_per_worker=1, dashboard_address=":0", silence_logs=50
                )
                self._client = distributed.Client(self._local)
            elif "://" in self._address:
                self._client = distributed.Client(self._address, timeout=CONNECT_SECONDS)
            elif not Path(self._address).is_file():  # Dask would wait for it without end
                raise ValueError("no such scheduler file")
            else:
                self._client = distributed.Client(scheduler_file=self._address, timeout=CONNECT_SECONDS)
            self._client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except (OSError, TimeoutError, ValueError) as error:
            raise DeviceError(
                f"`--cluster {self._address}`: cannot be reached ({error}); give the scheduler's tcp://HOST:PORT, its "
                "file, or local:N"
            ) from error
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        if any("GPU" in worker["resources"] for worker in workers.values()):
            self._resources = {"GPU": 1}
        return f"{len(workers)} workers of {self._address}, dashboard {self._client.dashboard_link}"

    def outcomes(self, job: Job, work: dict[Source, Path], bar: Progress) -> Iterator[Outcome]:
        """See `batch.Place`."""
        if job.settings.threads is None:
            job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, threads=self._threads()))
        regions_left: dict[Source, int] = {}
        sources: dict[str, Source] = {}
        told: set[Source] = set()
        running = _dask()[1].as_completed()

        def submit(kind: Any, source: Source, *arguments: Any) -> None:
            future = self._client.submit(kind, job, source, *arguments, pure=False, resources=self._resources)
            sources[future.key] = source
            running.add(future)

        for source, folder in work.items():
            submit(begin_slide, source, folder)
        for future in running:
            source = sources.pop(future.key)
            folder = work[source]
            try:
                result = future.result()
            except Exception as error:  # Dask's own: a task that killed its workers, a lost connection
                result = Outcome(source, failure=("cluster", _reason(error)))
            if isinstance(result, int):  # a large slide: so many bands
                regions_left[source] = -(-result // REGION_BANDS)
                for first in range(0, result, REGION_BANDS):
                    submit(make_region, source, folder, first, min(first + REGION_BANDS, result))
            elif result is None:  # a region is made
                regions_left[source] -= 1
                if regions_left[source] == 0:
                    submit(finish_slide, source, folder)
            elif source not in told:  # of a slide's regions more than one may fail
                told.add(source)
                bar.begin(folder.name)
                yield result

    def _threads(self) -> int | None:
        """Cores for each worker of a local cluster; elsewhere a worker takes what its machine gives it."""
        from nsam.runtime.engines import available_cores

        if self._local is None:
            return None
        return max(1, available_cores() // len(self._local.workers))


def begin_slide(job: Job, source: Source, folder: Path) -> Outcome | int:
    """On a worker: segment a small slide whole; of a large one only the number of its bands."""
    try:
        with job.opened(source) as (_, frame, _):
            bands = len(frame.bands)
    except Failed as failure:
        return Outcome(source, failure=(failure.stage, failure.reason))
    return bands if bands > REGION_BANDS else finish_slide(job, source, folder)


def make_region(job: Job, source: Source, folder: Path, first: int, last: int) -> Outcome | None:
    """On a worker: make bands [first, last) and keep them beside the results; an outcome only if that failed."""
    with _turn:
        try:
            job.make_bands(source, folder, first, last)
        except Failed as failure:
            return Outcome(source, failure=(failure.stage, failure.reason))
    return None


def finish_slide(job: Job, source: Source, folder: Path) -> Outcome:
    """On a worker: all that is left of a slide."""
    with _turn:
        return job.outcome(source, folder)


def _dask() -> tuple[Any, Any]:
    """The modules dask and distributed, which are untyped."""
    return import_module("dask"), import_module("distributed")


def _count(address: str) -> int:
    from nsam.runtime.engines import available_cores

    number = address.partition(":")[2]
    if not number:
        return max(1, available_cores() // 2)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"`{number}` is no number of processes")
    return int(number)


def _reason(error: Exception) -> str:
    if isinstance(error, _dask()[1].KilledWorker):
        # How many are allowed is the scheduler's setting, distributed.scheduler.allowed-failures.
        return f"it killed {error.allowed_failures + 1} workers, one after the other; see their logs (out of memory?)"
    if isinstance(error, NsamError):
        return str(error)
    return f"unexpected: {type(error).__name__}: {first_line(error)}"

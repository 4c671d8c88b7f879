"""Seconds by stage: the runtime's functions, replaced by ones that keep count."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

_END = object()


@dataclass
class Stage:
    """What a stage took, over all threads."""

    wall_s: float = 0.0
    cpu_s: float = 0.0  # of the threads that called it; what a library does in threads of its own is not in it
    calls: int = 0


class Watch:
    """Each moment of a thread counts for one stage: the innermost, so the stages of a thread add up to its time."""

    def __init__(self) -> None:
        self.stages: defaultdict[str, Stage] = defaultdict(Stage)
        self._lock = threading.Lock()
        self._thread = threading.local()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens in here, but for the stages in it."""
        within: list[list[float]] = self._thread.__dict__.setdefault("within", [])
        within.append([0.0, 0.0])
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
            inner_wall, inner_cpu = within.pop()
            if within:
                within[-1][0] += wall
                within[-1][1] += cpu
            with self._lock:
                stage = self.stages[name]
                stage.wall_s += wall - inner_wall
                stage.cpu_s += cpu - inner_cpu
                stage.calls += 1

    def function(self, owner: Any, name: str, stage: str) -> None:
        """Watch a function, or a method, of a module, class or object."""
        setattr(owner, name, self.watched(getattr(owner, name), stage))

    def generator(self, owner: Any, name: str, stage: str) -> None:
        """Watch a function that returns an iterator: what each of its items takes."""
        real = getattr(owner, name)
        setattr(owner, name, lambda *arguments, **options: self.items(real(*arguments, **options), stage))

    def sink(self, owner: Any, name: str, stage: str) -> None:
        """Watch a context manager, and the function that it gives."""
        real: Callable[..., AbstractContextManager[Any]] = getattr(owner, name)

        @contextmanager
        def watched(*arguments: Any, **options: Any) -> Iterator[Callable[..., Any]]:
            with ExitStack() as opened:
                with self.stage(stage):
                    given = opened.enter_context(real(*arguments, **options))
                yield self.watched(given, stage)
                with self.stage(stage):
                    opened.close()

        setattr(owner, name, watched)

    def watched(self, real: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """The same function, watched."""

        def watched(*arguments: Any, **options: Any) -> Any:
            with self.stage(stage):
                return real(*arguments, **options)

        return watched

    def items(self, items: Iterable[Any], stage: str, handing_over: str | None = None) -> Generator[Any, None, None]:
        """The same items; `handing_over`: the stage from one item until the next is asked for, in the same thread."""
        with ExitStack() as cleanup:
            source = iter(items)
            if isinstance(source, Generator):
                cleanup.callback(source.close)
            while True:
                with self.stage(stage):
                    item = next(source, _END)
                if item is _END:
                    return
                if handing_over:
                    with self.stage(handing_over):
                        yield item
                else:
                    yield item

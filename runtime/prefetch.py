"""A stage of the pipeline in a thread of its own, a bounded queue behind it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

from nsam.runtime.interrupts import uninterrupted

_T = TypeVar("_T")
_END = object()


def prefetch(items: Iterable[_T], depth: int, stop: threading.Event | None = None) -> Generator[_T, None, None]:
    """The same items in the same order, made ahead in a thread, `depth` of them at most.

    An exception of `items` is raised here in its place. When the caller stops early, the thread is told to, and has
    ended before this returns: nothing goes on reading a slide that was closed. `stop`, an event of the caller's, is set
    then, for `items` that take long to make one.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    stop = stop or threading.Event()
    ended = threading.Event()

    def put(entry: tuple[Any, BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        source = iter(items)
        try:
            for item in source:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:  # whatever it is belongs to the caller
            put((_END, error))
        finally:
            try:
                close = getattr(source, "close", None)
                if close:
                    close()
            finally:
                ended.set()

    thread = threading.Thread(target=work, name="nsam-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error:
                raise error
            if item is _END:
                return
            yield item
    finally:
        with uninterrupted():  # what the thread reads is about to be closed
            stop.set()
            ended.wait()  # not `join`: Python takes a thread for ended once a Ctrl-C has come into that

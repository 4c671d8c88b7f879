"""Ctrl-C where it would be lost in native code, answered with a traceback, or do harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of this; threads and processes that begin here, and theirs, leave it to the main one."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:  # Python raises it there alone
        yield
        return
    came: list[Any] = []
    # The system may give it to any thread: to block it in this one would not do.
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    before = _block({signal.SIGINT})
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _block(signals: set[signal.Signals]) -> Any:
    """For what begins here; None on Windows, which has no such thing."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, signals) if hasattr(signal, "pthread_sigmask") else None

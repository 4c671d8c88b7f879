"""A prefetched iterator gives the same items, bounded, and ends with its caller."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from nsam.runtime.interrupts import uninterrupted
from nsam.runtime.prefetch import prefetch


def test_same_items_in_the_same_order() -> None:
    assert list(prefetch(range(100), 3)) == list(range(100))
    assert list(prefetch([], 1)) == []


def test_an_error_comes_after_the_items_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("here")

    items = prefetch(failing(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="here"):
        next(items)


def test_it_runs_ahead_but_not_far() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(50):
            made.append(i)
            yield i

    items = prefetch(source(), 2)
    next(items)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4, "one was taken, two wait, one is at the door"
    items.close()


def test_a_caller_that_stops_ends_the_thread() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    before = threading.active_count()
    items = prefetch(source(), 1)
    next(items)
    items.close()
    assert closed.is_set()
    assert threading.active_count() == before


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background jobs ignore Ctrl-C and hand that down: tests may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_from_here() -> None:
    """Ctrl-C that has come when this returns.

    One sent to the process may wait for a thread that has no core, be late for what is tested, and end the tests.
    """
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_the_thread_ends_is_kept_until_it_has() -> None:
    """What it reads is closed next."""
    ended = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            for _ in range(2):
                interrupt_from_here()
                time.sleep(0.05)
            ended.set()

    items = prefetch(source(), 1)
    next(items)
    with pytest.raises(KeyboardInterrupt):
        items.close()
    assert ended.is_set()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_native_code() -> None:
    """Though the system gives it to another thread."""
    begun = threading.Event()

    def interrupt() -> None:
        begun.wait()
        interrupt_from_here()

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()  # outside: what begins inside never gets a Ctrl-C
    done = False
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with uninterrupted():
            begun.set()
            thread.join()
            done = True
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])

"""How far a run is: bars on a terminal, else a plain line now and then."""

from __future__ import annotations

import sys
import time

import click
from rich import progress as bars
from rich.text import Text

_QUIET_SECONDS = 10.0


class PlainProgress:
    """For logs: at most a line every ten seconds."""

    def __init__(self, slides: int) -> None:
        """A run of so many slides."""
        self._slides = slides
        self._begun = 0
        self._name = ""
        self._start = self._last = time.monotonic()

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def say(self, text: str, error: bool = False) -> None:
        """A line for stdout or, for an error, stderr."""
        click.echo(text, err=error)

    def begin(self, name: str) -> None:
        """A slide begins."""
        self._name = name
        self._begun = min(self._begun + 1, self._slides)  # one that another run had comes twice
        self._start = time.monotonic()

    def tiles(self, done: int, total: int) -> None:
        """So many of the slide's tiles are done."""
        now = time.monotonic()
        if now - self._last < _QUIET_SECONDS:
            return
        self._last = now
        rate = done / (now - self._start)
        click.echo(
            f"{self._name} ({self._begun} of {self._slides}): {done} of {total} tiles, "
            f"{rate:.2g}/s, {(total - done) / rate:.0f} s left"
        )


class BarProgress:
    """For terminals: bars for slides and for the present slide's tiles, with rate and time left."""

    def __init__(self, slides: int) -> None:
        """A run of so many slides."""
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            _Rate(),
            bars.TimeRemainingColumn(),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._slides = slides
        self._all = self._bars.add_task("slides", total=slides)
        self._one = self._bars.add_task("", total=None)
        self._begun = 0

    def __enter__(self) -> BarProgress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def say(self, text: str, error: bool = False) -> None:
        """A line above the bars, or, for an error while stderr goes elsewhere, there."""
        if error and not sys.stderr.isatty():
            click.echo(text, err=True)
        else:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, name: str) -> None:
        """A slide begins."""
        self._bars.update(self._all, completed=self._begun)
        self._begun = min(self._begun + 1, self._slides - 1)  # one that another run had comes twice
        self._bars.remove_task(self._one)
        self._one = self._bars.add_task(name, total=None)

    def tiles(self, done: int, total: int) -> None:
        """So many of the slide's tiles are done."""
        self._bars.update(self._one, completed=done, total=total)


class _Rate(bars.ProgressColumn):
    def render(self, task: bars.Task) -> Text:
        return Text(f"{task.speed:.2g}/s" if task.speed else "")


Progress = PlainProgress | BarProgress


def progress(slides: int) -> Progress:
    """The progress that fits where the output goes."""
    return BarProgress(slides) if sys.stdout and sys.stdout.isatty() else PlainProgress(slides)

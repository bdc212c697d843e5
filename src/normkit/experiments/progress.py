"""Progress on standard error: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO

__all__ = ["NoProgress", "PlainProgress", "Progress", "RichProgress", "progress"]


class Progress(Protocol):
    """What a run tells about itself."""

    def start(self, total: int, text: str, done: int = 0) -> None:
        """`total` trials begin, of which so many are done already."""

    def advance(self, text: str) -> None:
        """One more trial is done."""

    def stop(self) -> None:
        """The run is over, whatever ended it."""


class NoProgress:
    """Silence."""

    def start(self, total: int, text: str, done: int = 0) -> None:
        """Nothing."""

    def advance(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class PlainProgress(NoProgress):
    """One line at the start, one at least `every` seconds apart, and one at the end."""

    def __init__(self, stream: TextIO, every: float = 15.0) -> None:
        self.stream, self.every = stream, every
        self.total = self.done = self.before = 0
        self.begun = self.said = 0.0

    def start(self, total: int, text: str, done: int = 0) -> None:
        """`total` trials begin, of which so many are done already."""
        self.total, self.before, self.done, self.begun = total, done, done, time.monotonic()
        self.said = self.begun
        print(text, file=self.stream, flush=True)

    def advance(self, text: str) -> None:  # noqa: ARG002  # a bar shows it
        """One more trial is done."""
        self.done += 1
        now = time.monotonic()
        if self.done == self.total:
            ran = self.done - self.before
            print(f"{ran} trial{'s' * (ran != 1)} in {now - self.begun:.0f} s", file=self.stream, flush=True)
        elif now - self.said >= self.every:
            self.said = now
            left = (now - self.begun) / (self.done - self.before) * (self.total - self.done)
            print(f"{self.done} of {self.total} trials, about {left:.0f} s left", file=self.stream, flush=True)


class RichProgress:
    """A bar with the time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns: list[Any] = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left")]
        columns += [TimeRemainingColumn(), TextColumn("[dim]{task.description}")]
        self._bar = Bar(*columns, console=Console(file=stream), transient=False)

    def start(self, total: int, text: str, done: int = 0) -> None:
        """`total` trials begin, of which so many are done already."""
        self._bar.console.print(text, highlight=False)
        self._task = self._bar.add_task("", total=total, completed=done)
        self._bar.start()

    def advance(self, text: str) -> None:
        """One more trial is done."""
        self._bar.update(self._task, advance=1, description=text)

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()


def progress(stream: TextIO | None = None) -> Progress:
    """The bar where `stream` (standard error by default) is a terminal and rich is installed, else plain lines."""
    stream = stream or sys.stderr
    if stream.isatty():
        try:
            return RichProgress(stream)
        except ImportError:
            pass
    return PlainProgress(stream)

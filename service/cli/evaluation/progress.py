"""Progress of an evaluation on standard error, with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from service.cli.console import errors

LINE_SECONDS = 10.0
"""Seconds between two lines, where standard error is no terminal."""


class Watch:
    """Counts images and shows them: by `show`, or as a line every ten seconds.

    `show` gets the text and the images done.
    """

    def __init__(
        self,
        total: int,
        show: Callable[[str, int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._show, self._clock = total, show, clock
        self._began = self._printed = clock()
        self._done = 0

    def advance(self, name: str) -> None:
        """Count one image of the run `name`."""
        self._done += 1
        now = self._clock()
        left = (now - self._began) / self._done * (self._total - self._done)
        text = f"{name}, {_clock_time(left)} left"
        if self._show is not None:
            self._show(text, self._done)
        elif now - self._printed >= LINE_SECONDS or self._done == self._total:
            self._printed = now
            errors.print(f"{self._done} of {self._total} images: {text}")


@contextmanager
def watched(total: int) -> Iterator[Watch]:
    """A watch over `total` images: a bar on a terminal, else lines."""
    if not errors.is_terminal:
        yield Watch(total)
        return
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=errors, transient=True) as progress:
        bar = progress.add_task("starting", total=total)
        yield Watch(
            total, lambda text, done: progress.update(bar, completed=done, description=text)
        )


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

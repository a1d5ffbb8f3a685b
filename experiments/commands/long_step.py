"""LongStep: what a long step is doing, how far it is, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.spinner import Spinner
from rich.text import Text

_LINE_SECONDS = 3.0
"""Least time between plain lines about one step."""


class LongStep:
    """Takes a line per stage of a step, with how far it is; shown live or as plain lines.

    Args:
        title: What is being done, as in "Measuring the dense network".
        console: Receives plain lines; None where the object itself is shown live.
        clock: Returns seconds.
    """

    def __init__(
        self, title: str, console: Console | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._console = console
        self._clock = clock
        self._spinner = Spinner("dots")
        self._begun = self._stage_begun = clock()
        self._said = float("-inf")
        self._now = ("", 0, 0)
        if console is not None:
            console.print(f"{title} …", markup=False)

    def __call__(self, line: str, done: int = 0, total: int = 0) -> None:
        """Says what is being done now.

        Args:
            line: The stage.
            done: Parts of it that are done.
            total: Parts in all; 0 where that is not known.
        """
        before, now = self._now, self._clock()
        if (line, total) != (before[0], before[2]) or done < before[1]:
            self._stage_begun = now
        self._now = (line, done, total)
        if self._console is not None and now - self._said >= _LINE_SECONDS:
            self._console.print(f"  {self._text()}", markup=False, soft_wrap=True)
            self._said = now

    def _text(self) -> str:
        line, done, total = self._now
        if not total:
            return line
        text = f"{line}, {done} of {total}"
        if 0 < done < total:
            spent = self._clock() - self._stage_begun
            text += f", {clock_time(spent / done * (total - done))} left"
        return text

    def __rich__(self) -> Spinner:
        spent = clock_time(self._clock() - self._begun)
        text = Text.assemble(f"{self._title} … {spent}  ", (self._text(), "dim"))
        self._spinner.update(text=text)
        return self._spinner


def clock_time(seconds: float) -> str:
    """Returns seconds as `1:05` or `2:00:30`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

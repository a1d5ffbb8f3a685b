"""Progress of a search and of other long steps: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paretoprune.experiments.commands.long_step import LongStep, clock_time
from paretoprune.experiments.showing.tables import front_table, quality, quality_of
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.units import format_count, format_percent
from paretoprune.search import (
    Completed,
    Failed,
    Infeasible,
    ParetoFront,
    Record,
    SearchInfo,
    Stopped,
)
from paretoprune.search.record import reasons

_LINE_SECONDS = 10.0
"""Least time between plain lines that say nothing new."""
_SHOWN_MEMBERS = 8


def progress_console() -> Console:
    """Returns the console for progress: stderr, so that stdout carries results alone."""
    return Console(stderr=True, highlight=False)


def results_console() -> Console:
    """Returns the console for results: stdout, 100 columns wide where nobody watches."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


def is_live(console: Console) -> bool:
    """Returns whether a live view makes sense: on a terminal, and not in CI."""
    return console.is_terminal and not os.environ.get("CI")


@contextmanager
def long_step(console: Console, title: str, *, quiet: bool = False) -> Iterator[LongStep]:
    """Shows that a step is at work; yields what takes a line per stage of it.

    Args:
        console: Where to show it.
        title: What is being done, as in "Measuring the dense network".
        quiet: Shows nothing.
    """
    if quiet:
        yield LongStep(title, None)
    elif is_live(console):
        step = LongStep(title, None)
        with Live(step, console=console, transient=True):
            yield step
    else:
        yield LongStep(title, console)


class SearchProgress:
    """A listener that shows a search on a console, from its preparation on.

    A context manager, so that whatever ends the search leaves the terminal clean.

    Args:
        console: Where to show it; live if `is_live` says so.
        quiet: Shows nothing.
        then: What comes after the trials, in a few words.
        steps: Whether the search ends once the target is met, as the strategy `everything` does,
            and has no more than the trials that are announced.
    """

    def __init__(
        self,
        console: Console,
        *,
        quiet: bool = False,
        then: str | None = None,
        steps: bool = False,
    ) -> None:
        self._console = console
        self._steps = steps
        self._then = then
        self._quiet = quiet
        self._view: SearchView | None = None
        self._trials = 0
        self._before = 0
        self._way_before = 0.0
        self._begun = 0.0
        self._said = 0.0
        self._best: int | None = None
        self._reasons: set[str | None] = {None}
        self._live: Live | None = None
        self._preparing: LongStep | None = None

    def __enter__(self) -> SearchProgress:
        """Shows that the search is being prepared."""
        if self._quiet:
            return self
        title = "Measuring the dense network and its units"
        live = is_live(self._console)
        self._preparing = LongStep(title, None if live else self._console)
        if live:
            self._live = Live(self._preparing, console=self._console, transient=True)
            self._live.start()
        return self

    def preparing(self, stage: str, done: int, total: int) -> None:
        """Shows what is measured before the trials; takes the progress of `search`."""
        if self._preparing is not None:
            self._preparing(stage, done, total)

    def __exit__(self, *raised: object) -> None:
        """Ends the view; nothing is left of a live one."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def started(self, info: SearchInfo) -> None:
        """Begins to show trials."""
        if self._quiet:
            return
        self._view = view = SearchView.of(info)
        self._trials = info.trials
        self._before = len(view.records)
        self._way_before = self._way(view)
        self._begun = self._said = time.monotonic()
        if self._live is not None:
            self._live.update(self._render(view))
        else:
            self._console.print(self._opening(view))

    def finished(self, record: Record, front: ParetoFront) -> None:
        """Shows one more trial."""
        if self._quiet:
            return
        assert self._view is not None, "the search announces its start before its trials"
        self._view = view = self._view.told(record)
        if self._live is not None:
            self._live.update(self._render(view))
            return
        best = None if view.best is None else view.best.number
        news = (
            record.finetuned is not None
            or best != self._best
            or _reason(record) not in self._reasons
        )
        done = len(view.records) == self._trials
        due = time.monotonic() - self._said > _LINE_SECONDS
        if done or due or news:
            self._console.print(self._line(view, record), markup=False, soft_wrap=True)
            self._said = time.monotonic()
        self._best = best
        self._reasons.add(_reason(record))

    def ended(self, error: BaseException | None) -> None:
        """Nothing to do: leaving the context ends the view."""

    def _opening(self, view: SearchView) -> str:
        resumed = f", {self._before} of them done before" if self._before else ""
        trials = f"{'at most ' if self._steps else ''}{self._trials} trials"
        return (
            f"{view.name}: {format_count(view.dense.macs)} MACs, target at most "
            f"{format_count(view.target)} ({format_percent(view.target_ratio)}), "
            f"{trials}{resumed}{'' if self._then is None else f', {self._then}'}"
        )

    def _line(self, view: SearchView, record: Record) -> str:
        done = f"{len(view.records):>{len(str(self._trials))}}"
        parts = [f"[{done}]" if self._steps else f"[{done}/{self._trials}]"]
        match record.outcome:
            case Failed(error=error):
                parts.append(f"trial {record.number} failed: {error}")
            case Infeasible(reason=reason):
                parts.append(f"trial {record.number} infeasible: {reason}")
            case Stopped():
                parts.append(f"trial {record.number} stopped early, as dominated")
        match record.finetuned:
            case Failed(error=error):
                parts.append(f"fine-tuning of trial {record.number} failed: {error}")
            case Completed():
                worse = "" if record.finetuning_taken else ", but worse than before: not taken"
                parts.append(f"trial {record.number} is fine-tuned{worse}")
        if view.best is not None:
            parts.append(f"best trial {_best(view, view.best)}")
        if record.finetuned is None:
            parts.append(self._pace(view))
        return "  ".join(parts)

    def _pace(self, view: SearchView) -> str:
        """Returns how fast trials finish and how long the rest takes."""
        new = len(view.records) - self._before
        if not new:
            return "waiting for the first trial"
        spent = max(time.monotonic() - self._begun, 1e-9)
        rate, way = new / spent, self._way(view)
        speed = f"{rate:.1f} trials/s" if rate >= 1 else f"{1 / rate:.1f} s/trial"
        if way <= self._way_before:  # nothing was won yet that time could be told from
            return speed
        left = spent * (1 - way) / (way - self._way_before)
        if self._steps:  # they also end without the target
            left = min(left, (self._trials - len(view.records)) / rate)
        return f"{speed}, {'about ' if self._steps else ''}{clock_time(left)} left"

    def _way(self, view: SearchView) -> float:
        """Returns the share of the search that is done: of its trials, or of the MACs to go."""
        if not self._steps:
            return len(view.records) / self._trials
        reached = min((row.macs for row in view.rows), default=view.dense.macs)
        return min(1.0, (view.dense.macs - reached) / max(view.dense.macs - view.target, 1))

    def _render(self, view: SearchView) -> RenderableType:
        facts = Table.grid(padding=(0, 2))
        done = len(view.records)
        bar = ProgressBar(total=1.0, completed=self._way(view), width=40, complete_style="blue")
        count = f"{done}" if self._steps else f"{done}/{self._trials}"
        facts.add_row("trials", bar, f"{count}  {self._pace(view)}")
        lines: list[RenderableType] = [Text(self._opening(view), style="bold"), facts]
        if view.best is not None:
            _, dense = quality(view.dense_metrics, view.objectives[0].name)
            lines.append(Text(f"best    trial {_best(view, view.best)} (dense {dense})"))
        lines += [
            Text(f"        {number} x {reason}", style="yellow")
            for reason, number in reasons(view.records).items()
        ]
        if view.front_rows:
            number = len(view.front_rows)
            title = f"front   {number} member{'' if number == 1 else 's'}"
            hidden = len(view.front_rows) - _SHOWN_MEMBERS
            title += f", the first {_SHOWN_MEMBERS} of them" if hidden > 0 else ""
            lines += [
                Text(title),
                front_table(view.front_rows[:_SHOWN_MEMBERS], view.dense, view.dense_metrics),
            ]
        return Group(*lines)


def _reason(record: Record) -> str | None:
    """Returns why a trial failed; None if it did not."""
    return record.outcome.error if isinstance(record.outcome, Failed) else None


def _best(view: SearchView, best: Record) -> str:
    share = format_percent(view.row(best).macs_ratio)
    return f"{best.number}: {quality_of(best, view.objectives[0].name)} at {share} of the MACs"

"""MlflowListener: writes a search to MLflow as it goes on, and never gets in its way."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from paretoprune.experiments.runs import RunSpec
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.tracking.mlflow_runs import SearchRuns, connect
from paretoprune.experiments.tracking.store import Store, store_of
from paretoprune.search import Completed, ParetoFront, Record, SearchInfo
from paretoprune.search.evaluation import first_line

_REDRAW_SECONDS = 60.0
"""Least time between two pages of the front while the search goes on."""
_REDRAW_SHARE = 0.01
"""Most of the time of a search that is spent on them, which its workers may spend waiting."""
_RETRY_SECONDS = 120.0
"""Time after a fault of MLflow, which may take seconds to show, until it is tried again."""


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets a first Ctrl-C wait for the end of a write, which a database would complain about."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    waiting: list[int] = []

    def later(number: int, _frame: FrameType | None) -> None:
        if waiting:
            raise KeyboardInterrupt
        waiting.append(number)

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt


class MlflowListener:
    """Shows a search in MLflow as it goes on: a parent run, and a child run per trial.

    Args:
        run_dir: The run's folder; its name is the name of the parent run.
        spec: What run.json says.
        thop_macs: Returns thop's count of the dense network's MACs, or None.
        store: Where to write; None takes `store_of` the runs folder.
        warn: Receives the one sentence that is said when MLflow does not work.
    """

    def __init__(
        self,
        run_dir: Path,
        spec: RunSpec,
        *,
        thop_macs: Callable[[], int | None] = lambda: None,
        store: Store | None = None,
        warn: Callable[[str], None] = _say,
    ) -> None:
        self._run_dir = run_dir
        self._spec = spec
        self._thop_macs = thop_macs
        self._store = store or store_of(run_dir.parent)
        self._warn = warn
        self._broken = False
        self._warned = False
        self._again = 0.0
        self._redraw = 0.0
        self._search: SearchRuns | None = None
        self._view: SearchView | None = None

    def started(self, info: SearchInfo) -> None:
        """Opens the search's runs, and writes what they lack of the records already there."""
        self._view = SearchView.of(info)
        self._guarded(self._reconcile)

    def finished(self, record: Record, front: ParetoFront) -> None:
        """Writes one trial; some time after a fault, all that is missing."""
        view = self._seen(record)
        if self._broken and time.monotonic() > self._again:
            self._recover()
        else:
            self._guarded(lambda: self._write(record, front, view))

    def ended(self, error: BaseException | None) -> None:
        """Writes plots, table and description; after an earlier fault also what is missing."""
        if self._broken:
            self._recover()
        self._guarded(lambda: self._close(error))

    def _recover(self) -> None:
        self._broken = False
        self._search = None
        self._guarded(self._reconcile)

    def _seen(self, record: Record) -> SearchView:
        assert self._view is not None, "the search announces its start before its trials"
        self._view = self._view.told(record)
        return self._view

    def _guarded(self, action: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            with _uninterrupted():
                action()
        except Exception as error:  # whatever it is: a view must not end the search
            self._broken = True
            self._again = time.monotonic() + _RETRY_SECONDS
            if self._warned:  # another attempt: nothing new to say
                return
            self._warned = True
            self._warn(
                f"MLflow at {self._store.uri} does not work ({first_line(error)[:200]}); the "
                f"search goes on and keeps its trials in {self._run_dir}. `paretoprune resume "
                f"{self._run_dir.name}` writes what MLflow lacks."
            )

    def _reconcile(self) -> None:
        view = self._view
        assert view is not None
        self._search = SearchRuns(connect(self._store.uri), self._store, self._run_dir, self._spec)
        self._search.open(view, self._thop_macs())
        self._search.add_missing(view)

    def _write(self, record: Record, front: ParetoFront, view: SearchView) -> None:
        assert self._search is not None
        self._search.add(record, view)
        if isinstance(record.outcome, Completed):  # no other can change the front
            self._search.mark(front)
            if record.finetuned is None:
                latest = max(each.number for each in view.records)  # of those that overtake others
                self._search.add_progress([(latest, front.hypervolume)], view)
        begin = time.monotonic()
        if begin > self._redraw and front.records:
            self._search.draw(view, self._run_dir.name)
            end = time.monotonic()
            self._redraw = end + max(_REDRAW_SECONDS, (end - begin) / _REDRAW_SHARE)

    def _close(self, error: BaseException | None) -> None:
        assert self._search is not None
        assert self._view is not None
        self._search.draw(self._view, self._run_dir.name)
        self._search.close(error)

"""The ways in which a search ends that are not plain misuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paretoprune.search.front import ParetoFront


class RunLocked(RuntimeError):
    """Another process is writing to the same run."""


class SearchStuck(RuntimeError):
    """The steps of the strategy `everything` cannot go on; what is finished is kept."""


class NothingCompleted(RuntimeError):
    """All trials of a search are finished, and none of them completed; says for which reasons."""


class StoreFailed(RuntimeError):
    """The study of a run cannot be opened, read or written; what it has is intact."""


class WorkersFailed(RuntimeError):
    """No worker can evaluate anything; the reason is the same for all."""


class SearchInterrupted(KeyboardInterrupt):
    """The search was interrupted by Ctrl-C and can be resumed; nothing finished is lost.

    A `KeyboardInterrupt`, so that a program that does not catch it ends as after any Ctrl-C,
    with exit status 130.

    Attributes:
        front: The Pareto front of the trials that had finished.
    """

    def __init__(self, front: ParetoFront) -> None:
        super().__init__("the search was interrupted")
        self.front = front

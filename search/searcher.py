"""Searcher: which plan is evaluated next, and what becomes of every trial.

The seam between decisions and executors. It turns trials of the study into tasks, answers those
whose plan is known without an evaluation, and writes every outcome back to the study.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from paretoprune.search.candidate import Candidate
from paretoprune.search.evaluation import Evaluate
from paretoprune.search.ledger import Ledger, Task, key_of
from paretoprune.search.record import Completed, Infeasible, Outcome, Record, Stopped
from paretoprune.search.space import Suggester
from paretoprune.surgery import Cost, InfeasibleBudget, PruningPlan

if TYPE_CHECKING:  # the study imports optuna, which `import paretoprune.search` must not
    from paretoprune.search.study import Study


class Tasks(Protocol):
    """Where an executor gets its tasks, and where their outcomes go."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        ...

    def next(self) -> Task | None:
        """Returns the next task; None before `done` means: not until a running one has ended."""
        ...

    def tell(self, task: Task, outcome: Outcome) -> None:
        """Takes the outcome of a task."""
        ...


@dataclass(frozen=True, slots=True)
class Decisions:
    """The two steps from a trial to a plan.

    Attributes:
        suggest: Returns the candidate that a trial decides.
        decode: Returns its plan and what that costs; raises InfeasibleBudget if there is none.
    """

    suggest: Callable[[Suggester], Candidate]
    decode: Callable[[Candidate], tuple[PruningPlan, Cost]]


class Searcher:
    """The trials of a search on their way from question to record.

    A trial is finished when it has an outcome: completed, stopped, failed or infeasible. The
    search ends when exactly `trials` of them are finished, those of earlier drivers included.

    Args:
        study: Where trials come from and records go to.
        decisions: From a trial to a plan.
        trials: How many trials are to be finished in all.
        seed: Seed of every evaluation, so that equal plans have equal metrics.
        finished: Called with every new record after the study has it.
        racing: Whether evaluations race against the best plan that costs no more MACs, which
            takes losses by batch and no objective but loss and MACs.
    """

    def __init__(
        self,
        study: Study,
        decisions: Decisions,
        trials: int,
        seed: int,
        finished: Callable[[Record], None],
        *,
        racing: bool = False,
    ) -> None:
        self._study = study
        self._decisions = decisions
        self._trials = trials
        self._seed = seed
        self._notify = finished
        records = study.records()
        self._n_finished = len(records)
        self._known = {key_of(r.plan): r.outcome for r in records if r.plan is not None}
        self._waiting: dict[str, list[_Open]] = {}
        self._racing = racing
        self._rivals = [r for r in records if isinstance(r.outcome, Completed)]

    @property
    def done(self) -> bool:
        """Whether all trials are finished."""
        return self._n_finished >= self._trials

    def next(self) -> Task | None:
        """Returns the next plan to evaluate; None if none can be started now.

        None before `done` means that the trials that are left wait for running tasks.
        """
        while self._n_finished + sum(map(len, self._waiting.values())) < self._trials:
            trial = self._study.ask()
            candidate = self._decisions.suggest(trial.suggester)
            try:
                plan, cost = self._decisions.decode(candidate)
            except InfeasibleBudget as error:
                reason = Infeasible(str(error))
                self._finish(Record(trial.number, candidate, None, None, reason, trial.origin))
                continue
            opened = _Open(trial.number, candidate, plan, cost, trial.origin)
            key = key_of(plan)
            if key in self._known:
                self._finish(opened.closed(_again(self._known[key])))
            elif key in self._waiting:
                self._waiting[key].append(opened)
            else:
                self._waiting[key] = [opened]
                return Task(plan, self._seed, rival=self._rival(cost))
        return None

    def _rival(self, cost: Cost) -> tuple[float, ...]:
        """Returns the losses by batch of the best plan that costs no more; empty without one."""
        best: Completed | None = None
        for record in self._rivals if self._racing else ():
            outcome = record.outcome
            assert isinstance(outcome, Completed), "only what completed is kept"
            cheaper = outcome.metrics["macs"] <= cost.macs
            if cheaper and (best is None or outcome.metrics["loss"] < best.metrics["loss"]):
                best = outcome
        return () if best is None else best.losses

    def tell(self, task: Task, outcome: Outcome) -> None:
        """Records the outcome of a task, for every trial that waits for it."""
        self._known[task.key] = outcome
        first, *others = self._waiting.pop(task.key)
        self._finish(first.closed(outcome))
        for opened in others:
            self._finish(opened.closed(_again(outcome)))

    def _finish(self, record: Record) -> None:
        self._study.tell(record)
        self._n_finished += 1
        if isinstance(record.outcome, Completed):
            self._rivals.append(record)
        self._notify(record)


@dataclass(frozen=True, slots=True)
class _Open:
    """A trial whose plan is being evaluated."""

    number: int
    candidate: Candidate
    plan: PruningPlan
    cost: Cost
    origin: str

    def closed(self, outcome: Outcome) -> Record:
        return Record(self.number, self.candidate, self.plan, self.cost, outcome, self.origin)


def _again(outcome: Outcome) -> Outcome:
    """Returns the outcome for another trial with the same plan, which took no time."""
    return replace(outcome, seconds=0.0) if isinstance(outcome, Completed | Stopped) else outcome


class Executor(Protocol):
    """Evaluates tasks until all are done or the user interrupts."""

    def __call__(self, tasks: Tasks, evaluate: Evaluate, ledger: Ledger) -> None:
        """Runs tasks.

        Args:
            tasks: Gives tasks and takes outcomes.
            evaluate: What to run; picklable.
            ledger: Where outcomes are kept until the searcher has them.

        Raises:
            KeyboardInterrupt: If the user interrupts.
        """
        ...


def run_inline(tasks: Tasks, evaluate: Evaluate, ledger: Ledger) -> None:
    """Evaluates one task after the other in this process; an `Executor` without Ray."""
    while (task := tasks.next()) is not None:
        tasks.tell(task, ledger.evaluate(evaluate, task))

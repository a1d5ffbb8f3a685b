"""Stages: what a search does one after the other: trials, and the fine-tuning of the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from paretoprune.search.candidate import Candidate
from paretoprune.search.checks import DAMAGE
from paretoprune.search.evaluation import Evaluate, Evaluator
from paretoprune.search.everything import CandidateStep, Everything
from paretoprune.search.finetuning import Finetuning, FinetuningStep, FinetuningTasks
from paretoprune.search.front import ParetoFront
from paretoprune.search.ledger import Ledger
from paretoprune.search.listener import SearchInfo
from paretoprune.search.prepare import Request, prepare, prepare_steps
from paretoprune.search.problem import Problem
from paretoprune.search.record import Record
from paretoprune.search.searcher import Decisions, Searcher, Tasks
from paretoprune.search.weights import FOLDER, Weights
from paretoprune.surgery import Cost, PruningPlan, trace
from paretoprune.surgery.progress import Progress

if TYPE_CHECKING:  # the study imports optuna, which `import paretoprune.search` must not
    from paretoprune.search.study import Study

EVALUATIONS = "evals"
"""Folder of the ledger of the trials in a run's folder."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Tasks with what evaluates them.

    Attributes:
        tasks: What is to be done.
        evaluate: Does it.
        ledger: Keeps what is done.
        most: Tasks at a time; None where that has no limit.
        timed: Whether the time limit of a trial holds for them.
    """

    tasks: Tasks
    evaluate: Evaluate
    ledger: Ledger
    most: int | None = None
    timed: bool = True


TrialsOf = Callable[[Callable[[Record], None]], Stage]
"""From what is told of every finished trial to the trials."""


@dataclass(frozen=True, slots=True)
class Stages:
    """What all stages of a search have in common.

    `dense_latency` measures the dense network on a worker, in milliseconds.
    """

    problem: Problem
    request: Request
    folder: Path
    study: Study
    sampler: str
    seed: int
    finetunes: Finetuning | None
    progress: Progress
    dense_latency: Callable[[], float]

    def _ledger(self, name: str) -> Ledger:
        return Ledger(self.folder.resolve() / name, self.study.run)

    def trials(self) -> tuple[SearchInfo, TrialsOf]:
        """Returns the trials that a sampler decides."""
        prepared = prepare(
            self.problem,
            self.request,
            self.folder,
            self.study,
            self.progress,
            self.dense_latency,
        )
        space, count = prepared.space, self.request.trials
        history = self.study.records()
        planned: set[PruningPlan] = set()

        def decode(candidate: Candidate) -> tuple[PruningPlan, Cost]:
            plan, cost = prepared.decode(candidate)
            planned.add(plan)
            return plan, cost

        decide = space.fixed
        if self.sampler == DAMAGE:
            decide = partial(prepared.damage_model(self.seed), history, planned=planned)
        self.study.begin(space.seeds(count), prepared.info.target, decide)

        def stage(told: Callable[[Record], None]) -> Stage:
            def finished(record: Record) -> None:
                history.append(record)
                told(record)

            decisions = Decisions(space.suggest, decode)
            similarity = "cka" in self.request.objectives
            racing = set(self.request.objectives) == {"loss", "macs"}
            return Stage(
                Searcher(self.study, decisions, count, self.seed, finished, racing=racing),
                Evaluator(
                    self.problem,
                    prepared.graph,
                    similarity=similarity,
                    latency=prepared.info.metrics.get("latency"),
                ),
                self._ledger(EVALUATIONS),
            )

        return prepared.info, stage

    def steps(self) -> tuple[SearchInfo, TrialsOf]:
        """Returns the trials of the strategy `everything`."""
        ((name, criterion),) = self.request.criteria.items()
        recovery = 0 if self.finetunes is None else self.finetunes.recovery
        graph, info = prepare_steps(
            self.problem, self.request, self.study, recovery, self.progress
        )
        self.study.begin((), info.target)
        weights = Weights.of_run(self.folder)

        def stage(finished: Callable[[Record], None]) -> Stage:
            tasks = Everything(
                self.study,
                self.problem,
                graph,
                (name, criterion),
                target=info.target,
                trials=self.request.trials,
                seed=self.seed,
                weights=weights,
                finished=finished,
                bounds=self.request.bounds,
            )
            ledger = self._ledger(EVALUATIONS)
            tasks.forget_failures(ledger)
            evaluate = CandidateStep(self.problem.sent, graph, weights, self.finetunes)
            return Stage(tasks, evaluate, ledger, most=2)

        return info, stage

    def finetuning(
        self, front: ParetoFront, target: int, finished: Callable[[Record], None]
    ) -> Stage:
        """Returns the fine-tuning of the best of the front that meet the target."""
        assert self.finetunes is not None
        records = front.leading(self.finetunes.top, target)
        weights = Weights.of_run(self.folder)

        def told(record: Record) -> None:
            assert record.finetuned is not None
            self.study.tell_finetuned(record.number, record.finetuned)
            finished(record)

        tasks = FinetuningTasks(records, self.seed, weights, told)
        ledger = self._ledger(FOLDER)
        tasks.forget_failures(ledger)
        evaluate = FinetuningStep(
            replace(self.problem.sent, refit=self.problem.refit),  # training begins with it
            trace(self.problem.model, self.problem.example_inputs),
            self.finetunes,
            weights,
            tasks.kinds,
            front.objectives,
        )
        return Stage(tasks, evaluate, ledger, most=max(1, len(tasks.kinds)), timed=False)

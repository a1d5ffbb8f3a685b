"""The dense network, measured where candidates are: on a worker."""

from __future__ import annotations

from dataclasses import dataclass

from paretoprune.search.evaluation import on_device
from paretoprune.search.latency import measure_latency
from paretoprune.search.ledger import Ledger, Task
from paretoprune.search.problem import Problem
from paretoprune.search.record import Completed, Failed, Outcome
from paretoprune.search.searcher import Executor
from paretoprune.surgery import PruningPlan


def dense_latency(problem: Problem, executor: Executor, ledger: Ledger, seed: int) -> float:
    """Returns the latency of the dense network on a worker, in milliseconds.

    Args:
        problem: The dense network; its example inputs are one batch.
        executor: Has the worker.
        ledger: Keeps it for drivers to come.
        seed: Of the evaluation.

    Raises:
        ValueError: If it cannot be measured.
    """
    once = _Once(Task(PruningPlan(), seed))
    executor(once, _DenseLatency(problem.sent), ledger)
    match once.outcome:
        case Completed(metrics=metrics):
            return metrics["latency"]
        case Failed(error=error):
            raise ValueError(f"the latency of the dense network cannot be measured: {error}")
        case other:
            raise AssertionError(f"the measurement has no outcome: {other}")


@dataclass(frozen=True, slots=True)
class _DenseLatency:
    """An `Evaluate` of the dense network alone."""

    problem: Problem

    def __call__(self, plan: PruningPlan, seed: int) -> dict[str, float]:
        model = on_device(self.problem.model)
        (latency,) = measure_latency((model,), self.problem.example_inputs)
        return {"latency": latency.milliseconds}


class _Once:
    """One task for an executor; see `Tasks`."""

    def __init__(self, task: Task) -> None:
        self._waiting = [task]
        self.outcome: Outcome | None = None

    @property
    def done(self) -> bool:
        return self.outcome is not None

    def next(self) -> Task | None:
        return self._waiting.pop() if self._waiting else None

    def tell(self, task: Task, outcome: Outcome) -> None:
        self.outcome = outcome

"""Fine-tuning as a part of a search: the best of the front are trained further by its workers.

How to train is not known here: `experiments` brings a trainer. What it trains begins at weights
that are written down first, and goes on from its checkpoint, so that a killed fine-tuning loses no
more than an epoch and ends as it would have ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import nn

from paretoprune.search.evaluation import Evaluator, give_back_memory, on_device
from paretoprune.search.front import no_worse
from paretoprune.search.layout import channels_last
from paretoprune.search.ledger import Ledger, Task, key_of
from paretoprune.search.metrics import evaluate
from paretoprune.search.problem import Objective, Problem
from paretoprune.search.record import BEFORE, TAKEN, Completed, Failed, Outcome, Record
from paretoprune.search.weights import FINETUNED, Weights, trained_weights
from paretoprune.surgery import PruningGraph, PruningPlan
from paretoprune.surgery.progress import Lines


class Trainer(Protocol):
    """Trains networks; picklable, to reach workers."""

    def __call__(
        self,
        network: nn.Module,
        *,
        epochs: int,
        seed: int,
        checkpoint: Path,
        progress: Lines,
    ) -> nn.Module:
        """Returns a trained copy of a network, in eval mode.

        Args:
            network: Where training starts; left untouched.
            epochs: Passes over the training data, at least 1.
            seed: Of all that is drawn.
            checkpoint: File that is written after every epoch, and that training goes on from.
            progress: Receives a line per epoch.
        """
        ...


@dataclass(frozen=True, slots=True)
class Finetuning:
    """What is trained in a search.

    Attributes:
        train: How.
        epochs: Passes over the training data for the best of the front, after the last trial; 0
            trains none of them.
        top: How many of the front, the best in the first objective.
        recovery: Passes over the training data for every candidate of the strategy `everything`.

    Raises:
        ValueError: If a number is out of range, or nothing is trained.
    """

    train: Trainer
    epochs: int = 0
    top: int = 3
    recovery: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("top", 1), ("recovery", 0)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ValueError(f"`{name}` must be at least {least}, but got {value}.")
        if not self.epochs and not self.recovery:
            raise ValueError(
                "`epochs` and `recovery` are both 0, so nothing would be trained; give one."
            )


def train_and_keep(
    train: Trainer,
    epochs: int,
    begin: Callable[[], nn.Module],
    problem: Problem,
    graph: PruningGraph,
    plan: PruningPlan,
    seed: int,
    weights: Weights,
    kind: str,
) -> nn.Module:
    """Returns the trained network of a plan, which is among the weights then.

    Until `forget_training` it can be called again, and trains nothing that was trained.

    Args:
        train: How to train.
        epochs: At least 1.
        begin: Returns the network that training starts from; not called if that was done before.
        problem: The dense network and its data.
        graph: Its graph.
        plan: The plan.
        seed: Of the training.
        weights: Keeps where training began, its checkpoint, its log, and its result.
        kind: Name of the result.
    """
    if not weights.whole(plan, _start(kind)):
        weights.write(begin(), plan, _start(kind))
        give_back_memory()  # training takes other shapes of it
    # read back even the first time: a resumed training must begin at the same bits and layout
    network = _begun(problem, graph, plan, weights, kind)
    checkpoint = weights.file(plan, kind).with_suffix(".part")
    log = weights.file(plan, kind).with_suffix(".log")

    def progress(line: str) -> None:
        with log.open("a") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    trained = train(network, epochs=epochs, seed=seed, checkpoint=checkpoint, progress=progress)
    weights.write(trained, plan, kind)
    return trained


def _start(kind: str) -> str:
    """Returns the kind of the weights that a training began at."""
    return f"{kind}-start"


def _begun(
    problem: Problem, graph: PruningGraph, plan: PruningPlan, weights: Weights, kind: str
) -> nn.Module:
    """Returns the network that a training began at, until `forget_training`."""
    network = weights.network(problem.model, graph, plan, _start(kind))
    return channels_last(on_device(network), graph)


def forget_training(weights: Weights, plan: PruningPlan, kind: str) -> None:
    """Deletes what a training would go on from; not before its outcome is in the ledger."""
    weights.file(plan, _start(kind)).unlink(missing_ok=True)
    weights.file(plan, kind).with_suffix(".part").unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class FinetuningStep:
    """Fine-tunes the network of a plan and measures it; one for each worker.

    Training begins with what would be handed out without it.

    Attributes:
        problem: The dense network and its data, `refit` among them.
        graph: Its graph.
        finetuning: How and how long.
        weights: Of the run.
        kinds: By plan, which weights its network has already; None where it is reconstructed.
        objectives: What the search optimises; they decide whether the result is taken.
    """

    problem: Problem
    graph: PruningGraph
    finetuning: Finetuning
    weights: Weights
    kinds: Mapping[PruningPlan, str | None]
    objectives: tuple[Objective, ...]

    def __call__(self, plan: PruningPlan, seed: int) -> dict[str, float]:
        """Returns the metrics of `Record.finetuned`."""
        kind = self.kinds[plan]

        def begin() -> nn.Module:
            if kind is None:
                return Evaluator(self.problem, self.graph).final(plan, seed)
            return self.weights.network(self.problem.model, self.graph, plan, kind)

        epochs = self.finetuning.epochs
        trained = train_and_keep(
            self.finetuning.train,
            epochs,
            begin,
            self.problem,
            self.graph,
            plan,
            seed,
            self.weights,
            FINETUNED,
        )
        start = _begun(self.problem, self.graph, plan, self.weights, FINETUNED)
        before, after = (
            evaluate(network, self.problem.validation, self.problem.loss, self.problem.metrics)
            for network in (start, trained)
        )
        return {
            **after,
            **{f"{name}{BEFORE}": value for name, value in before.items()},
            "epochs": epochs,
            TAKEN: float(no_worse(self.objectives, before, after)),
        }


class FinetuningTasks:
    """The best of a front on their way through fine-tuning; see `Tasks`.

    Args:
        records: Which are to be fine-tuned; those that were are left out, those whose fine-tuning
            failed or whose weights are lost are not.
        seed: Of every training.
        weights: Where its results must be.
        finished: Called with every record and what became of it.
    """

    def __init__(
        self,
        records: Sequence[Record],
        seed: int,
        weights: Weights,
        finished: Callable[[Record], None],
    ) -> None:
        self._seed = seed
        self._weights = weights
        self._notify = finished
        self._queue = [
            replace(one, finetuned=None)
            for one in records
            if one.plan is not None
            and not (isinstance(one.finetuned, Completed) and weights.whole(one.plan, FINETUNED))
        ]
        self._waiting: dict[str, Record] = {}

    @property
    def done(self) -> bool:
        """Whether all are fine-tuned."""
        return not self._queue and not self._waiting

    @property
    def kinds(self) -> dict[PruningPlan, str | None]:
        """By plan, which weights its network has before."""
        return {one.plan: trained_weights(one) for one in self._queue if one.plan is not None}

    def forget_failures(self, ledger: Ledger) -> None:
        """Deletes what a ledger has of these plans, unless it is of use: they are tried again."""
        for plan in self.kinds:
            done = isinstance(ledger.read(key_of(plan)), Completed)
            if not (done and self._weights.whole(plan, FINETUNED)):
                ledger.forget(key_of(plan))

    def next(self) -> Task | None:
        """Returns the next plan to fine-tune; None if all are under way."""
        if not self._queue:
            return None
        record = self._queue.pop(0)
        assert record.plan is not None
        task = Task(record.plan, self._seed)
        self._waiting[task.key] = record
        return task

    def tell(self, task: Task, outcome: Outcome) -> None:
        """Takes the outcome of a fine-tuning."""
        assert isinstance(outcome, Completed | Failed)
        if (
            isinstance(outcome, Completed)
            and not self._weights.file(task.plan, FINETUNED).exists()
        ):
            outcome = Failed(
                "the fine-tuned weights are on another machine; on a cluster all nodes need the "
                "run's folder under the same path."
            )
        if isinstance(outcome, Completed):  # one that failed goes on there when it is tried again
            forget_training(self._weights, task.plan, FINETUNED)
        self._notify(replace(self._waiting.pop(task.key), finetuned=outcome))

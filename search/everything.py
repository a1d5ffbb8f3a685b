"""The strategy `everything`: in every step a layer or neurons leave, whichever changes less.

Nascimento et al., "Pruning Everything, Everywhere, All at Once", IJCNN 2025, arXiv:2506.04513,
§III. From the network that a step begins with, its parent, two candidates are made: one loses the
residual block, the other the units, that the criterion (in the paper the KL divergence) ranks
lowest. Both are refitted and trained a little; the one whose penultimate features are more alike
to the parent's by CKA is the parent of the next step, at equal similarity the one that lost a
layer. The steps end when the FLOPs target is met.

Where this differs from the paper: both candidates of a step lose about the same MACs, where the
paper removes the same number of filters; units of all layers are ranked together, where the paper
takes the same share of every layer, and only within blocks; similarity is measured on training
images and not on test images; any removable block may leave; and the winner is not trained
further within the step, but with the best of the front at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paretoprune.criteria import (
    UNBOUNDED,
    Bounds,
    Criterion,
    SharedCalibration,
    block_saliency,
    select,
)
from paretoprune.criteria.ablation import penultimate_features
from paretoprune.criteria.blocks import inner_units
from paretoprune.criteria.cka import cka_to_dense
from paretoprune.search.candidate import Candidate
from paretoprune.search.errors import SearchStuck
from paretoprune.search.evaluation import Moved, on_device
from paretoprune.search.finetuning import Finetuning, forget_training, train_and_keep
from paretoprune.search.ledger import Ledger, Task, key_of
from paretoprune.search.metrics import device_of, evaluate
from paretoprune.search.objectives import SIMILARITY
from paretoprune.search.problem import Problem
from paretoprune.search.record import LAYER, NEURONS, Completed, Failed, Outcome, Record
from paretoprune.search.space import COARSE
from paretoprune.search.weights import RECOVERED, Weights
from paretoprune.surgery import (
    InfeasibleBudget,
    PruningGraph,
    PruningPlan,
    prune,
    reconstruct,
    trace,
)
from paretoprune.surgery.inputs import gather_inputs

if TYPE_CHECKING:  # the study imports optuna, which `import paretoprune.search` must not
    from paretoprune.search.study import Study

_SHARE = 0.05  # of the dense MACs that a step takes from a network without removable blocks
_IMAGES = 5000  # at most, on which candidates are compared with their parent


def network_of(
    problem: Problem, graph: PruningGraph, plan: PruningPlan, weights: Weights
) -> nn.Module:
    """Returns the network that a step begins with: the dense one where the plan takes nothing."""
    if plan == PruningPlan():
        return problem.model
    return weights.network(problem.model, graph, plan, RECOVERED)


def difference(parent: PruningPlan, plan: PruningPlan, graph: PruningGraph) -> PruningPlan:
    """Returns what a plan takes from the network of its parent: `parent.then` it is `plan`.

    Args:
        parent: A plan that takes nothing that `plan` leaves.
        plan: The plan.
        graph: Of the parent's network.
    """
    kept = {}
    for name, units in plan.kept.items():
        group = graph.groups.get(name)
        if group is None:  # inside a block that the parent lost
            continue
        before = parent.kept.get(name, range(group.size))
        place = {unit: position for position, unit in enumerate(before)}
        if len(units) < len(before):
            kept[name] = tuple(place[unit] for unit in units)
    gone = tuple(block for block in plan.removed if block not in parent.removed)
    return PruningPlan(kept, gone)


@dataclass(frozen=True, slots=True)
class CandidateStep:
    """Makes a candidate of its parent, recovers it and measures it; one for each worker.

    Attributes:
        problem: The dense network and its data.
        graph: Its graph.
        weights: Of the run.
        finetuning: How candidates are trained; None only refits them.
    """

    problem: Problem
    graph: PruningGraph
    weights: Weights
    finetuning: Finetuning | None

    def __call__(
        self, plan: PruningPlan, seed: int, parent: PruningPlan | None = None
    ) -> dict[str, float]:
        """Returns `macs`, `params`, `cka_to_parent` and what `evaluate` measures of a candidate.

        Args:
            plan: Of the candidate, from the dense network.
            seed: Of all that is drawn; torch's generators are left as they were.
            parent: Of the network that the step begins with.
        """
        before = parent or PruningPlan()
        large = network_of(self.problem, self.graph, before, self.weights)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            small = self._recovered(large, before, plan, seed)
        measured = evaluate(
            small, self.problem.validation, self.problem.loss, self.problem.metrics
        )
        measured[SIMILARITY] = self._similarity(large, before, small, plan)
        cost = self.graph.cost(plan)
        return {**measured, "macs": cost.macs, "params": cost.params}

    def _recovered(
        self, large: nn.Module, parent: PruningPlan, plan: PruningPlan, seed: int
    ) -> nn.Module:
        def begin() -> nn.Module:
            graph = trace(large, self.problem.example_inputs)
            step = difference(parent, plan, graph)
            model = on_device(large)
            calibration = Moved(self.problem.calibration, device_of(model))
            return reconstruct(prune(model, graph, step), model, graph, step, calibration)

        if self.finetuning is None or not self.finetuning.recovery:
            network = begin()
            self.weights.write(network, plan, RECOVERED)
            return network
        return train_and_keep(
            self.finetuning.train,
            self.finetuning.recovery,
            begin,
            self.problem,
            self.graph,
            plan,
            seed,
            self.weights,
            RECOVERED,
        )

    def _similarity(
        self, large: nn.Module, parent: PruningPlan, small: nn.Module, plan: PruningPlan
    ) -> float:
        model = on_device(large)
        inputs = gather_inputs(Moved(self.problem.calibration, device_of(model)), _IMAGES)
        features = penultimate_features(model, self.graph, inputs, parent)
        return cka_to_dense(on_device(small), plan, self.graph, inputs, features)


@dataclass(frozen=True, slots=True)
class _Open:
    """A candidate that waits for its outcome."""

    number: int
    origin: str
    candidate: Candidate
    plan: PruningPlan

    def to_json(self) -> dict[str, Any]:
        values = {"number": self.number, "origin": self.origin}
        return {
            **values,
            "candidate": self.candidate.to_json(),
            "plan": self.plan.to_json(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> _Open:
        return _Open(
            data["number"],
            data["origin"],
            Candidate.from_json(data["candidate"]),
            PruningPlan.from_json(data["plan"]),
        )


class Everything:
    """The steps of the strategy, as tasks for an executor; see `Tasks`.

    The study has every step before its candidates are evaluated, so that a killed search goes on
    within the step.

    Args:
        study: Where records and steps go.
        problem: The dense network and its data.
        graph: Its graph.
        criterion: What ranks blocks and units, with its name.
        target: MACs at which the steps end.
        trials: Most candidates.
        seed: Of every evaluation.
        weights: Of the run.
        finished: Called with every new record after the study has it.
        bounds: Which units and blocks may leave; no ratios, which are none of the dense network
            here.
    """

    def __init__(
        self,
        study: Study,
        problem: Problem,
        graph: PruningGraph,
        criterion: tuple[str, Criterion],
        *,
        target: int,
        trials: int,
        seed: int,
        weights: Weights,
        finished: Callable[[Record], None],
        bounds: Bounds = UNBOUNDED,
    ) -> None:
        self._study = study
        self._problem = problem
        self._graph = graph
        self._criterion = criterion
        self._target = target
        self._trials = trials
        self._seed = seed
        self._weights = weights
        self._notify = finished
        self._bounds = bounds
        self._records = {record.number: record for record in study.records()}
        self._parent = PruningPlan()
        self._steps = 0
        self._step: list[_Open] = []
        self._queue: list[_Open] = []
        self._resume()

    def _resume(self) -> None:
        """Goes through the steps that the study has."""
        while (noted := self._study.notes.get(f"step/{self._steps}")) is not None:
            self._step = [_Open.from_json(one) for one in noted]
            self._queue = [one for one in self._step if one.number not in self._records]
            for opened in self._queue:  # a driver that died left them behind, in this order
                asked = self._study.ask()
                assert asked.number == opened.number
            if not self._queue and self._all_failed:  # what made them fail may be mended
                again = [replace(one, number=self._study.ask().number) for one in self._step]
                self._begin(again)
            if self._queue:
                return
            self._decide()

    @property
    def _all_failed(self) -> bool:
        outcomes = [self._records[one.number].outcome for one in self._step]
        return all(isinstance(outcome, Failed) for outcome in outcomes)

    def forget_failures(self, ledger: Ledger) -> None:
        """Deletes what a ledger has of candidates that failed and are tried again."""
        for one in self._queue:
            if isinstance(ledger.read(key_of(one.plan)), Failed):
                ledger.forget(key_of(one.plan))

    @property
    def done(self) -> bool:
        """Whether the target is met, or no trials are left for another step."""
        if self._step:
            return False
        met = self._graph.cost(self._parent).macs <= self._target
        return met or len(self._records) + 2 > self._trials

    def next(self) -> Task | None:
        """Returns the next candidate; None if the step waits for its outcomes, or all is done.

        Raises:
            SearchStuck: If nothing can be removed any more.
        """
        if not self._queue and not self._step and not self.done:
            self._propose()
        if not self._queue:
            return None
        return Task(self._queue.pop(0).plan, self._seed, self._parent)

    def tell(self, task: Task, outcome: Outcome) -> None:
        """Records a candidate; after the last one of a step decides.

        Raises:
            SearchStuck: If no candidate of the step could be evaluated.
        """
        opened = next(one for one in self._step if key_of(one.plan) == task.key)
        cost = self._graph.cost(opened.plan)
        record = Record(opened.number, opened.candidate, opened.plan, cost, outcome, opened.origin)
        if isinstance(outcome, Completed):  # one that failed goes on there when it is tried again
            forget_training(self._weights, opened.plan, RECOVERED)
        self._study.tell(record)
        self._records[record.number] = record
        self._notify(record)
        if all(one.number in self._records for one in self._step):
            self._decide()

    def _decide(self) -> None:
        """Makes the more similar candidate the next parent."""
        records = [self._records[one.number] for one in self._step]
        completed = [one for one in records if isinstance(one.outcome, Completed)]
        if not completed:
            raise SearchStuck(
                f"no candidate of step {self._steps + 1} could be evaluated: "
                f"{'; '.join(str(one.outcome) for one in records)}."
            )
        best = max(completed, key=_preference)
        assert best.plan is not None
        self._parent = best.plan
        self._steps += 1
        self._step = []

    def _propose(self) -> None:
        """Asks the trials of the next step."""
        plans = dict(self._candidates())
        if not plans:
            macs = self._graph.cost(self._parent).macs
            raise SearchStuck(
                f"nothing can be removed any more at {macs:,} MACs, above the target of "
                f"{self._target:,}."
            )
        step = []
        for origin, plan in plans.items():
            candidate = Candidate(
                criterion=self._criterion[0],
                budget=self._graph.cost(plan).macs / self._graph.cost().macs,
                removed=plan.removed,
            )
            step.append(_Open(self._study.ask().number, origin, candidate, plan))
        self._begin(step)

    def _begin(self, step: list[_Open]) -> None:
        """Notes a step before its candidates are evaluated."""
        self._study.note(f"step/{self._steps}", [one.to_json() for one in step])
        self._step, self._queue = step, [*step]

    def _candidates(self) -> Iterator[tuple[str, PruningPlan]]:
        """Yields what may leave the parent: a layer, and neurons of about as many MACs."""
        network = network_of(self._problem, self._graph, self._parent, self._weights)
        graph = trace(network, self._problem.example_inputs)
        model = on_device(network)
        _, criterion = self._criterion
        batches = Moved(self._problem.calibration, device_of(model))
        calibration = SharedCalibration(batches, self._problem.loss)
        saliency = criterion(model, graph, calibration)
        blocks = block_saliency(criterion, saliency, model, graph, calibration)
        less = graph.cost().macs - int(_SHARE * self._graph.cost().macs)
        going = [name for name in self._bounds.blocks(graph) if name in blocks]
        if going:
            weakest = min(going, key=lambda name: blocks[name] * inner_units(graph, name))
            layer = PruningPlan(removed=(weakest,))
            less = graph.cost(layer).macs
            yield LAYER, self._plan(layer)
        try:
            budget = max(less, self._target)
            units = select(graph, saliency, budget=budget, bounds=self._bounds, within=COARSE)
        except InfeasibleBudget:
            return
        yield NEURONS, self._plan(units)

    def _plan(self, step: PruningPlan) -> PruningPlan:
        """Returns what a step makes of the parent's plan; removed blocks have no units left."""
        plan = self._parent.then(step)
        gone = {group for block in plan.removed for group in self._graph.blocks[block].groups}
        kept = {name: units for name, units in plan.kept.items() if name not in gone}
        return PruningPlan(kept, plan.removed)


def _preference(record: Record) -> tuple[float, bool]:
    assert isinstance(record.outcome, Completed)
    return record.outcome.metrics[SIMILARITY], record.origin == LAYER

"""Damage model: what finished trials say about how much each group matters.

A global ranking of units claims that the loss grows by the same amount per MAC, whichever group a
unit of equal saliency is taken from. So the claimed damage of a plan is, group by group,

    D_g = MACs that a unit of g saves * sum of the saliencies of the units that go,

and the loss is claimed to be proportional to the sum of all D_g. Finished trials show how wrong
that is: their losses are regressed on their D_g, with a coefficient per group that is 1 a priori,
and more for residual streams (Bayesian linear regression). Coefficients drawn from the posterior
(Thompson sampling) multiply the saliencies, and the ranking then minimises the loss that the model
expects at a budget. As in SPDY (Frantar & Alistarh, ICML 2022, arXiv:2201.13096), what is searched
is how far to trust each layer's own error; here every trial teaches about all of them at once.

Damages only nearly add up, so every second plan, by chance, is a mutation of one of the best plans
instead, in a few groups: of several mutants the one that loses least by the coefficients drawn.
And what is good at one budget is nearly as good at another: the best decisions of every budget are
tried at the others as they are. Small steps often decode to a plan that was tried before, which
would teach nothing; then others are drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from paretoprune.search.candidate import Candidate
from paretoprune.search.record import Completed, Record, Stopped
from paretoprune.search.space import OFFSET, SPARED, Decided, SearchSpace, base_saliency
from paretoprune.surgery import InfeasibleBudget, PruningGraph, PruningPlan

Array = NDArray[np.float64]
MUTATED = 0.5
"""Chance that a plan is a mutation of one of the best."""
_NOISE = 0.06  # what the model cannot explain, as a share of the spread of the losses
_BEST = 0.5  # chance that the best trial is the parent; else the next one, and so on
_GROUPS = 0.15  # share of the offsets that a mutation changes
_STEP, _HALVED = 0.6, 30  # its standard deviation, and after how many trials it is halved
_BLOCK = 0.15  # share of trials that remove a block more or less than their parent
_MUTANTS = 8  # so many are drawn, of which the model takes one
_DRAWS, _GROWTH = 4, 2.0  # most draws for a plan that is new, and how steps grow with each


class DamageModel:
    """Proposes the parameters of a trial from the records of those before.

    Args:
        space: What a trial decides.
        graph: The dense network's graph.
        saliencies: By criterion, by group; shape (group.size,).
        seed: Seed of every proposal.
        mutated: Chance that a plan is a mutation; else the model draws its offsets.
    """

    def __init__(
        self,
        space: SearchSpace,
        graph: PruningGraph,
        saliencies: Mapping[str, Mapping[str, Tensor]],
        seed: int,
        *,
        mutated: float = MUTATED,
    ) -> None:
        self._space = space
        self._graph = graph
        self._saliencies = saliencies
        self._seed = seed
        self._mutating = mutated
        self._ties = list(dict.fromkeys(space.ties.values()))
        self._saved = {name: _saved_per_unit(graph, name) for name in space.ties}
        self._ladders: dict[tuple[str, bool], dict[str, Array]] = {}
        self._claimed: dict[int, Array] = {}

    def __call__(
        self, records: Sequence[Record], number: int, planned: Collection[PruningPlan] = ()
    ) -> dict[str, Any]:
        """Returns all parameters of a trial.

        Its criterion, allocation and number of removed blocks are those of one of the best trials,
        at its budget or at another; the offsets are that trial's, drawn or mutated. Where many
        workers ask before any trial has finished, it departs from what a search begins with.
        Without offsets there is nothing to learn, and only the budget is decided.

        Args:
            records: The finished trials.
            number: Number of the trial.
            planned: Plans of trials that may not have finished; they are proposed as little as
                those of finished ones.
        """
        level = self._space.fixed(number)["budget"]
        done = sorted(
            (record for record in records if isinstance(record.outcome, Completed | Stopped)),
            key=lambda record: record.number,
        )
        if not self._ties:
            return {"budget": level}
        known = {record.plan for record in records if record.plan is not None}.union(planned)
        budget = self._space.budget(level)
        generator = np.random.default_rng([self._seed, number])
        step = _STEP * 0.5 ** (len(done) / _HALVED)
        for growth in _GROWTH ** np.arange(_DRAWS):
            parent = (
                parent_of(budget, done, generator) if done else self._seed_at(level, generator)
            )
            if parent.budget != budget:
                same = self._at(level, parent, self._offsets(parent), len(parent.removed))
                if self._new_plan(same, known) is not None:
                    return same  # decisions that are good elsewhere come before changed ones
            coefficients = self._coefficients(_like(parent, done), generator)
            offsets = [np.log(coefficients)]
            if generator.random() < self._mutating * growth:
                own = self._offsets(parent)
                offsets = [_mutated(own, step * growth, generator) for _ in range(_MUTANTS)]
            blocks = len(parent.removed)
            options = [
                self._at(level, parent, each - each.mean(), blocks + _more_blocks(generator))
                for each in offsets
            ]
            best = self._least_damage(options, parent, coefficients, known)
            if best is not None:
                return best
        return options[0]

    def _least_damage(
        self,
        options: Sequence[dict[str, Any]],
        parent: Candidate,
        coefficients: Array,
        known: Collection[PruningPlan],
    ) -> dict[str, Any] | None:
        """Returns the parameters whose plan loses least, None if no plan of them is new."""
        plans = [self._new_plan(option, known) for option in options]
        damages = [
            np.inf if plan is None else float(self._claim(plan, parent) @ coefficients)
            for plan in plans
        ]
        least = int(np.argmin(damages))
        return None if plans[least] is None else options[least]

    def _seed_at(self, level: float, generator: np.random.Generator) -> Candidate:
        """Returns what a search begins with, by one of the criteria, at a budget."""
        criterion = self._space.criteria[generator.integers(len(self._space.criteria))]
        return self._space.suggest(
            Decided(self._space.parameters(criterion, level, "global", spared=True))
        )

    def _at(self, level: float, parent: Candidate, offsets: Array, removed: int) -> dict[str, Any]:
        """Returns the parameters of a parent at a budget, with other offsets and blocks."""
        parameters = self._space.parameters(
            parent.criterion,
            level,
            parent.allocation,
            removed=int(np.clip(removed, 0, self._space.most_removed)),
        )
        return parameters | {
            f"offset/{tie}": float(value)
            for tie, value in zip(self._ties, offsets.clip(-OFFSET, OFFSET), strict=True)
        }

    def _new_plan(
        self, parameters: Mapping[str, Any], known: Collection[PruningPlan]
    ) -> PruningPlan | None:
        """Returns the plan of parameters, None if there is none or it was tried before."""
        candidate = self._space.suggest(Decided(parameters))
        try:
            plan = self._space.decode(candidate, self._graph, self._saliencies)
        except InfeasibleBudget:
            return None
        return None if plan in known else plan

    def _offsets(self, candidate: Candidate) -> Array:
        """Returns the offsets of a candidate, shape (n_offsets,)."""
        of_tie = {
            tie: candidate.offsets.get(group, 0.0) for group, tie in self._space.ties.items()
        }
        return np.array([of_tie[tie] for tie in self._ties])

    def _coefficients(self, records: Sequence[Record], generator: np.random.Generator) -> Array:
        """Returns a draw of the coefficient of each offset, shape (n_offsets,)."""
        claims = np.array([self._claim_of(record) for record in records])
        claims = claims.reshape(len(records), len(self._ties))  # also where there are none
        damage = np.array([_loss(record) for record in records])
        budgets = np.array([record.candidate.budget for record in records])
        for budget in np.unique(budgets):  # what is learnt are shares, so budgets can be pooled
            at = budgets == budget
            claims[at] /= max(float(np.median(claims[at].sum(1))), 1e-12)
            damage[at] /= max(float(np.median(damage[at])), 1e-12)
        expected = [np.exp(SPARED * (tie in self._space.streams)) for tie in self._ties]
        mean, precision = posterior(claims, damage, np.array(expected))
        factor = np.linalg.cholesky(precision)
        draw = mean + np.linalg.solve(factor.T, generator.normal(size=len(mean)))
        return np.clip(draw[1:], np.exp(-OFFSET), np.exp(OFFSET))

    def _claim_of(self, record: Record) -> Array:
        """Returns D of the groups of each offset, shape (n_offsets,)."""
        if record.number not in self._claimed:
            assert record.plan is not None, "what was evaluated has a plan"
            self._claimed[record.number] = self._claim(record.plan, record.candidate)
        return self._claimed[record.number]

    def _claim(self, plan: PruningPlan, candidate: Candidate) -> Array:
        """Returns D of the groups of each offset by given saliencies, shape (n_offsets,)."""
        ladders = self._ladder(candidate.criterion, candidate.allocation == "uniform")
        inside = {g for block in plan.removed for g in self._graph.blocks[block].groups}
        claims = dict.fromkeys(self._ties, 0.0)
        for name, tie in self._space.ties.items():
            kept = 0 if name in inside else len(plan.kept.get(name, ladders[name][1:]))
            claims[tie] += float(ladders[name][len(ladders[name]) - 1 - kept])
        return np.array(list(claims.values()))

    def _ladder(self, criterion: str, uniform: bool) -> dict[str, Array]:
        """Returns by group D after each number of units that go, shape (group.size + 1,)."""
        key = (criterion, uniform)
        if key not in self._ladders:
            base = base_saliency(self._saliencies[criterion], "uniform" if uniform else "global")
            self._ladders[key] = {
                name: np.concatenate(([0.0], np.sort(base[name].double().numpy()).cumsum()))
                * saved
                for name, saved in self._saved.items()
            }
        return self._ladders[key]


def parent_of(budget: float, done: Sequence[Record], generator: np.random.Generator) -> Candidate:
    """Returns one of the best decisions for a budget, the best likeliest.

    Those of other budgets are ranked among those of the own one as if there were equally many of
    both: the best of many is worth more than the best of few.

    Args:
        budget: Share of the dense MACs.
        done: Trials with a loss, at least one.
        generator: Draws.
    """
    at: dict[float, list[Record]] = {}
    for record in sorted(done, key=_loss):
        at.setdefault(record.candidate.budget, []).append(record)
    here = len(at.get(budget, ())) or 1
    ranked = sorted(
        (
            place if other == budget else (place + 1) * here / len(records),
            abs(other - budget),
            record.number,
            record.candidate,
        )
        for other, records in at.items()
        for place, record in enumerate(records)
    )
    return ranked[min(int(generator.geometric(_BEST)) - 1, len(ranked) - 1)][-1]


def _mutated(offsets: Array, step: float, generator: np.random.Generator) -> Array:
    """Returns offsets with a few of them changed, shape (n_offsets,)."""
    changed = generator.random(len(offsets)) < _GROUPS
    changed[generator.integers(len(offsets))] = True
    return offsets + changed * generator.normal(scale=step, size=len(offsets))


def _more_blocks(generator: np.random.Generator) -> int:
    """Returns how many blocks more than its parent a plan removes: mostly none."""
    return int(generator.choice((-1, 1))) if generator.random() < _BLOCK else 0


def _like(parent: Candidate, done: Sequence[Record]) -> list[Record]:
    """Returns the trials whose damage is claimed by the same saliencies."""
    return [
        record
        for record in done
        if record.candidate.criterion == parent.criterion
        and (record.candidate.allocation == "uniform") == (parent.allocation == "uniform")
    ]


def posterior(claims: Array, damage: Array, expected: Array) -> tuple[Array, Array]:
    """Returns mean and precision of intercept and coefficients.

    damage = a + claims @ c + noise with a ~ N(0, 1) and c ~ N(expected, 1). The intercept takes up
    that the loss is not proportional; the noise is a share of the spread of the damages.

    Args:
        claims: shape (n_trials, n).
        damage: shape (n_trials,).
        expected: shape (n,).

    Returns:
        Shapes (1 + n,) and (1 + n, 1 + n).
    """
    design = np.hstack([np.ones((len(claims), 1)), claims])
    prior = np.concatenate(([0.0], expected))
    noise = max(_NOISE * damage.std(), 1e-3) if len(damage) else 1.0
    precision = np.eye(len(prior)) + design.T @ design / noise**2
    return np.linalg.solve(precision, prior + design.T @ damage / noise**2), precision


def _loss(record: Record) -> float:
    assert isinstance(record.outcome, Completed | Stopped), "no other trials have losses"
    return record.outcome.metrics["loss"]


def _saved_per_unit(graph: PruningGraph, group: str) -> float:
    """Returns the MACs that a unit of a group saves, on average."""
    size = graph.groups[group].size
    least = graph.cost(PruningPlan({group: (0,)})).macs
    return (graph.cost().macs - least) / max(1, size - 1)

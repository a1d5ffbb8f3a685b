"""Damage model: what finished trials say about how much each group matters.

A global ranking of units claims that the loss grows by the same amount per MAC, whichever group a
unit of equal saliency is taken from. So the claimed damage of a plan is, group by group,

    D_g = MACs that a unit of g saves * sum of the saliencies of the units that go,

and the loss above the dense network's is claimed to be proportional to the sum of all D_g.
Finished trials show how wrong that is: their losses are regressed on their D_g, with a coefficient
per group that is 1 a priori (Bayesian linear regression; widths of prior and noise by their
evidence). Coefficients drawn from the posterior multiply the saliencies, and the ranking then
minimises the loss that the model expects at a budget. As in SPDY (Frantar & Alistarh, ICML 2022,
arXiv:2201.13096), what is searched is how far to trust each layer's own error; here every trial
teaches about all of them at once.

Damages only nearly add up, so every second plan, by chance, is a mutation of one of the best plans
instead, in a few groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from paretoprune.search.candidate import Candidate
from paretoprune.search.record import Completed, Record
from paretoprune.search.space import OFFSET, SearchSpace, base_saliency
from paretoprune.surgery import PruningGraph, PruningPlan

Array = NDArray[np.float64]
WIDTHS = (0.5, 1.0, 2.0)
"""Standard deviations of a coefficient a priori; the likeliest is taken."""
NOISES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Standard deviations of what the model cannot explain, as shares of the loss above dense."""
_BOLDNESS = 0.3  # of the draws, as a share of the posterior's standard deviation
_BEST = 0.5  # chance that the best trial is the parent; else the next one, and so on
_GROUPS = 0.15  # share of the offsets that a mutation changes
_STEP, _HALVED = 0.6, 30  # its standard deviation, and after how many trials it is halved
_BLOCK = 0.15  # share of trials that remove a block more or less than their parent


class DamageModel:
    """Proposes the parameters of a trial from the records of those before.

    Args:
        space: What a trial decides.
        graph: The dense network's graph.
        saliencies: By criterion, by group; shape (group.size,).
        dense: Loss of the dense network on the search split.
        seed: Seed of every proposal.
    """

    def __init__(
        self,
        space: SearchSpace,
        graph: PruningGraph,
        saliencies: Mapping[str, Mapping[str, Tensor]],
        dense: float,
        seed: int,
    ) -> None:
        self._space = space
        self._graph = graph
        self._saliencies = saliencies
        self._dense = dense
        self._seed = seed
        self._ties = list(dict.fromkeys(space.ties.values()))
        self._saved = {name: _saved_per_unit(graph, name) for name in space.ties}
        self._ladders: dict[tuple[str, bool], dict[str, Array]] = {}
        self._known: dict[int, Array] = {}

    def __call__(self, records: Sequence[Record], number: int) -> dict[str, Any]:
        """Returns all parameters of a trial.

        Its criterion, allocation and number of removed blocks are those of one of the best trials
        at its budget; the offsets are drawn or mutated.

        Args:
            records: The finished trials.
            number: Number of the trial.
        """
        level = self._space.fixed(number)["budget"]
        done = sorted(
            (record for record in records if isinstance(record.outcome, Completed)),
            key=lambda record: record.number,
        )
        if not done:
            return {"budget": level}
        generator = np.random.default_rng([self._seed, number])
        parent = self._parent(level, done, generator)
        if generator.random() < 0.5:
            offsets = self._mutated(parent, len(done), generator)
        else:
            offsets = np.log(self._coefficients(_like(parent, done), generator))
        offsets -= offsets.mean() if len(offsets) else 0.0
        removed = len(parent.removed)
        if generator.random() < _BLOCK:
            removed += generator.choice((-1, 1))
        parameters = self._space.parameters(
            parent.criterion,
            level,
            parent.allocation,
            int(np.clip(removed, 0, self._space.most_removed)),
        )
        return parameters | {
            f"offset/{tie}": float(value)
            for tie, value in zip(self._ties, offsets.clip(-OFFSET, OFFSET), strict=True)
        }

    def _mutated(self, parent: Candidate, trials: int, generator: np.random.Generator) -> Array:
        """Returns the parent's offsets with a few of them changed, shape (n_offsets,)."""
        of_tie = {tie: parent.offsets.get(group, 0.0) for group, tie in self._space.ties.items()}
        offsets = np.array([of_tie[tie] for tie in self._ties])
        changed = generator.random(len(offsets)) < _GROUPS
        if len(offsets):
            changed[generator.integers(len(offsets))] = True
        step = _STEP * 0.5 ** (trials / _HALVED)
        return offsets + changed * generator.normal(scale=step, size=len(offsets))

    def _parent(
        self, level: float, done: Sequence[Record], generator: np.random.Generator
    ) -> Candidate:
        """Returns one of the best decisions at a budget, or the nearest, the best likeliest."""
        budgets = sorted(
            {record.candidate.budget for record in done},
            key=lambda budget: abs(budget - self._space.budget(level)),
        )
        near = [record for record in done if record.candidate.budget == budgets[0]]
        near.sort(key=lambda record: (_loss(record), record.number))
        return near[min(int(generator.geometric(_BEST)) - 1, len(near) - 1)].candidate

    def _coefficients(self, records: Sequence[Record], generator: np.random.Generator) -> Array:
        """Returns a draw of the coefficient of each offset, shape (n_offsets,)."""
        claims = np.stack([self._claim(record) for record in records])
        losses = np.array([_loss(record) for record in records])
        damage = losses - min(self._dense, losses.min() - 0.1 * np.ptp(losses))
        budgets = np.array([record.candidate.budget for record in records])
        for budget in np.unique(budgets):  # what is learnt are shares, so budgets can be pooled
            at = budgets == budget
            claims[at] /= max(claims[at].sum(1).mean(), 1e-12)
            damage[at] /= max(damage[at].mean(), 1e-12)
        mean, precision = likeliest(claims, damage)
        factor = np.linalg.cholesky(precision)
        draw = mean + _BOLDNESS * np.linalg.solve(factor.T, generator.normal(size=len(mean)))
        return np.clip(draw, np.exp(-OFFSET), np.exp(OFFSET))

    def _claim(self, record: Record) -> Array:
        """Returns D of the groups of each offset, shape (n_offsets,)."""
        if record.number not in self._known:
            plan, uniform = record.plan, record.candidate.allocation == "uniform"
            assert plan is not None, "a completed trial has a plan"
            ladders = self._ladder(record.candidate.criterion, uniform)
            inside = {g for block in plan.removed for g in self._graph.blocks[block].groups}
            claims = dict.fromkeys(self._ties, 0.0)
            for name, tie in self._space.ties.items():
                kept = 0 if name in inside else len(plan.kept.get(name, ladders[name][1:]))
                claims[tie] += float(ladders[name][len(ladders[name]) - 1 - kept])
            self._known[record.number] = np.array(list(claims.values()))
        return self._known[record.number]

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


def _like(parent: Candidate, done: Sequence[Record]) -> list[Record]:
    """Returns the trials whose damage is claimed by the same saliencies."""
    return [
        record
        for record in done
        if record.candidate.criterion == parent.criterion
        and (record.candidate.allocation == "uniform") == (parent.allocation == "uniform")
    ]


def likeliest(claims: Array, damage: Array) -> tuple[Array, Array]:
    """Returns mean and precision of the coefficients, at the likeliest widths of prior and noise.

    damage = claims @ c + noise with c ~ N(1, width^2); the noise of a trial is proportional to its
    damage, so that bad trials, where damages no longer add up, count less.

    Args:
        claims: shape (n_trials, n_coefficients).
        damage: shape (n_trials,).

    Returns:
        Shapes (n_coefficients,) and (n_coefficients, n_coefficients).
    """
    count = claims.shape[1]
    off = damage - claims.sum(1)
    best: tuple[float, Array, Array] | None = None
    for width in WIDTHS:
        for noise in NOISES:
            variance = (noise * damage.clip(min=0.01)) ** 2
            covariance = np.diag(variance) + width**2 * claims @ claims.T
            _, size = np.linalg.slogdet(covariance)
            evidence = -0.5 * (size + off @ np.linalg.solve(covariance, off))
            if best is None or evidence > best[0]:
                precision = np.eye(count) / width**2 + (claims / variance[:, None]).T @ claims
                pull = (claims / variance[:, None]).T @ off
                best = evidence, 1 + np.linalg.solve(precision, pull), precision
    assert best is not None, "there are widths to choose from"
    return best[1], best[2]


def _loss(record: Record) -> float:
    assert isinstance(record.outcome, Completed), "only completed trials have losses"
    return record.outcome.metrics["loss"]


def _saved_per_unit(graph: PruningGraph, group: str) -> float:
    """Returns the MACs that a unit of a group saves, on average."""
    size = graph.groups[group].size
    least = graph.cost(PruningPlan({group: (0,)})).macs
    return (graph.cost().macs - least) / max(1, size - 1)

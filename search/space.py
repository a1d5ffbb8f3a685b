"""SearchSpace: what a sampler decides, where it begins, and how a decision becomes a plan.

A sampler decides a shape, never a size: the criterion, one of a few budgets, a base allocation,
how far each group departs from it, and how many blocks go. The budget solver turns the shape into
a plan on budget.

A base allocation is `global` or `uniform`, or, where there are blocks, `joint`: one ranking of all
units and blocks by the criterion chooses neurons and layers together.

Two choices keep the space small enough for a hundred trials. Groups share offsets where there are
many of them, or where the user asks for it (`search.ties`). And blocks are not one boolean each,
of which a sampler that knows nothing would set half: blocks are ranked once by the measured damage
of removing each alone, and a sampler decides how many of that ranking go and by how much single
blocks move in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from paretoprune.criteria import UNBOUNDED, Bounds, largest_macs, select, smallest_macs
from paretoprune.search.candidate import Candidate
from paretoprune.search.ties import MOST_OFFSETS, Granularity, streams_of, ties_of
from paretoprune.surgery import PruningGraph, PruningPlan

Allocation = Literal["global", "joint", "uniform"]
LEVELS = (1.0, 0.85, 0.7, 0.55)
"""Budgets of the search as shares of its target; below the target so that a front appears."""
OFFSET = 2.3
"""Offsets lie in [-OFFSET, OFFSET]; they are added to the logarithms of saliencies."""
SPARED = 1.0
"""The offset of residual streams in the seeds that spare them."""
COARSE = 1.0
"""How far under a budget plans may lie where single units are coarser than one percent of it."""
SHIFT = 0.25
"""A block moves by at most this share of the ranking."""
_BLOCK_SEEDS = (1, 2, 4)
_BLOCKS = "1 + blocks"  # on a logarithmic scale: most good plans remove none or few


class Suggester(Protocol):
    """Decides parameters one at a time; an Optuna trial is one."""

    def suggest_float(self, name: str, low: float, high: float) -> float:
        """Returns a value in [low, high]."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Returns a value in [low, high]; with `log` small ones are likelier."""
        ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Returns one of `choices`."""
        ...


@dataclass(frozen=True, slots=True)
class Decided:
    """A suggester whose parameters are decided.

    Attributes:
        parameters: By name.
    """

    parameters: Mapping[str, Any]

    def suggest_float(self, name: str, low: float, high: float) -> float:
        """Returns the parameter."""
        return float(self.parameters[name])

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Returns the parameter."""
        return int(self.parameters[name])

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Returns the parameter."""
        return self.parameters[name]


@dataclass(frozen=True)
class SearchSpace:
    """What the sampler of one search decides.

    Attributes:
        criteria: Names of the criteria that may rank units.
        target: Most MACs that a plan may have.
        dense: MACs of the dense network.
        levels: Budgets as shares of the target.
        ties: The offset that each group takes, by group name; several groups may share one.
        streams: The offsets of groups outside of all blocks, where there are blocks: what is lost
            of a residual stream is lost to every layer behind, and criteria that look at one layer
            at a time put it too low.
        blocks: Removable blocks, the one whose removal does least damage per MAC first.
        most_removed: Most blocks that a sampler removes.
        granularity: Which groups share an offset, see `search.ties`.
        bounds: Which unit counts groups may keep, and which blocks may go.
        block_saliencies: By criterion, the saliency of each block on the scale of its units; a
            measurement like the units' saliencies, and no part of what tells spaces apart.
    """

    criteria: tuple[str, ...]
    target: int
    dense: int
    levels: tuple[float, ...]
    ties: Mapping[str, str]
    streams: tuple[str, ...]
    blocks: tuple[str, ...]
    most_removed: int
    granularity: Granularity = "group"
    bounds: Bounds = UNBOUNDED
    block_saliencies: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @staticmethod
    def of(
        graph: PruningGraph,
        saliencies: Mapping[str, Mapping[str, Tensor]],
        target: int,
        blocks: Sequence[str],
        block_saliencies: Mapping[str, Mapping[str, float]] | None = None,
        *,
        granularity: Granularity = "group",
        bounds: Bounds = UNBOUNDED,
    ) -> SearchSpace:
        """Returns the space for a network.

        Args:
            graph: The dense network's graph.
            saliencies: By criterion, by group; shape (group.size,).
            target: Most MACs that a plan may have.
            blocks: All removable blocks, least damage first.
            block_saliencies: By criterion, by block; None leaves `joint` allocations out.
            granularity: Which groups share an offset, see `search.ties`.
            bounds: Which unit counts groups may keep, and which blocks may go.

        Raises:
            InfeasibleBudget: If no plan meets the target; names the smallest reachable MACs.
        """
        may_go = bounds.blocks(graph)
        blocks = tuple(block for block in blocks if block in may_go)
        smallest = smallest_macs(graph, blocks, bounds)
        if smallest > target:  # raises, with the reachable minimum in its message
            first = next(iter(saliencies.values()))
            select(graph, first, budget=target, removed=blocks, bounds=bounds)
        ties = ties_of(graph, granularity, bounds)
        return SearchSpace(
            criteria=tuple(saliencies),
            target=target,
            dense=graph.cost().macs,
            levels=tuple(level for level in LEVELS if int(level * target) >= smallest),
            ties=ties,
            streams=streams_of(graph, ties, granularity),
            blocks=blocks,
            most_removed=_most_removed(graph, blocks, target, bounds),
            granularity=granularity,
            bounds=bounds,
            block_saliencies=(block_saliencies or {}) if blocks else {},
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the space as plain values: two searches with equal ones can share a study."""
        values = {**vars(self), "ties": dict(self.ties), "offset": OFFSET} | {
            name: list(getattr(self, name))
            for name in ("criteria", "levels", "streams", "blocks", "allocations")
        }
        values["bounds"] = self.bounds.to_json()
        del values["block_saliencies"]
        return values

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """The base allocations that a sampler may take."""
        return ("global", "joint", "uniform") if self.block_saliencies else ("global", "uniform")

    def suggest(self, trial: Suggester) -> Candidate:
        """Returns the candidate that `trial` decides."""
        criterion = trial.suggest_categorical("criterion", self.criteria)
        level = trial.suggest_categorical("budget", self.levels)
        allocation = trial.suggest_categorical("allocation", self.allocations)
        tied = {
            tie: trial.suggest_float(f"offset/{tie}", -OFFSET, OFFSET)
            for tie in dict.fromkeys(self.ties.values())
        }
        return Candidate(
            criterion=criterion,
            budget=self.budget(level),
            allocation=allocation,
            offsets={group: tied[tie] for group, tie in self.ties.items()},
            removed=self._suggest_removed(trial),
        )

    def _suggest_removed(self, trial: Suggester) -> tuple[str, ...]:
        if not self.most_removed:
            return ()
        count = trial.suggest_int(_BLOCKS, 1, 1 + self.most_removed, log=True) - 1
        shifts = {
            block: trial.suggest_float(f"block/{block}", -SHIFT, SHIFT)
            for block in self._movable()
        }
        rank = {block: index / len(self.blocks) for index, block in enumerate(self.blocks)}
        order = sorted(self.blocks, key=lambda block: rank[block] + shifts.get(block, 0.0))
        return tuple(order[:count])

    def _movable(self) -> tuple[str, ...]:
        return self.blocks if 1 < len(self.blocks) <= MOST_OFFSETS else ()

    def seeds(self, trials: int) -> list[dict[str, Any]]:
        """Returns the parameters of the trials that a search begins with.

        What the field knows: every criterion's one-shot global, joint and uniform allocation at
        the target, and the global one that spares residual streams; then at lower budgets; then
        the first blocks of the ranking removed. About a third of the trials, but every criterion's
        global allocation at the target is there when there are trials enough.

        Args:
            trials: How many trials the search has.
        """
        shots = [
            self.parameters(criterion, level, allocation, spared=spared)
            for level in self.levels
            for allocation, spared in self._bases
            for criterion in self.criteria
        ]
        shots.extend(
            self.parameters(self.criteria[0], 1.0, "global", removed=count)
            for count in _BLOCK_SEEDS
            if count <= self.most_removed
        )
        most = min(trials, max(len(self.criteria), round(trials / 3)))
        return shots[:most]

    @property
    def _bases(self) -> list[tuple[Allocation, bool]]:
        """The allocations of the seeds, and whether they spare streams."""
        spared: list[tuple[Allocation, bool]] = [("global", True)] if self.streams else []
        return [("global", False), *spared, *((each, False) for each in self.allocations[1:])]

    def fixed(self, number: int) -> dict[str, Any]:
        """Returns the parameters that the sampler may not decide: the budget, in turn.

        Every second trial is at the target, which is what the user asked for; the others take
        turns in the lower budgets. Left to itself a sampler spends nearly all trials where the
        hypervolume grows most, at one or two budgets, and finds less at every other.

        Args:
            number: Number of the trial.
        """
        lower = self.levels[1:]
        turn = number // 2
        return {"budget": lower[turn % len(lower)] if number % 2 and lower else self.levels[0]}

    def decode(
        self,
        candidate: Candidate,
        graph: PruningGraph,
        saliencies: Mapping[str, Mapping[str, Tensor]],
    ) -> PruningPlan:
        """Returns the plan on budget that a candidate stands for.

        Where the blocks that it removes alone undercut the budget, the last of them stay; where
        the budget cannot be reached otherwise, the next ones of the ranking go too.

        Raises:
            InfeasibleBudget: If there is none.
        """
        target = round(candidate.budget * self.dense)
        removed = self._repaired(graph, candidate.removed, target)
        saliency = saliencies[candidate.criterion]
        if candidate.allocation == "uniform" and not any(candidate.offsets.values()):
            return select(
                graph,
                saliency,
                budget=target,
                removed=removed,
                allocation="uniform",
                bounds=self.bounds,
                within=COARSE,
            )
        base = base_saliency(saliency, candidate.allocation)
        factors = {name: math.exp(candidate.offsets.get(name, 0.0)) for name in base}
        blocks = None
        if candidate.allocation == "joint":
            zero = _zero(saliency)
            blocks = {
                name: (score - zero) * _mean(factors[group] for group in graph.blocks[name].groups)
                for name, score in self.block_saliencies[candidate.criterion].items()
            }
        return select(
            graph,
            {name: values * factors[name] for name, values in base.items()},
            budget=target,
            removed=removed,
            blocks=blocks,
            bounds=self.bounds,
            within=COARSE,
        )

    def _repaired(
        self, graph: PruningGraph, removed: Sequence[str], target: int
    ) -> tuple[str, ...]:
        chosen = list(removed)
        while chosen and largest_macs(graph, tuple(chosen), self.bounds) <= 0.99 * target:
            chosen.pop()
        others = [block for block in self.blocks if block not in chosen]
        while others and smallest_macs(graph, tuple(chosen), self.bounds) > target:
            chosen.append(others.pop(0))
        return tuple(chosen)

    def budget(self, level: float) -> float:
        """Returns a level as a share of the dense MACs."""
        return int(level * self.target) / self.dense

    def parameters(
        self,
        criterion: str,
        level: float,
        allocation: str,
        *,
        removed: int = 0,
        spared: bool = False,
    ) -> dict[str, Any]:
        """Returns all parameters of a candidate.

        Args:
            criterion: Name of the criterion.
            level: Budget as a share of the target.
            allocation: Base allocation.
            removed: How many blocks of the ranking go.
            spared: Whether the offsets spare residual streams; else they are all 0.
        """
        parameters: dict[str, Any] = {
            "criterion": criterion,
            "budget": level,
            "allocation": allocation,
            **{
                f"offset/{tie}": SPARED * (spared and tie in self.streams)
                for tie in dict.fromkeys(self.ties.values())
            },
        }
        if self.most_removed:
            parameters[_BLOCKS] = 1 + removed
            parameters.update({f"block/{block}": 0.0 for block in self._movable()})
        return parameters


def base_saliency(saliency: Mapping[str, Tensor], allocation: str) -> dict[str, Tensor]:
    """Returns the saliencies, from 0 up, whose global ranking is a base allocation.

    Args:
        saliency: Of a criterion, by group; shape (group.size,).
        allocation: For `uniform` they are the ranks within each group, as shares of it.
    """
    if allocation == "uniform":
        return {
            name: (values.argsort(stable=True).argsort() + 0.5).double() / len(values)
            for name, values in saliency.items()
        }
    zero = _zero(saliency)
    return {name: values.double() - zero for name, values in saliency.items()}


def _zero(saliency: Mapping[str, Tensor]) -> float:
    """Returns the lowest saliency where it is negative, else 0."""
    return min([0.0, *(float(values.min()) for values in saliency.values())])


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 1.0


def _most_removed(
    graph: PruningGraph, blocks: tuple[str, ...], target: int, bounds: Bounds
) -> int:
    """Returns how many blocks of the ranking can go while the target still takes units."""
    count = 0
    while count < len(blocks) and largest_macs(graph, blocks[: count + 1], bounds) > target:
        count += 1
    return count

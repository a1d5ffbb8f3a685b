"""Meets a budget: a one-dimensional search on a prefix of units, then a greedy fill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from paretoprune.criteria.bounds import UNBOUNDED, Bounds
from paretoprune.surgery import InfeasibleBudget, PrunableGroup, PruningGraph

_SLACK = 0.99
_ROUNDS = 40
_EXCHANGED = 32  # groups between which units are exchanged; all pairs of more cost memory


class Allowance:
    """The MACs that unit counts of the rankable groups cost, everything else being decided.

    A group's level is the place of its unit count among those that it may keep, from 0 up.

    Args:
        graph: From `surgery.trace`.
        groups: The groups whose counts vary.
        removed: Blocks that are removed whole.
        bounds: Which counts groups may keep.

    Attributes:
        tops: The highest level of every group, int64, shape (n_groups,).
        dense: MACs of the dense network.
        smallest: MACs with every group at its lowest level.
        largest: MACs with every group at its highest level.
        coarse: Whether `bounds` leave more than one unit between counts.
    """

    def __init__(
        self,
        graph: PruningGraph,
        groups: Sequence[PrunableGroup],
        removed: tuple[str, ...],
        bounds: Bounds = UNBOUNDED,
    ) -> None:
        self.groups = tuple(groups)
        self.coarse = bounds.multiple > 1
        self._graph = graph
        self._removed = graph.removed_vector(removed)
        names = list(graph.groups)
        self._columns = torch.tensor(
            [names.index(group.name) for group in groups], dtype=torch.int64
        )
        self._all = torch.tensor([g.size for g in graph.groups.values()], dtype=torch.float64)
        counts = [bounds.counts(graph, group) for group in groups]
        self.tops = torch.tensor([len(each) - 1 for each in counts], dtype=torch.int64)
        self._counts = pad_sequence(counts) if counts else torch.zeros(1, 0, dtype=torch.float64)
        self.dense = graph.cost().macs
        lowest, highest = self.counts(torch.stack([torch.zeros_like(self.tops), self.tops]))
        self.smallest = round(self.macs(lowest[None]).item())
        self.largest = round(self.macs(highest[None]).item())

    def counts(self, levels: Tensor) -> Tensor:
        """Returns the unit counts of levels, float64; both have shape (n_plans, n_groups)."""
        return self._counts.gather(0, levels)

    def macs(self, counts: Tensor) -> Tensor:
        """Returns the MACs of unit counts, shape (n_plans, n_groups) -> (n_plans,)."""
        full = self._all.repeat(len(counts), 1)
        full[:, self._columns] = counts
        return self._graph.macs(full, self._removed).round()

    def macs_at(self, levels: Tensor) -> Tensor:
        """Returns the MACs of levels, shape (n_plans, n_groups) -> (n_plans,)."""
        return self.macs(self.counts(levels))

    def steps(self, priorities: Sequence[Tensor]) -> list[Tensor]:
        """Returns, per group, the priority of every step from a level to the next.

        Units that come or go together have the priority of the middle one.

        Args:
            priorities: Per group, shape (group.size,).
        """
        steps = []
        for index, values in enumerate(priorities):
            kept = self._counts[: self.tops[index] + 1, index].long()
            ladder = values.sort(descending=True).values
            steps.append(ladder[(kept[1:] + kept[:-1]) // 2])
        return steps


def fit(
    allowance: Allowance, priorities: Sequence[Tensor], target: int, within: float
) -> dict[str, tuple[int, ...]]:
    """Returns the kept units by group, with `0.99 * target < macs <= target`.

    Counts may jump over that window where bounds leave only multiples, or where `within` allows
    it; then the plan has the most MACs up to the target that exchanges between two groups at a
    time lead to.

    Args:
        allowance: Prices counts.
        priorities: Per group, shape (group.size,); the lowest leaves first.
        target: Budget in MACs, reachable.
        within: How far under the target the plan may lie, as a share of it.

    Raises:
        InfeasibleBudget: If unit counts jump over the window and over `within`, without multiples.
    """
    if not allowance.groups:
        return {}
    steps = allowance.steps(priorities)
    levels = _fill(allowance, steps, _prefix(allowance, steps, target)[0], target)
    if allowance.macs_at(levels[None]).item() <= _SLACK * target:
        levels = _nudge(allowance, levels, target, within)
    kept = {}
    counts = allowance.counts(levels[None])[0].int().tolist()
    for group, values, count in zip(allowance.groups, priorities, counts, strict=True):
        if count < group.size:
            order = values.argsort(stable=True)
            kept[group.name] = tuple(order[group.size - count :].tolist())
    return kept


def threshold(allowance: Allowance, priorities: Sequence[Tensor], target: int) -> float:
    """Returns the highest priority among the units that leave for a target; -inf if none does.

    Units that bounds let leave in any case do not count.

    Args:
        allowance: Prices counts.
        priorities: Per group, shape (group.size,); the lowest leaves first.
        target: Budget in MACs.
    """
    if not allowance.groups:
        return -torch.inf
    return _prefix(allowance, allowance.steps(priorities), target)[1]


def _prefix(allowance: Allowance, steps: Sequence[Tensor], target: int) -> tuple[Tensor, float]:
    """Returns the levels after the shortest prefix of leaving units that meets the target.

    Beside them the priority of those that left last, -inf if none did.
    """
    leaving = torch.cat([values.flip(0) for values in steps])
    owner = torch.cat([torch.full((len(values),), at) for at, values in enumerate(steps)])
    order = leaving.argsort(stable=True)
    owner = owner[order]

    def levels(length: int) -> Tensor:
        return allowance.tops - owner[:length].bincount(minlength=len(steps))

    low, high = 0, len(owner)
    while low < high:
        middle = (low + high) // 2
        if allowance.macs_at(levels(middle)[None]).item() <= target:
            high = middle
        else:
            low = middle + 1
    return levels(low), float(leaving[order[low - 1]]) if low else -torch.inf


def _fill(allowance: Allowance, steps: Sequence[Tensor], levels: Tensor, target: int) -> Tensor:
    """Returns the levels after taking back, best first, the units that still fit."""
    single = torch.eye(len(levels), dtype=torch.int64)
    while True:
        higher = torch.minimum(levels + single, allowance.tops)
        fits = (allowance.macs_at(higher) <= target) & (levels < allowance.tops)
        if not bool(fits.any()):
            return levels
        best = max(
            fits.nonzero().squeeze(1).tolist(),
            key=lambda index: steps[index][levels[index]].item(),
        )
        levels = levels + single[best]


def _nudge(allowance: Allowance, levels: Tensor, target: int, within: float) -> Tensor:
    """Returns levels inside the window, by exchanging few steps of two groups at a time."""
    size = len(levels)
    chosen = torch.linspace(0, size - 1, min(size, _EXCHANGED)).long().unique()
    eye = torch.eye(size, dtype=torch.int64)[chosen]
    amounts = torch.tensor([-4, -3, -2, -1, 1, 2, 3, 4])
    single = (amounts[:, None, None] * eye).reshape(-1, size)
    pairs = (single[:, None] + single[None]).reshape(-1, size).unique(dim=0)
    seen = {tuple(levels.tolist())}
    most, best = allowance.macs_at(levels[None]).item(), levels
    able = not bool((levels == allowance.tops).all())  # else nothing is left to take back
    for _ in range(_ROUNDS * able):
        near = levels + pairs
        near = near[((near >= 0) & (near <= allowance.tops)).all(1)]
        macs = allowance.macs_at(near)
        order = torch.where(macs <= target, macs, -macs).argsort(descending=True)
        for index in order[: len(seen) + 1].tolist():
            if tuple(near[index].tolist()) not in seen:
                levels = near[index]
                break
        else:
            break
        reached = macs[index].item()
        if _SLACK * target < reached <= target:
            return levels
        if most < reached <= target:
            most, best = reached, levels
        seen.add(tuple(levels.tolist()))
    if allowance.coarse or most > (1 - within) * target:
        return best
    raise InfeasibleBudget(
        f"no plan found between {_SLACK:.0%} and 100 % of the budget of {target:,} MACs "
        f"({target / allowance.dense:.2%} of the dense network); the smallest reachable is "
        f"{allowance.smallest:,} MACs ({allowance.smallest / allowance.dense:.2%}), and single "
        f"units of this network are coarser than the window: try another budget."
    )

"""Meets a budget: a one-dimensional search on a prefix of units, then a greedy fill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paretoprune.surgery import InfeasibleBudget, PrunableGroup, PruningGraph

_SLACK = 0.99
_ROUNDS = 40
_EXCHANGED = 32  # groups between which units are exchanged; all pairs of more cost memory


class Allowance:
    """The MACs that unit counts of the rankable groups cost, everything else being decided.

    Args:
        graph: From `surgery.trace`.
        groups: The groups whose counts vary.
        removed: Blocks that are removed whole.
        minimum: Units that stay in every group; a smaller group stays whole.

    Attributes:
        sizes: Units of every group, float64, shape (n_groups,).
        least: Units that stay in every group, likewise.
        dense: MACs of the dense network.
        smallest: MACs with the least units in every group.
        largest: MACs with all units.
    """

    def __init__(
        self,
        graph: PruningGraph,
        groups: Sequence[PrunableGroup],
        removed: tuple[str, ...],
        minimum: int = 1,
    ) -> None:
        self.groups = tuple(groups)
        self._graph = graph
        self._removed = graph.removed_vector(removed)
        names = list(graph.groups)
        self._columns = torch.tensor(
            [names.index(group.name) for group in groups], dtype=torch.int64
        )
        self._all = torch.tensor([g.size for g in graph.groups.values()], dtype=torch.float64)
        self.sizes = torch.tensor([group.size for group in groups], dtype=torch.float64)
        self.least = self.sizes.clamp(max=minimum)
        self.dense = graph.cost().macs
        self.smallest = round(self.macs(self.least[None]).item())
        self.largest = round(self.macs(self.sizes[None]).item())

    def macs(self, counts: Tensor) -> Tensor:
        """Returns the MACs of unit counts, shape (n_plans, n_groups) -> (n_plans,)."""
        full = self._all.repeat(len(counts), 1)
        full[:, self._columns] = counts
        return self._graph.macs(full, self._removed).round()


def fit(
    allowance: Allowance, priorities: Sequence[Tensor], target: int
) -> dict[str, tuple[int, ...]]:
    """Returns the kept units by group, with `0.99 * target < macs <= target`.

    Args:
        allowance: Prices counts.
        priorities: Per group, shape (group.size,); the lowest leaves first.
        target: Budget in MACs, reachable.

    Raises:
        InfeasibleBudget: If unit counts jump over the window.
    """
    if not allowance.groups:
        return {}
    orders = [values.argsort(stable=True) for values in priorities]
    ladders = [values[order] for values, order in zip(priorities, orders, strict=True)]
    counts = _fill(allowance, ladders, _prefix(allowance, ladders, target), target)
    if allowance.macs(counts[None]).item() <= _SLACK * target:
        counts = _nudge(allowance, counts, target)
    kept = {}
    for group, order, count in zip(allowance.groups, orders, counts.tolist(), strict=True):
        if count < group.size:
            kept[group.name] = tuple(order[group.size - int(count) :].tolist())
    return kept


def threshold(allowance: Allowance, priorities: Sequence[Tensor], target: int) -> float:
    """Returns the highest priority among the units that leave for a target; -inf if none does.

    Args:
        allowance: Prices counts.
        priorities: Per group, shape (group.size,); the lowest leaves first.
        target: Budget in MACs.
    """
    if not allowance.groups:
        return -torch.inf
    ladders = [values.sort().values for values in priorities]
    counts = _prefix(allowance, ladders, target)
    gone = [int(len(ladder) - count) for ladder, count in zip(ladders, counts, strict=True)]
    return max(
        (
            float(ladder[number - 1])
            for ladder, number in zip(ladders, gone, strict=True)
            if number
        ),
        default=-torch.inf,
    )


def _prefix(allowance: Allowance, ladders: Sequence[Tensor], target: int) -> Tensor:
    """Returns the counts after the shortest prefix of leaving units that meets the target."""
    going = (allowance.sizes - allowance.least).int().tolist()
    leaving = torch.cat([ladder[:most] for ladder, most in zip(ladders, going, strict=True)])
    owner = torch.cat([torch.full((most,), index) for index, most in enumerate(going)])
    owner = owner[leaving.argsort(stable=True)]

    def counts(length: int) -> Tensor:
        return allowance.sizes - owner[:length].bincount(minlength=len(ladders))

    low, high = 0, len(owner)
    while low < high:
        middle = (low + high) // 2
        if allowance.macs(counts(middle)[None]).item() <= target:
            high = middle
        else:
            low = middle + 1
    return counts(low)


def _fill(allowance: Allowance, ladders: Sequence[Tensor], counts: Tensor, target: int) -> Tensor:
    """Returns the counts after taking back, best first, the units that still fit."""
    steps = torch.eye(len(counts), dtype=torch.float64)
    while True:
        fits = (allowance.macs(counts + steps) <= target) & (counts < allowance.sizes)
        if not bool(fits.any()):
            return counts
        best = max(
            fits.nonzero().squeeze(1).tolist(),
            key=lambda index: ladders[index][len(ladders[index]) - int(counts[index]) - 1].item(),
        )
        counts = counts + steps[best]


def _nudge(allowance: Allowance, counts: Tensor, target: int) -> Tensor:
    """Returns counts inside the window, by exchanging few units of two groups at a time."""
    size = len(counts)
    chosen = torch.linspace(0, size - 1, min(size, _EXCHANGED)).long().unique()
    eye = torch.eye(size, dtype=torch.float64)[chosen]
    amounts = torch.tensor([-4.0, -3, -2, -1, 1, 2, 3, 4], dtype=torch.float64)
    single = (amounts[:, None, None] * eye).reshape(-1, size)
    pairs = (single[:, None] + single[None]).reshape(-1, size).unique(dim=0)
    seen = {tuple(counts.tolist())}
    for _ in range(_ROUNDS):
        near = counts + pairs
        near = near[((near >= allowance.least) & (near <= allowance.sizes)).all(1)]
        macs = allowance.macs(near)
        order = torch.where(macs <= target, macs, -macs).argsort(descending=True)
        for index in order[: len(seen) + 1].tolist():
            if tuple(near[index].tolist()) not in seen:
                counts = near[index]
                break
        else:
            break
        if _SLACK * target < allowance.macs(counts[None]).item() <= target:
            return counts
        seen.add(tuple(counts.tolist()))
    raise InfeasibleBudget(
        f"no plan found between {_SLACK:.0%} and 100 % of the budget of {target:,} MACs "
        f"({target / allowance.dense:.2%} of the dense network); the smallest reachable is "
        f"{allowance.smallest:,} MACs ({allowance.smallest / allowance.dense:.2%}), and single "
        f"units of this network are coarser than the window: try another budget."
    )

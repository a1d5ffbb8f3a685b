"""select: saliencies and a budget in, a plan on budget out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor

from paretoprune.criteria.bounds import UNBOUNDED, Bounds
from paretoprune.criteria.budget import Allowance, fit, threshold
from paretoprune.surgery import InfeasibleBudget, PrunableGroup, PruningGraph, PruningPlan

Allocation = Literal["global", "uniform"]


def select(
    graph: PruningGraph,
    saliency: Mapping[str, Tensor],
    *,
    budget: float | int | None = None,
    ratios: Mapping[str, float] | None = None,
    removed: tuple[str, ...] = (),
    allocation: Allocation = "global",
    blocks: Mapping[str, float] | None = None,
    bounds: Bounds = UNBOUNDED,
    within: float = 0.01,
) -> PruningPlan:
    """Returns the plan that keeps the units of highest saliency.

    With a `budget`, units leave in ascending priority until the MACs fit; the last percent is
    filled with the best units that still fit. The priority of a unit is the quantile of its
    saliency among all units (`global`) or within its group (`uniform`).
    With `ratios`, each group loses its own share. Equal saliencies leave in unit order, and counts
    are exact. `bounds` hold either way, for groups without a ratio, too.

    With `blocks`, neurons and layers are chosen together: the priority of a block is the quantile
    that its saliency has among those of all units, and it leaves whole once units of higher
    priority would have to leave instead. Where no units fill the budget beside the blocks that
    leave, those of the highest saliency stay after all.

    Args:
        graph: From `surgery.trace`.
        saliency: By group name, shape (group.size,); higher = keep.
        budget: A float in (0, 1] is the fraction of the dense network's MACs to keep, an int
            the MACs themselves.
        ratios: Pruning ratio by group name, in [0, 1); a group not named is kept whole.
        removed: Blocks that are removed whole; their inner groups are not ranked.
        allocation: `global` or `uniform`.
        blocks: Saliencies of removable blocks that may leave too, from `block_saliency`.
        bounds: Which counts groups may keep, and which blocks may go.
        within: How far under the budget the plan may lie, as a share of it, where single units
            or the removed blocks are coarser than one percent.

    Returns:
        A plan with `0.99 * target < macs <= target`, or `within` under it, or with the given
        ratios rounded to counts that `bounds` allow, as a rule the next larger one. Under a
        budget, multiples may be too coarse for that last percent: then the plan lies as little
        below it as was found.

    Raises:
        InfeasibleBudget: If no such plan exists; names the reachable limit.
        ValueError: If not exactly one of `budget` and `ratios` is given, one is out of range or
            `within` is, `blocks` come without a budget, or `removed` has a block that `bounds`
            exclude.
    """
    if (budget is None) == (ratios is None):
        raise ValueError("give either `budget` or `ratios`, and not both.")
    if not 0 < within <= 1:
        raise ValueError(f"`within` is a share of the budget in (0, 1], but got {within}.")
    bounds.check(graph)
    groups = rankable(graph, removed)
    for block in removed:
        if block not in bounds.blocks(graph):
            raise ValueError(f"block {block!r} is to be removed, but `exclude` keeps it.")
    if blocks and budget is None:
        raise ValueError("`blocks` are chosen for a `budget`, but got `ratios`.")
    if ratios is not None:
        return PruningPlan(_by_ratio(graph, groups, saliency, ratios, bounds), removed)
    assert budget is not None
    target = target_macs(graph, budget)
    leaving: list[str] = []
    for block in _leaving_first(graph, blocks or {}, removed, bounds):
        gone = (*removed, *leaving)
        groups = rankable(graph, gone)
        if largest_macs(graph, (*gone, block), bounds) <= 0.99 * target:
            break
        priority = _block_priority(groups, saliency, (blocks or {})[block])
        units = _priorities(groups, saliency, allocation)
        if threshold(_allowance(graph, gone, bounds), units, target) <= priority:
            break
        leaving.append(block)

    def planned(gone: tuple[str, ...]) -> PruningPlan:
        allowance = _allowance(graph, gone, bounds)
        _check_reachable(allowance, target, gone, within)
        priorities = _priorities(allowance.groups, saliency, allocation)
        return PruningPlan(fit(allowance, priorities, target, within), gone)

    return _with_most_blocks(planned, removed, leaving)


def _with_most_blocks(
    planned: Callable[[tuple[str, ...]], PruningPlan], removed: tuple[str, ...], leaving: list[str]
) -> PruningPlan:
    """Returns the plan without as many of the `leaving` blocks, first to last, as there is one.

    Units may be coarser beside removed blocks than in the whole network.

    Raises:
        InfeasibleBudget: If there is none; of the plan without all of them, as it reaches lowest.
    """
    try:
        return planned((*removed, *leaving))
    except InfeasibleBudget:
        for count in reversed(range(len(leaving))):
            with suppress(InfeasibleBudget):
                return planned((*removed, *leaving[:count]))
        raise


def rankable(graph: PruningGraph, removed: tuple[str, ...]) -> tuple[PrunableGroup, ...]:
    """Returns the open groups that are not inside a removed block.

    Raises:
        ValueError: If a name is no removable block.
    """
    graph.removed_vector(removed)
    gone = {name for block in removed for name in graph.blocks[block].groups}
    return tuple(group for group in graph.open_groups if group.name not in gone)


def target_macs(graph: PruningGraph, budget: float | int) -> int:
    """Returns a budget in MACs.

    Args:
        graph: From `surgery.trace`.
        budget: A float in (0, 1] is a fraction of the dense MACs, an int is MACs.

    Raises:
        ValueError: If it is out of range.
    """
    dense = graph.cost().macs
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"a budget is a fraction (float) or MACs (int), but got {budget!r}.")
    if isinstance(budget, int):
        if not 0 < budget <= dense:
            raise ValueError(
                f"a budget in MACs lies in [1, {dense}] (the dense network), but got {budget}."
            )
        return budget
    if not 0 < budget <= 1:
        raise ValueError(f"a budget as a fraction lies in (0, 1], but got {budget}.")
    return math.floor(budget * dense)


def smallest_macs(
    graph: PruningGraph, removed: tuple[str, ...] = (), bounds: Bounds = UNBOUNDED
) -> int:
    """Returns the MACs with the fewest units in every group and the given blocks removed."""
    return _allowance(graph, tuple(removed), bounds).smallest


def largest_macs(
    graph: PruningGraph, removed: tuple[str, ...] = (), bounds: Bounds = UNBOUNDED
) -> int:
    """Returns the MACs with the most units in every group and the given blocks removed."""
    return _allowance(graph, tuple(removed), bounds).largest


@functools.lru_cache(maxsize=32)  # asked for again with every plan of a search
def _allowance(graph: PruningGraph, removed: tuple[str, ...], bounds: Bounds) -> Allowance:
    return Allowance(graph, rankable(graph, removed), removed, bounds)


def _leaving_first(
    graph: PruningGraph, blocks: Mapping[str, float], removed: tuple[str, ...], bounds: Bounds
) -> list[str]:
    """Returns the blocks that may leave, that of the lowest saliency first."""
    graph.removed_vector(tuple(blocks))  # raises for a name that is no removable block
    others = [block for block in bounds.blocks(graph) if block in blocks and block not in removed]
    return sorted(others, key=lambda block: blocks[block])


def _block_priority(
    groups: tuple[PrunableGroup, ...], saliency: Mapping[str, Tensor], score: float
) -> float:
    """Returns the quantile of a block's saliency among the units that could leave instead."""
    units = torch.cat([_scores(saliency, group) for group in groups] or [torch.zeros(0)])
    return float((units < score).double().mean()) if len(units) else 0.0


def _check_reachable(
    allowance: Allowance, target: int, removed: tuple[str, ...], within: float
) -> None:
    dense = allowance.dense
    if allowance.smallest > target:
        raise InfeasibleBudget(
            f"the budget of {target:,} MACs ({target / dense:.2%} of the dense network) cannot be "
            f"reached: the smallest reachable is {allowance.smallest:,} MACs "
            f"({allowance.smallest / dense:.2%})."
        )
    if allowance.largest <= 0.99 * target:
        reached = f"{allowance.largest:,} MACs ({allowance.largest / dense:.2%}"
        if removed and (allowance.coarse or allowance.largest > (1 - within) * target):
            return  # blocks are coarser than units: the plan lies further below
        if removed:
            raise InfeasibleBudget(
                f"removing the blocks alone leaves {reached} of the dense network), more than 1 % "
                f"under the budget of {target:,}; remove fewer blocks."
            )
        raise InfeasibleBudget(
            f"the budget of {target:,} MACs ({target / dense:.2%} of the dense network) cannot be "
            f"used: the largest reachable within the bounds is {reached})."
        )


def _by_ratio(
    graph: PruningGraph,
    groups: tuple[PrunableGroup, ...],
    saliency: Mapping[str, Tensor],
    ratios: Mapping[str, float],
    bounds: Bounds,
) -> dict[str, tuple[int, ...]]:
    names = [group.name for group in groups]
    for name, ratio in ratios.items():
        if name not in names:
            raise ValueError(f"{name!r} is no prunable group here; prunable: {', '.join(names)}.")
        if not 0 <= ratio < 1:
            raise ValueError(
                f"a pruning ratio must lie in [0, 1), but got {ratio} for group {name!r}."
            )
    kept = {}
    for group in groups:
        wanted = group.size - math.floor(ratios.get(group.name, 0.0) * group.size + 0.5)
        allowed = [int(count) for count in bounds.counts(graph, group)]
        count = next((count for count in allowed if count >= wanted), allowed[-1])
        if count < group.size:
            order = _scores(saliency, group).argsort(stable=True)
            kept[group.name] = tuple(order[group.size - count :].tolist())
    return kept


def _scores(saliency: Mapping[str, Tensor], group: PrunableGroup) -> Tensor:
    values = saliency.get(group.name)
    if values is None or tuple(values.shape) != (group.size,) or not bool(values.isfinite().all()):
        got = "none" if values is None else f"shape {tuple(values.shape)}"
        raise ValueError(
            f"group {group.name!r} needs {group.size} finite saliencies, but got {got}."
        )
    return values.double().cpu()


def _priorities(
    groups: tuple[PrunableGroup, ...],
    saliency: Mapping[str, Tensor],
    allocation: Allocation,
) -> list[Tensor]:
    """Returns, per group, the priority of each unit, shape (group.size,); lowest leaves first."""
    scores = [_scores(saliency, group) for group in groups]
    if allocation == "global":
        sizes = [group.size for group in groups]
        return list(_quantiles(torch.cat(scores)).split(sizes)) if groups else []
    if allocation == "uniform":
        return [_quantiles(values) for values in scores]
    raise ValueError(f"allocation is 'global' or 'uniform', but got {allocation!r}.")


def _quantiles(values: Tensor) -> Tensor:
    order = values.argsort(stable=True)
    ranks = torch.empty(len(values), dtype=torch.float64)
    ranks[order] = torch.arange(len(values), dtype=torch.float64)
    return (ranks + 0.5) / len(values)

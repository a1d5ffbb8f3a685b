"""Trial plans: what the self-check prunes, so that nothing comes out right by luck."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.plan import PruningPlan

_TINY = 16
"""Groups of fewer units do not set the size that the self-check makes all groups equal to."""


def trial_plans(graph: PruningGraph) -> list[PruningPlan]:
    """Returns the plans that the self-check tries, each over as many open groups as it can.

    What is right by luck in one of them is wrong in another: code that takes one group's size for
    another's fails where all sizes differ, code that compares sizes fails where they become
    equal, and code that needs several groups to lose units together fails where some stay whole.
    """
    plans = [whole_plan(graph), _level_plan(graph), _random_plan(graph)]
    return [plan for plan in dict.fromkeys(plans) if plan.kept]


def whole_plan(graph: PruningGraph) -> PruningPlan:
    """Returns the plan that the self-check begins with: half of every open group."""
    return half_plan(graph, [group.name for group in graph.open_groups])


def half_plan(graph: PruningGraph, names: Sequence[str]) -> PruningPlan:
    """Returns a plan that keeps about half of the units of the named groups.

    Neighbouring groups keep different shares, groups of one size different numbers of units while
    there are any, and none exactly a half, so that code which derives one size from another
    cannot come out right by luck.
    """
    used: Counter[tuple[int, int]] = Counter()
    kept = {}
    for index, group in enumerate(graph.groups.values()):
        size = group.size
        if size < 2:
            continue
        count = min(_counts(size, index), key=lambda count: used[size, count])
        used[size, count] += 1
        if group.name in names:
            kept[group.name] = _spread(size, count)
    return PruningPlan(kept)


def other_half(graph: PruningGraph, name: str) -> PruningPlan:
    """Returns a plan that keeps the units that `half_plan` does not."""
    return PruningPlan({name: tuple(range(1, graph.groups[name].size, 2))})


def _counts(size: int, index: int) -> list[int]:
    """Returns how many of `size` units to keep, the best choice of group `index` first."""
    counts = []
    for share in (1 / 2, 1 / 3, 2 / 3):
        count = round(size * share)
        if size > 4:  # an odd number, below the share, is no multiple of a head's width
            count -= 1 + count % 2
        counts.append(min(max(count, 1), size - 1))
    first = index % len(counts)
    few = range(size // 4 | 1, size - size // 4 + 1, 2) if size > 4 else range(1, size)
    return list(dict.fromkeys([*counts[first:], *counts[:first], *few]))


def _spread(size: int, count: int) -> tuple[int, ...]:
    return tuple(unit * size // count for unit in range(count))


def _level_plan(graph: PruningGraph) -> PruningPlan:
    """Returns a plan after which all open groups that are large enough have the same size.

    A few tiny groups (the squeezes of excitations) do not make all others as thin.
    """
    sizes = [group.size for group in graph.open_groups]
    least = min((size for size in sizes if size >= _TINY), default=min(sizes, default=2))
    count = max(2, least * 3 // 4)  # averages over one channel say nothing
    return PruningPlan(
        {
            group.name: _spread(group.size, count)
            for group in graph.open_groups
            if group.size > count
        }
    )


def _random_plan(graph: PruningGraph) -> PruningPlan:
    """Returns a plan that leaves half of the open groups whole, the same one every time."""
    generator = torch.Generator().manual_seed(0)
    groups = [group for group in graph.open_groups if group.size > 1]
    order = torch.randperm(len(groups), generator=generator).tolist()
    kept = {}
    for group in (groups[index] for index in order[len(groups) // 2 :]):
        least = min(max(2, group.size // 4), group.size - 1)
        count = int(torch.randint(least, group.size, (1,), generator=generator))
        units = torch.randperm(group.size, generator=generator)[:count]
        kept[group.name] = tuple(units.tolist())
    return PruningPlan(kept)

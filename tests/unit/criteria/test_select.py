"""select meets every budget that can be met, keeps the best units, and counts exactly."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import Bounds, select, smallest_macs, target_macs
from paretoprune.criteria.budget import Allowance
from paretoprune.criteria.select import largest_macs, rankable
from paretoprune.experiments.models import digits_resnet
from paretoprune.surgery import InfeasibleBudget, PruningGraph, PruningPlan, trace
from tests.unit.surgery.specimens import traced

many = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10_000)
allocations = st.sampled_from(["global", "uniform"])


@functools.cache
def digits() -> PruningGraph:
    torch.manual_seed(0)
    return trace(digits_resnet(), torch.randn(1, 1, 8, 8))


def random_saliency(
    graph: PruningGraph, seed: int, levels: int | None = None
) -> dict[str, Tensor]:
    """Returns uniform random saliencies, or of few levels so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {g.name: torch.rand(g.size, generator=generator) for g in graph.open_groups}
    if levels:
        drawn = {name: (values * levels).floor() for name, values in drawn.items()}
    return drawn


def kept(graph: PruningGraph, plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    return {g.name: plan.kept.get(g.name, tuple(range(g.size))) for g in graph.open_groups}


# -- budgets ---------------------------------------------------------------------------------


@given(seeds, st.floats(0.12, 1), allocations, st.sampled_from([None, 1, 3]), st.data())
@many
def test_macs_lie_in_the_last_percent_under_the_budget(
    seed: int, budget: float, allocation: Any, levels: int | None, data: st.DataObject
) -> None:
    graph = digits()
    saliency = {
        name: values * data.draw(st.floats(0.1, 10))
        for name, values in random_saliency(graph, seed, levels).items()
    }
    plan = select(graph, saliency, budget=budget, allocation=allocation)
    target = target_macs(graph, budget)
    assert 0.99 * target < graph.cost(plan).macs <= target
    assert plan == select(graph, saliency, budget=budget, allocation=allocation)


@given(seeds, st.floats(0.12, 1), allocations, st.sampled_from([None, 1, 3]))
@many
def test_the_units_of_highest_saliency_stay_and_of_equal_ones_the_last(
    seed: int, budget: float, allocation: Any, levels: int | None
) -> None:
    graph = digits()
    saliency = random_saliency(graph, seed, levels)
    plan = select(graph, saliency, budget=budget, allocation=allocation)
    for name, units in kept(graph, plan).items():
        order = saliency[name].argsort(stable=True)
        assert sorted(order[len(order) - len(units) :].tolist()) == list(units)


@pytest.mark.parametrize("name", ["chain", "residual", "dense", "grouped", "three_dimensional"])
@given(seeds, st.floats(0.01, 1), allocations)
@settings(many, max_examples=15)
def test_a_plan_is_found_exactly_when_one_exists(
    name: str, seed: int, budget: float, allocation: Any
) -> None:
    graph = traced(name)[1]
    allowance = Allowance(graph, graph.open_groups, ())
    ranges = [torch.arange(1.0, group.size + 1).double() for group in graph.open_groups]
    every = torch.cartesian_prod(*ranges).reshape(-1, len(ranges))
    macs, target = allowance.macs(every), target_macs(graph, budget)
    exists = bool(((macs <= target) & (macs > 0.99 * target)).any())
    saliency = random_saliency(graph, seed)
    if not exists:
        with pytest.raises(InfeasibleBudget, match=f"{allowance.smallest:,} MACs"):
            select(graph, saliency, budget=budget, allocation=allocation)
        return
    plan = select(graph, saliency, budget=budget, allocation=allocation)
    assert 0.99 * target < graph.cost(plan).macs <= target


@given(seeds, st.floats(0.12, 0.4), st.sets(st.integers(0, 3), min_size=1, max_size=2))
@many
def test_removed_blocks_are_paid_for_and_their_groups_left_alone(
    seed: int, budget: float, chosen: set[int]
) -> None:
    graph = digits()
    removed = tuple(list(graph.blocks)[index] for index in chosen)
    plan = select(graph, random_saliency(graph, seed), budget=budget, removed=removed)
    target = target_macs(graph, budget)
    assert plan.removed == tuple(sorted(removed))
    assert 0.99 * target < graph.cost(plan).macs <= target
    inner = {name for block in removed for name in graph.blocks[block].groups}
    assert inner
    assert not inner & plan.kept.keys()


def test_the_whole_budget_keeps_everything() -> None:
    graph = digits()
    for budget in (1.0, graph.cost().macs):
        assert select(graph, random_saliency(graph, 0), budget=budget) == PruningPlan()


def test_a_fraction_and_its_macs_are_the_same_budget() -> None:
    graph = digits()
    saliency, macs = random_saliency(graph, 0), graph.cost().macs // 2
    assert select(graph, saliency, budget=0.5) == select(graph, saliency, budget=macs)


def test_uniform_takes_like_shares_and_global_ranks_all_units() -> None:
    graph = digits()
    saliency = random_saliency(graph, 0)
    poor = graph.open_groups[-1].name
    saliency[poor] = saliency[poor] / 100
    shares = {}
    for allocation in ("uniform", "global"):
        plan = select(graph, saliency, budget=0.5, allocation=allocation)
        units = kept(graph, plan)
        shares[allocation] = {g.name: len(units[g.name]) / g.size for g in graph.open_groups}
    uniform = shares["uniform"].values()
    assert max(uniform) - min(uniform) < 0.2
    assert shares["global"][poor] < 0.1 < 0.5 < shares["uniform"][poor]


# -- ratios ----------------------------------------------------------------------------------


@given(seeds, st.floats(0, 1, exclude_max=True), st.sampled_from([None, 1, 3]))
@many
def test_ratios_give_exact_counts_whatever_ties_there_are(
    seed: int, ratio: float, levels: int | None
) -> None:
    graph = digits()
    names = [group.name for group in graph.open_groups][::2]
    saliency = random_saliency(graph, seed, levels)
    plan = select(graph, saliency, ratios=dict.fromkeys(names, ratio))
    for name, units in kept(graph, plan).items():
        size = graph.groups[name].size
        gone = min(int(ratio * size + 0.5), size - 1) if name in names else 0
        assert len(units) == size - gone
        assert sorted(saliency[name].argsort(stable=True)[gone:].tolist()) == list(units)


def test_ratios_with_removed_blocks() -> None:
    graph = digits()
    block, inside = next((b.name, b.groups[0]) for b in graph.blocks.values())
    outside = next(g.name for g in graph.open_groups if g.name != inside)
    saliency = random_saliency(graph, 0)
    plan = select(graph, saliency, ratios={outside: 0.5}, removed=(block,))
    assert plan.removed == (block,)
    assert set(plan.kept) == {outside}
    with pytest.raises(ValueError, match=f"'{inside}' is no prunable group here; prunable: "):
        select(graph, saliency, ratios={inside: 0.5}, removed=(block,))


# -- errors ----------------------------------------------------------------------------------


def test_a_budget_below_the_smallest_names_the_smallest() -> None:
    graph = digits()
    smallest = smallest_macs(graph)
    sentence = f"cannot be reached: the smallest reachable is {smallest:,} MACs"
    for budget in (smallest - 1, 1, 1e-12):
        with pytest.raises(InfeasibleBudget, match=re.escape(sentence)):
            select(graph, random_saliency(graph, 0), budget=budget)
    plan = select(graph, random_saliency(graph, 0), budget=smallest)
    assert graph.cost(plan).macs == smallest


def test_removing_more_than_the_budget_says_so() -> None:
    graph = digits()
    with pytest.raises(
        InfeasibleBudget, match=r"removing the blocks alone leaves .* fewer blocks"
    ):
        select(graph, random_saliency(graph, 0), budget=1.0, removed=tuple(graph.blocks))


def test_the_smallest_with_removed_blocks_is_smaller() -> None:
    graph = digits()
    removed = tuple(graph.blocks)
    plan = PruningPlan({g.name: (0,) for g in graph.open_groups}, removed)
    assert smallest_macs(graph, removed) == graph.cost(plan).macs < smallest_macs(graph)


def test_a_window_that_units_jump_over_is_infeasible() -> None:
    graph = traced("grouped")[1]  # four units, so budgets are coarse
    with pytest.raises(InfeasibleBudget, match="coarser than the window: try another budget"):
        select(graph, random_saliency(graph, 0), budget=0.9)
    plan = select(graph, random_saliency(graph, 0), budget=0.9, within=1.0)
    assert 0.5 < graph.cost(plan).macs / graph.cost().macs <= 0.89  # as near as four units come
    with pytest.raises(InfeasibleBudget, match="coarser than the window"):
        select(graph, random_saliency(graph, 0), budget=0.9, within=0.02)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give either `budget` or `ratios`, and not both"),
        ({"budget": 0.5, "ratios": {}}, "give either `budget` or `ratios`, and not both"),
        ({"budget": 0.0}, r"a budget as a fraction lies in (0, 1], but got 0.0"),
        ({"budget": 1.5}, r"a budget as a fraction lies in (0, 1], but got 1.5"),
        ({"budget": float("nan")}, r"a budget as a fraction lies in (0, 1], but got nan"),
        ({"budget": 0}, "a budget in MACs lies in [1, "),
        ({"budget": -5}, "a budget in MACs lies in [1, "),
        ({"budget": 10**12}, "(the dense network), but got 1000000000000"),
        ({"budget": True}, "a budget is a fraction (float) or MACs (int), but got True"),
        ({"budget": "50%"}, "a budget is a fraction (float) or MACs (int), but got '50%'"),
        ({"budget": 0.5, "within": 1.5}, "a share of the budget in (0, 1], but got 1.5"),
        ({"budget": 0.5, "allocation": "even"}, "allocation is 'global' or 'uniform', but got"),
        ({"budget": 0.5, "removed": ("x",)}, "'x' is no removable block; removable: layer1.0"),
        ({"ratios": {}, "removed": ("x",)}, "'x' is no removable block; removable: layer1.0"),
        ({"ratios": {"x": 0.5}}, "'x' is no prunable group here; prunable: conv1"),
        ({"ratios": {"linear": 0.5}}, "'linear' is no prunable group here"),
        ({"ratios": {"conv1": 1.0}}, "lie in [0, 1), but got 1.0 for group 'conv1'"),
        ({"ratios": {"conv1": -0.1}}, "lie in [0, 1), but got -0.1 for group 'conv1'"),
        ({"ratios": {"conv1": float("nan")}}, "lie in [0, 1), but got nan for group 'conv1'"),
    ],
)
def test_misuse_is_one_clear_sentence(arguments: dict[str, Any], sentence: str) -> None:
    graph = digits()
    with pytest.raises(ValueError, match=re.escape(sentence)):
        select(graph, random_saliency(graph, 0), **arguments)


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (None, "none"),
        (torch.rand(3), "shape (3,)"),
        (torch.full((8,), float("nan")), "shape (8,)"),
        (torch.full((8,), float("inf")), "shape (8,)"),
    ],
)
@pytest.mark.parametrize("how", [{"budget": 0.5}, {"ratios": {"conv1": 0.5}}])
def test_saliencies_are_one_finite_number_per_unit(
    values: Tensor | None, got: str, how: dict[str, Any]
) -> None:
    graph = digits()
    saliency = random_saliency(graph, 0)
    if values is None:
        del saliency["conv1"]
    else:
        saliency["conv1"] = values
    sentence = f"group 'conv1' needs 8 finite saliencies, but got {got}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        select(graph, saliency, **how)


def test_groups_inside_removed_blocks_need_no_saliency() -> None:
    graph = digits()
    block = graph.blocks["layer1.1"]
    saliency = random_saliency(graph, 0)
    for name in block.groups:
        del saliency[name]
    assert select(graph, saliency, budget=0.5, removed=("layer1.1",)).removed == ("layer1.1",)


def whole(graph: PruningGraph, score: float) -> dict[str, float]:
    return dict.fromkeys(graph.blocks, score)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_blocks_that_matter_less_than_all_units_leave_first(allocation: Any) -> None:
    graph = digits()
    saliency = random_saliency(graph, 0)
    plan = select(graph, saliency, budget=0.5, allocation=allocation, blocks=whole(graph, -1.0))
    assert plan.removed
    assert 0.495 * graph.cost().macs < graph.cost(plan).macs <= 0.5 * graph.cost().macs


def test_blocks_that_matter_more_than_all_units_stay() -> None:
    graph = digits()
    saliency = random_saliency(graph, 0)
    plan = select(graph, saliency, budget=0.5, blocks=whole(graph, 2.0))
    assert plan == select(graph, saliency, budget=0.5)


def test_a_block_leaves_where_the_same_ranking_would_take_units_above_it() -> None:
    graph = digits()
    saliency = random_saliency(graph, 0)
    name = next(iter(graph.blocks))
    low, high = 0.0, 1.0  # the saliency at which the block begins to stay
    for _ in range(20):
        middle = (low + high) / 2
        plan = select(graph, saliency, budget=0.5, blocks={name: middle})
        low, high = (middle, high) if plan.removed else (low, middle)
    assert 0 < low < 1
    without = select(graph, saliency, budget=0.5)
    gone = [
        float(saliency[group.name][unit])
        for group in graph.open_groups
        for unit in range(group.size)
        if unit not in without.kept.get(group.name, range(group.size))
    ]
    assert low == pytest.approx(max(gone), abs=0.02)


def test_blocks_that_would_undercut_the_budget_stay() -> None:
    graph = digits()
    plan = select(graph, random_saliency(graph, 0), budget=0.98, blocks=whole(graph, -1.0))
    assert 0.97 * graph.cost().macs < graph.cost(plan).macs <= 0.98 * graph.cost().macs


def test_unknown_blocks_and_ratios_with_blocks_are_refused() -> None:
    graph = digits()
    saliency = random_saliency(graph, 0)
    with pytest.raises(ValueError, match="'x' is no removable block"):
        select(graph, saliency, budget=0.5, blocks={"x": 0.0})
    with pytest.raises(ValueError, match="`blocks` are chosen for a `budget`, but got `ratios`"):
        select(graph, saliency, ratios={}, blocks=whole(graph, 0.0))


@pytest.mark.parametrize("how", [{"budget": 0.3}, {"budget": 0.3, "allocation": "uniform"}])
def test_a_minimum_of_units_stays_in_every_group(how: dict[str, Any]) -> None:
    graph = digits()
    saliency = random_saliency(graph, 0)
    worst = graph.open_groups[1].name
    saliency[worst] -= 10  # without a minimum nearly all of it would go
    plan = select(graph, saliency, bounds=Bounds(minimum=3), **how)
    assert all(len(kept) >= 3 for kept in plan.kept.values())
    if "allocation" not in how:
        assert len(plan.kept[worst]) == 3
        best = saliency[worst].argsort(descending=True)[:3].sort().values
        assert list(plan.kept[worst]) == best.tolist()


def test_a_minimum_holds_for_ratios_and_bounds_the_budget() -> None:
    graph = digits()
    saliency = random_saliency(graph, 0)
    name = graph.open_groups[0].name
    plan = select(graph, saliency, ratios={name: 0.99}, bounds=Bounds(minimum=3))
    assert len(plan.kept[name]) == 3
    with pytest.raises(InfeasibleBudget):
        select(graph, saliency, budget=0.02, bounds=Bounds(minimum=7))


class Narrow(nn.Module):
    """A residual block so narrow that its removal coarsens what units can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(F.relu(self.up(x)))


@functools.cache
def narrow() -> PruningGraph:
    model = nn.Sequential(nn.Linear(6, 4), *(Narrow() for _ in range(3)), nn.Linear(4, 4))
    return trace(model.eval(), torch.randn(2, 6))


def plan_exists(graph: PruningGraph, removed: tuple[str, ...], target: int) -> bool:
    """Whether any counts of units fill a budget beside removed blocks."""
    groups = rankable(graph, removed)
    counts = [torch.arange(1.0, group.size + 1).double() for group in groups]
    every = torch.cartesian_prod(*counts).reshape(-1, len(counts))
    macs = Allowance(graph, groups, removed).macs(every)
    return bool(((macs <= target) & (macs > 0.99 * target)).any())


@pytest.mark.parametrize("percent", range(8, 100))
def test_blocks_that_no_units_fill_the_budget_beside_stay(percent: int) -> None:
    graph, target = narrow(), target_macs(narrow(), percent / 100)
    saliency = {group.name: torch.arange(float(group.size)) for group in graph.open_groups}
    names, blocks = tuple(graph.blocks), {"1": -3.0, "2": -2.0, "3": -1.0}
    assert names == ("1", "2", "3")
    possible = [count for count in range(4) if plan_exists(graph, names[:count], target)]
    if not possible:
        with pytest.raises(InfeasibleBudget):
            select(graph, saliency, budget=target, blocks=blocks)
        return
    plan = select(graph, saliency, budget=target, blocks=blocks)
    assert 0.99 * target < graph.cost(plan).macs <= target
    assert plan.removed == names[: len(plan.removed)]  # the block of the lowest saliency first


@pytest.mark.parametrize(("budget", "left"), [(0.14, ("1", "2")), (0.15, ("1",)), (0.25, ())])
def test_the_block_taken_last_stays_first(budget: float, left: tuple[str, ...]) -> None:
    graph = narrow()
    saliency = {group.name: torch.arange(float(group.size)) for group in graph.open_groups}
    plan = select(graph, saliency, budget=budget, blocks={"1": -3.0, "2": -2.0, "3": -1.0})
    assert plan.removed == left


def test_blocks_that_are_asked_to_leave_never_stay() -> None:
    graph = narrow()
    saliency = {group.name: torch.arange(float(group.size)) for group in graph.open_groups}
    assert plan_exists(graph, (), target_macs(graph, 0.25))
    with pytest.raises(InfeasibleBudget):
        select(graph, saliency, budget=0.25, removed=("1",))
    with pytest.raises(InfeasibleBudget):
        select(graph, saliency, budget=0.25, removed=("1",), blocks={"2": -1.0})


def test_blocks_that_are_asked_to_leave_may_undercut_the_budget_where_that_is_allowed() -> None:
    graph, every = digits(), tuple(digits().blocks)
    saliency = random_saliency(graph, 0)
    under = 1 - largest_macs(graph, every) / target_macs(graph, 0.9)
    assert under > 0.01
    plan = select(graph, saliency, budget=0.9, removed=every, within=under + 1e-6)
    assert plan == PruningPlan(removed=every)
    with pytest.raises(InfeasibleBudget, match="remove fewer blocks"):
        select(graph, saliency, budget=0.9, removed=every, within=under - 1e-6)

"""The space: every decision becomes a plan on budget, and the seeds are in it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from paretoprune.criteria import CRITERIA, UNBOUNDED, Bounds, largest_macs, select, smallest_macs
from paretoprune.experiments.models import digits_resnet
from paretoprune.search import Candidate, Problem, SearchSpace
from paretoprune.search.space import LEVELS
from paretoprune.search.ties import GRANULARITIES, MOST_OFFSETS, ties_of
from paretoprune.surgery import InfeasibleBudget, PruningGraph, PruningPlan, trace

Saliencies = Mapping[str, Mapping[str, Tensor]]
Setting = tuple[PruningGraph, Saliencies]


class Suggests:
    """Decides by given parameters, or at random."""

    def __init__(self, parameters: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        self.parameters = parameters
        self.random = random.Random(seed)
        self.asked: list[str] = []

    def _value(self, name: str, otherwise: Any) -> Any:
        self.asked.append(name)
        return otherwise if self.parameters is None else self.parameters[name]

    def suggest_float(self, name: str, low: float, high: float) -> float:
        value = float(self._value(name, self.random.uniform(low, high)))
        assert low <= value <= high
        return value

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        value = int(self._value(name, self.random.randint(low, high)))
        assert low <= value <= high
        return value

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        value = self._value(name, self.random.choice(choices))
        assert value in choices
        return value


@pytest.fixture
def setting(problem: Problem) -> Setting:
    graph = trace(problem.model, problem.example_inputs)
    named = {name: CRITERIA[name]() for name in ("l2", "l1")}
    return graph, {n: c(problem.model, graph, problem.calibration) for n, c in named.items()}


def space_of(setting: Setting, share: float = 0.5, **more: Any) -> SearchSpace:
    graph, saliencies = setting
    target = int(share * graph.cost().macs)
    return SearchSpace.of(graph, saliencies, target, list(graph.blocks), **more)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
def test_every_decision_is_on_budget(setting: Setting, share: float) -> None:
    graph, saliencies = setting
    space = space_of(setting, share)
    budgets = set()
    for seed in range(40):
        candidate = space.suggest(Suggests(seed=seed))
        plan = space.decode(candidate, graph, saliencies)
        target = candidate.budget * graph.cost().macs
        assert 0.99 * target - 1 <= graph.cost(plan).macs <= min(target + 1e-6, space.target)
        budgets.add(candidate.budget)
    assert len(budgets) == len(LEVELS)


def test_seeds_are_the_one_shot_allocations(setting: Setting) -> None:
    graph, saliencies = setting
    space = space_of(setting)
    seeds = space.seeds(trials=300)
    candidates = [space.suggest(Suggests(parameters)) for parameters in seeds]
    for criterion in ("l2", "l1"):
        for allocation in ("global", "uniform"):
            for level in LEVELS:
                target = int(level * space.target)
                wanted = select(
                    graph,
                    saliencies[criterion],
                    budget=target,
                    allocation="global" if allocation == "global" else "uniform",
                )
                assert wanted in [space.decode(c, graph, saliencies) for c in candidates]
    assert any(candidate.removed for candidate in candidates)
    asked = Suggests()
    space.suggest(asked)
    assert all(seed.keys() == set(asked.asked) for seed in seeds)


def test_some_seeds_spare_the_residual_stream(setting: Setting) -> None:
    graph, saliencies = setting
    space = space_of(setting)
    inside = {name for block in graph.blocks.values() for name in block.groups}
    assert set(space.streams) == {g.name for g in graph.open_groups} - inside
    first, second = (space.suggest(Suggests(p)) for p in space.seeds(300)[:3:2])
    plans = [space.decode(candidate, graph, saliencies) for candidate in (first, second)]
    for name in space.streams:
        size = graph.groups[name].size
        before, after = (len(plan.kept.get(name, range(size))) for plan in plans)
        assert after > before or after == size
    plain = replace(space, blocks=(), streams=(), most_removed=0)
    assert not any(map(any, (plain.suggest(Suggests(p)).offsets.values() for p in plain.seeds(9))))


@pytest.mark.parametrize(("trials", "expected"), [(1, 1), (2, 2), (3, 2), (30, 10)])
def test_seeds_are_about_a_third_and_every_criterion(
    setting: Setting, trials: int, expected: int
) -> None:
    seeds = space_of(setting).seeds(trials)
    assert len(seeds) == expected
    assert [s["criterion"] for s in seeds[:2]] == ["l2", "l1"][:expected]
    assert {s["budget"] for s in seeds[:2]} == {1.0}


def test_every_second_trial_is_at_the_target(setting: Setting) -> None:
    space = space_of(setting)
    budgets = [space.fixed(number)["budget"] for number in range(8)]
    assert budgets == [1.0, 0.85, 1.0, 0.7, 1.0, 0.55, 1.0, 0.85]
    alone = replace(space, levels=(1.0,))
    assert [alone.fixed(number)["budget"] for number in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.4, 0.25])
def test_blocks_stay_where_their_removal_undercuts_the_budget(
    setting: Setting, budget: float
) -> None:
    graph, saliencies = setting
    space = space_of(setting, 1.0)
    candidate = Candidate("l2", budget, removed=tuple(graph.blocks))
    plan = space.decode(candidate, graph, saliencies)
    target = round(budget * graph.cost().macs)
    assert 0.99 * target < graph.cost(plan).macs <= target
    assert graph.cost(PruningPlan(removed=plan.removed)).macs > 0.99 * target
    assert plan.removed == tuple(graph.blocks)[: len(plan.removed)]  # the last ones stay


class Fixed(nn.Module):
    """Blocks whose units cannot be pruned: only removing them saves anything."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.add(inputs, self.branch(inputs))


def test_blocks_go_where_the_budget_needs_it() -> None:
    units = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 400, 1), nn.Conv2d(400, 1, 1))
    model = nn.Sequential(Fixed(), Fixed(), Fixed(), *units)
    graph = trace(model, torch.randn(1, 1, 8, 8))
    saliencies = {"l2": CRITERIA["l2"]()(model, graph, [])}
    blocks = ("1", "2", "0")
    fewest = PruningPlan({group.name: (0,) for group in graph.open_groups})
    target = graph.cost(fewest).macs - 1  # not without a block
    space = SearchSpace.of(graph, saliencies, target, blocks)
    plan = space.decode(Candidate("l2", target / graph.cost().macs), graph, saliencies)
    assert plan.removed == ("1",)
    assert 0.99 * target < graph.cost(plan).macs <= target


def test_a_network_that_has_only_blocks_to_lose_can_be_searched() -> None:
    model = nn.Sequential(Fixed(), Fixed(), Fixed())
    graph = trace(model, torch.randn(1, 1, 8, 8))
    assert not graph.open_groups
    blocks = tuple(graph.blocks)
    target = graph.cost(PruningPlan(removed=blocks[:1])).macs
    space = SearchSpace.of(graph, {"l2": {}}, target, blocks)
    plan = space.decode(Candidate("l2", target / graph.cost().macs), graph, {"l2": {}})
    assert plan.removed == blocks[:1]


def test_an_unreachable_target_names_the_minimum(setting: Setting) -> None:
    graph, saliencies = setting
    with pytest.raises(InfeasibleBudget, match=r"smallest reachable is [\d,]+ MACs"):
        SearchSpace.of(graph, saliencies, 10, list(graph.blocks))


def test_levels_below_the_reachable_minimum_are_left_out(setting: Setting) -> None:
    graph, saliencies = setting
    smallest = graph.cost(
        PruningPlan({group.name: (0,) for group in graph.open_groups}, tuple(graph.blocks))
    ).macs
    space = SearchSpace.of(graph, saliencies, round(smallest / 0.8), tuple(graph.blocks))
    assert space.levels == (1.0, 0.85)


def test_many_groups_share_the_offsets_of_their_module() -> None:
    model = nn.Sequential(
        *(nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3))) for _ in range(24))
    )
    graph = trace(model, torch.randn(1, 4, 4, 4))
    saliencies = {"l2": CRITERIA["l2"]()(model, graph, [])}
    space = SearchSpace.of(graph, saliencies, graph.cost().macs // 2, ())
    assert len(space.ties) > MOST_OFFSETS
    assert set(space.ties.values()) == {str(stage) for stage in range(24)}
    candidate = space.suggest(Suggests())
    assert candidate.offsets["3.0"] == candidate.offsets["3.2"]
    assert len(set(candidate.offsets.values())) == 24


LIMITED = (
    Bounds(multiple=4),
    Bounds(min_ratio=0.2, max_ratio=0.6),
    Bounds(exclude=("0", "4")),
    Bounds(3, 2, 0.1, 0.7, ("10",)),
)


@pytest.mark.parametrize("bounds", LIMITED)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_decision_keeps_to_the_bounds(
    setting: Setting, bounds: Bounds, granularity: Any
) -> None:
    graph, saliencies = setting
    blocks = {name: {block: 0.1 for block in graph.blocks} for name in saliencies}
    share = (smallest_macs(graph, (), bounds) / largest_macs(graph, (), bounds) + 1) / 2
    target = int(share * largest_macs(graph, (), bounds))
    space = SearchSpace.of(
        graph,
        saliencies,
        target,
        list(graph.blocks),
        blocks,
        granularity=granularity,
        bounds=bounds,
    )
    assert set(space.blocks) <= set(bounds.blocks(graph))
    drawn = [space.suggest(Suggests(seed=seed)) for seed in range(12)]
    for candidate in [space.suggest(Suggests(p)) for p in space.seeds(60)] + drawn:
        plan = space.decode(candidate, graph, saliencies)
        assert graph.cost(plan).macs <= candidate.budget * graph.cost().macs + 1e-6
        assert set(plan.removed) <= set(bounds.blocks(graph))
        inside = {name for block in plan.removed for name in graph.blocks[block].groups}
        for group in graph.open_groups:
            if group.name not in inside:
                kept = len(plan.kept.get(group.name, range(group.size)))
                assert kept in bounds.counts(graph, group).tolist()


def test_multiples_and_blocks_that_leave_few_sizes_still_give_plans() -> None:
    torch.manual_seed(0)
    graph = trace(digits_resnet(), torch.randn(1, 1, 8, 8))
    saliencies = {"l2": {g.name: torch.rand(g.size) for g in graph.open_groups}}
    bounds, target = Bounds(multiple=16, exclude=("layer3.?",)), graph.cost().macs // 2
    space = SearchSpace.of(graph, saliencies, target, tuple(graph.blocks), bounds=bounds)
    for parameters in space.seeds(60):
        candidate = space.suggest(Suggests(parameters))
        plan = space.decode(candidate, graph, saliencies)
        assert graph.cost(plan).macs <= candidate.budget * graph.cost().macs
        assert plan.removed


def test_blocks_that_jump_over_the_budget_still_give_plans() -> None:
    """Where units may hardly go, the sizes that blocks leave lie far from each other."""
    torch.manual_seed(0)
    graph = trace(digits_resnet(), torch.randn(1, 1, 8, 8))
    saliencies = {"l2": {g.name: torch.rand(g.size) for g in graph.open_groups}}
    bounds, target = Bounds(max_ratio=0.05), graph.cost().macs // 2
    space = SearchSpace.of(graph, saliencies, target, tuple(graph.blocks), bounds=bounds)
    macs = []
    for parameters in space.seeds(60):
        candidate = space.suggest(Suggests(parameters))
        macs.append(graph.cost(space.decode(candidate, graph, saliencies)).macs)
        assert macs[-1] <= candidate.budget * graph.cost().macs
    assert max(macs) < 0.99 * target


def test_groups_of_a_stage_share_an_offset(setting: Setting) -> None:
    graph, _ = setting
    space = space_of(setting, granularity="stage")
    fine = {name for name in space.ties if graph.groups[name].size == 24}  # 8x8 positions
    assert len(fine) == 3
    assert {space.ties[name] for name in fine} == {"stage 1"}
    assert set(space.ties.values()) == {"stage 1", "stage 2"}
    candidate = space.suggest(Suggests(seed=1))
    assert len({candidate.offsets[name] for name in fine}) == 1
    assert len(set(candidate.offsets.values())) == 2
    assert space.streams == ()  # streams share the offsets of what lies beside them
    assert not any(any(space.suggest(Suggests(p)).offsets.values()) for p in space.seeds(60))


def test_squeezed_features_belong_to_the_stage_of_their_block() -> None:
    model = torchvision.models.efficientnet_b0(num_classes=3)
    graph = trace(model, torch.randn(1, 3, 64, 64))
    ties = ties_of(graph, "stage")
    for block in graph.blocks.values():
        assert len({ties[name] for name in block.groups if name in ties}) == 1
    convolutions = [name for name in ties if name.endswith("block.0.0")]
    assert len({ties[name] for name in convolutions}) == 5  # 32x32 to 2x2
    assert len(set(ties.values())) < 8 < len(ties)


def test_uniform_granularity_leaves_allocation_to_the_ranking(setting: Setting) -> None:
    space = space_of(setting, granularity="uniform")
    assert (space.ties, space.streams) == ({}, ())
    seeds = space.seeds(300)
    assert len({tuple(sorted(seed.items())) for seed in seeds}) == len(seeds)
    assert all(not space.suggest(Suggests(seed=number)).offsets for number in range(5))


def test_groups_that_bounds_fix_get_no_offset(setting: Setting) -> None:
    graph, _ = setting
    bounds = Bounds(exclude=("3",))
    left = space_of(setting, 0.7, bounds=bounds).ties.keys()
    assert left == {
        name
        for name in space_of(setting).ties
        if len(bounds.counts(graph, graph.groups[name])) > 1
    }
    assert left < space_of(setting).ties.keys()


def test_groups_that_free_next_to_nothing_get_no_offset() -> None:
    sizes = ((4, 400), (400, 400), (400, 10), (10, 2), (2, 3))
    layers = [part for size in sizes for part in (nn.Linear(*size), nn.ReLU())]
    graph = trace(nn.Sequential(*layers), torch.randn(2, 4))
    assert [group.name for group in graph.open_groups] == ["0", "2", "4", "6"]
    assert list(ties_of(graph)) == ["0", "2", "4"]  # a unit of the last frees 13 of 166,000 MACs


def test_spaces_with_other_bounds_or_granularity_differ(setting: Setting) -> None:
    plain = space_of(setting).to_json()
    assert plain["bounds"] == UNBOUNDED.to_json()
    others = (
        {"bounds": Bounds(multiple=2)},
        {"bounds": Bounds(max_ratio=0.9)},
        {"granularity": "stage"},
    )
    for more in others:
        assert space_of(setting, **more).to_json() != plain
        assert json.loads(json.dumps(space_of(setting, **more).to_json())) == (
            space_of(setting, **more).to_json()
        )


def test_an_offset_keeps_more_of_its_group(setting: Setting) -> None:
    graph, saliencies = setting
    space = space_of(setting)
    group = next(iter(space.ties))
    base = space.seeds(3)[0]
    kept = []
    for offset in (-0.3, 0.0, 0.3):  # more than a sampler takes: the units here are coarse
        candidate = replace(space.suggest(Suggests(base)), offsets={group: offset})
        plan = space.decode(candidate, graph, saliencies)
        kept.append(len(plan.kept.get(group, range(graph.groups[group].size))))
    assert kept[0] < kept[1] < kept[2]


def test_an_offset_of_its_groups_keeps_a_block_in_a_joint_ranking(setting: Setting) -> None:
    graph, saliencies = setting
    first, *others = graph.blocks
    weight = float(torch.cat(list(saliencies["l2"].values())).median())
    scores = {"l2": {first: 0.3 * weight, **dict.fromkeys(others, 100 * weight)}}
    space = space_of(setting, block_saliencies=scores)
    removed = []
    for offset in (0.0, 2.3):
        offsets = dict.fromkeys(graph.blocks[first].groups, offset)
        candidate = Candidate("l2", 0.5, "joint", offsets)
        removed.append(space.decode(candidate, graph, saliencies).removed)
    assert removed == [(first,), ()]


def test_a_space_is_told_apart_by_what_it_decides(setting: Setting) -> None:
    space = space_of(setting)
    assert space.to_json() == space_of(setting).to_json()
    assert replace(space, target=space.target - 1).to_json() != space.to_json()


def test_a_candidate_survives_json(setting: Setting) -> None:
    candidate = space_of(setting).suggest(Suggests())
    assert Candidate.from_json(candidate.to_json()) == candidate

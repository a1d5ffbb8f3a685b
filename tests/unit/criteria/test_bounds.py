"""Bounds hold for every plan, whatever the network, the ranking and the budget."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from paretoprune.criteria import UNBOUNDED, Bounds, largest_macs, select, smallest_macs
from paretoprune.criteria.budget import Allowance
from paretoprune.experiments.models import digits_resnet
from paretoprune.surgery import InfeasibleBudget, PruningGraph, PruningPlan, prune, trace
from tests.unit.surgery.specimens import traced as specimen
from tests.unit.surgery.test_composed import images, networks, traced

some = settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate])
ratios = st.tuples(st.floats(0, 0.9), st.floats(0, 1)).map(sorted)


@st.composite
def bounds_of(draw: st.DrawFn, graph: PruningGraph) -> Bounds:
    """Returns bounds for a network; patterns name groups, blocks and modules of it."""
    low, high = draw(ratios)
    modules = {name.rpartition(".")[0] for name, _ in graph.units if "." in name}
    names = sorted({*modules, *graph.groups, *graph.blocks})
    patterns = st.lists(st.sampled_from([*names, "images.0*", "*.conv1"]), max_size=2)
    return Bounds(
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 1, 2, 4, 6])),
        min(low, 0.95),
        high,
        tuple(p for p in draw(patterns) if p in names),
    )


def saliency_of(graph: PruningGraph, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=generator) for g in graph.open_groups}


def verify(graph: PruningGraph, plan: PruningPlan, bounds: Bounds) -> None:
    """Asserts what a user reads off the docstring, without the code that makes it so."""
    inside = {name for block in plan.removed for name in graph.blocks[block].groups}
    for group in graph.open_groups:
        if group.name in inside:
            continue
        count, size = len(plan.kept.get(group.name, range(group.size))), group.size
        assert count >= min(bounds.minimum, size)
        ratio = 1 - count / size
        assert ratio <= bounds.max_ratio + 1e-6
        weights = [each for each in group.slices if each.parameter.endswith("weight")]
        widths = [len(each.indices[0]) for each in weights]
        even = all(count * width % bounds.multiple == 0 for width in widths)
        assert even or count == size
        if ratio < bounds.min_ratio - 1e-6 and not is_kept(graph, group.name, bounds):
            fewer = (  # only where no smaller count is allowed
                number
                for number in range(max(1, min(bounds.minimum, size)), count)
                if all(number * width % bounds.multiple == 0 for width in widths)
                and 1 - number / size <= bounds.max_ratio - 1e-6
            )
            assert next(fewer, None) is None


def is_kept(graph: PruningGraph, group: str, bounds: Bounds) -> bool:
    """Whether patterns keep a group whole, by the counts that it may have."""
    return len(Bounds(exclude=bounds.exclude).counts(graph, graph.groups[group])) == 1


@given(description=networks, seed=st.integers(0, 99), data=st.data())
@settings(some, max_examples=25)
def test_every_plan_keeps_to_the_bounds_and_the_budget(
    description: Any, seed: int, data: st.DataObject
) -> None:
    model, graph = traced(description)
    bounds = data.draw(bounds_of(graph))
    low = smallest_macs(graph, bounds=bounds)
    high = largest_macs(graph, bounds=bounds)
    target = round(low + data.draw(st.floats(0, 1)) * (high - low))
    how: dict[str, Any] = data.draw(
        st.sampled_from(
            [
                {"allocation": "global"},
                {"allocation": "uniform"},
                {"blocks": {name: 0.3 for name in bounds.blocks(graph)}},
            ]
        )
    )
    try:
        plan = select(graph, saliency_of(graph, seed), budget=target, bounds=bounds, **how)
    except InfeasibleBudget:
        assert bounds.multiple == 1  # units are coarse here; multiples widen the window instead
        return
    verify(graph, plan, bounds)
    macs = graph.cost(plan).macs
    assert macs <= target
    assert bounds.multiple > 1 or macs > 0.99 * target
    small = prune(model, graph, plan)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and excludes(bounds, name):
            assert len(small.get_submodule(name).weight) == len(module.weight)  # type: ignore[arg-type]
    small(images(2))


def excludes(bounds: Bounds, name: str) -> bool:
    """Whether a module is excluded; the patterns here are plain names."""
    return any(name == pattern or name.startswith(f"{pattern}.") for pattern in bounds.exclude)


@given(description=networks, data=st.data())
@settings(some, max_examples=12)
def test_the_limits_are_reached_and_nothing_lies_beyond(
    description: Any, data: st.DataObject
) -> None:
    graph = traced(description)[1]
    bounds = data.draw(bounds_of(graph))
    saliency = saliency_of(graph, 0)
    low, high = smallest_macs(graph, bounds=bounds), largest_macs(graph, bounds=bounds)
    for limit in (low, high):
        assert graph.cost(select(graph, saliency, budget=limit, bounds=bounds)).macs == limit
    with pytest.raises(InfeasibleBudget, match=f"smallest reachable is {low:,} MACs"):
        select(graph, saliency, budget=low - 1, bounds=bounds)
    if high < 0.99 * graph.cost().macs:
        with pytest.raises(InfeasibleBudget, match=f"largest reachable within .* is {high:,} M"):
            select(graph, saliency, budget=1.0, bounds=bounds)


@given(st.integers(0, 99), ratios, st.sampled_from([1, 2, 3, 4]), st.floats(0, 0.99))
@settings(some, max_examples=40)
def test_ratios_are_rounded_to_what_the_bounds_allow(
    seed: int, limits: list[float], multiple: int, ratio: float
) -> None:
    graph = digits()
    bounds = Bounds(2, multiple, limits[0], limits[1])
    names = [group.name for group in graph.open_groups][::2]
    wanted = dict.fromkeys(names, ratio)
    plan = select(graph, saliency_of(graph, seed), ratios=wanted, bounds=bounds)
    verify(graph, plan, bounds)
    if bounds.min_ratio == 0 and bounds.max_ratio == 1:
        for group in graph.open_groups:
            count = len(plan.kept.get(group.name, range(group.size)))
            exact = group.size - int(wanted.get(group.name, 0.0) * group.size + 0.5)
            assert 0 <= count - max(exact, 2) < multiple


@functools.cache
def digits() -> PruningGraph:
    torch.manual_seed(0)
    return trace(digits_resnet(), torch.randn(1, 1, 8, 8))


@pytest.mark.parametrize("name", ["chain", "residual", "dense", "three_dimensional"])
@given(st.integers(0, 99), st.floats(0, 1), st.sampled_from([2, 3, 4]))
@settings(some, max_examples=20)
def test_with_multiples_a_plan_is_as_close_as_the_closest_of_all(
    name: str, seed: int, share: float, multiple: int
) -> None:
    graph = specimen(name)[1]
    bounds = Bounds(multiple=multiple)
    counts = [bounds.counts(graph, group) for group in graph.open_groups]
    every = torch.cartesian_prod(*counts).reshape(-1, len(counts))
    macs = Allowance(graph, graph.open_groups, ()).macs(every)
    target = int(macs.min() + share * (macs.max() - macs.min()))
    closest = int(macs[macs <= target].max())
    plan = select(graph, saliency_of(graph, seed), budget=target, bounds=bounds)
    found = graph.cost(plan).macs
    assert found == closest or 0.99 * target < found <= target


def test_a_unit_of_several_channels_counts_as_them() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(8, 4, 1, 6, 24, 20, num_classes=3)  # 6 heads of 4 channels
    graph = trace(model, torch.randn(1, 3, 8, 8))
    counts = {
        group.size: Bounds(multiple=8).counts(graph, group).tolist() for group in graph.open_groups
    }
    assert counts == {24: [8, 16, 24], 6: [2, 4, 6], 20: [8, 16, 20]}


def test_a_group_that_no_multiple_fits_keeps_all() -> None:
    graph = digits()
    first = graph.open_groups[0]
    assert first.size == 8
    assert Bounds(multiple=16).counts(graph, first).tolist() == [8]
    assert Bounds(multiple=3).counts(graph, first).tolist() == [3, 6, 8]
    assert Bounds(multiple=8, min_ratio=0.5).counts(graph, first).tolist() == [8]
    assert Bounds(min_ratio=0.25, max_ratio=0.5).counts(graph, first).tolist() == [4, 5, 6]
    assert Bounds(min_ratio=0.3, max_ratio=0.3).counts(graph, first).tolist() == [6]


@pytest.mark.parametrize(
    ("ratios", "counts"),
    [
        ({"max_ratio": 0.7}, [3, 4, 5, 6, 7, 8, 9, 10]),  # 10 * (1 - 0.7) is more than 3
        ({"min_ratio": 0.8}, [1, 2]),  # 10 * (1 - 0.8) is less than 2
    ],
)
def test_ratios_are_exact_where_floating_point_is_not(
    ratios: dict[str, Any], counts: list[int]
) -> None:
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3))
    graph = trace(model, torch.randn(2, 4))
    assert Bounds(**ratios).counts(graph, graph.groups["0"]).tolist() == counts


def test_patterns_name_groups_blocks_and_modules() -> None:
    graph = digits()
    blocks, names = tuple(graph.blocks), [group.name for group in graph.open_groups]

    def kept(*patterns: str) -> tuple[set[str], set[str]]:
        bounds = Bounds(exclude=patterns)
        bounds.check(graph)
        whole = {n for n in names if len(bounds.counts(graph, graph.groups[n])) == 1}
        return whole, set(blocks) - set(bounds.blocks(graph))

    assert kept() == (set(), set())
    assert kept("*") == (set(names), set(blocks))
    inner = graph.blocks["layer1.0"].groups[0]
    assert kept(inner) == ({inner}, {"layer1.0"})
    assert kept("conv1") == ({"conv1"}, set())  # blocks may go, the stream stays
    for pattern in ("layer1.0", "layer1.?", "layer1"):
        whole, stay = kept(pattern)
        assert inner in whole
        assert "conv1" in whole  # the stream, which the block puts out
        assert "layer1.0" in stay
        assert not any(name.startswith("layer3") for name in whole | stay)
    assert kept("layer1.0.bn2")[1] == {"layer1.0"}  # with the block the norm would be gone


def test_excluded_blocks_are_not_removed() -> None:
    graph = digits()
    bounds, saliency = Bounds(exclude=("layer1.1",)), saliency_of(graph, 0)
    weakest = {name: -1.0 for name in graph.blocks}
    plan = select(graph, saliency, budget=0.4, blocks=weakest, bounds=bounds)
    assert "layer1.1" not in plan.removed
    assert plan.removed
    sentence = "block 'layer1.1' is to be removed, but `exclude` keeps it"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        select(graph, saliency, budget=0.4, removed=("layer1.1",), bounds=bounds)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"minimum": 0}, "`minimum` is a whole number of at least 1, but got 0"),
        ({"multiple": 0}, "`multiple` is a whole number of at least 1, but got 0"),
        ({"multiple": 2.0}, "`multiple` is a whole number of at least 1, but got 2.0"),
        ({"min_ratio": -0.1}, "but got -0.1 and 1.0"),
        ({"max_ratio": 1.1}, "but got 0.0 and 1.1"),
        ({"min_ratio": 0.6, "max_ratio": 0.5}, "but got 0.6 and 0.5"),
        ({"min_ratio": 1.0}, "min_ratio < 1, but got 1.0 and 1.0"),
        ({"max_ratio": math.nan}, "but got 0.0 and nan"),
        ({"exclude": "layer1"}, "`exclude` is a sequence of patterns, but got 'layer1'"),
    ],
)
def test_bounds_that_cannot_be_meant(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Bounds(**values)


def test_a_pattern_that_matches_nothing_lists_what_there_is() -> None:
    graph = digits()
    with pytest.raises(ValueError, match=r"matches 'layr1'; groups: conv1, .*; blocks: layer1.0"):
        select(graph, saliency_of(graph, 0), budget=0.5, bounds=Bounds(exclude=("layr1",)))


def test_bounds_survive_json() -> None:
    bounds = Bounds(2, 8, 0.1, 0.9, ("a", "b*"))
    assert Bounds.from_json(bounds.to_json()) == bounds
    assert Bounds.from_json({**UNBOUNDED.to_json()}) == UNBOUNDED

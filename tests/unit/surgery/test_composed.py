"""Properties that hold for whatever network is composed of the structures people use."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from paretoprune.surgery import PruningGraph, PruningPlan, prune, trace
from tests.unit.surgery.oracles import (
    carried_over,
    counted,
    difference,
    loss,
    masked_outputs,
    outputs,
    plans,
    same,
    state,
)
from tests.unit.surgery.specimen import settle
from tests.unit.surgery.zoo_pieces import IMAGE_PIECES, NORMS, TOKEN_PIECES, Composed

Description = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]
some = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a failing network is small as it is
)
networks = st.tuples(
    st.lists(st.sampled_from(sorted(IMAGE_PIECES)), min_size=1, max_size=4).map(tuple),
    st.lists(
        st.tuples(st.sampled_from(sorted(NORMS)), st.sampled_from(sorted(TOKEN_PIECES))),
        max_size=3,
    ).map(tuple),
)


@functools.cache
def traced(description: Description) -> tuple[nn.Module, PruningGraph]:
    torch.manual_seed(0)
    model = Composed(*description)
    settle(model)
    return model.eval(), trace(model, images(2))


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


@given(description=networks, data=st.data())
@settings(some, max_examples=30)
def test_pruned_equals_masked_and_costs_what_the_graph_says(
    description: Description, data: Any
) -> None:
    model, graph = traced(description)
    assert graph.open_groups
    for _ in range(2):
        plan = data.draw(plans(graph))
        small, inputs = prune(model, graph, plan), images(3)
        expected = masked_outputs(model, graph, plan, inputs)
        assert difference(expected, outputs(small, inputs)) < 1e-4
        assert counted(small, inputs) == graph.cost(plan)


@given(description=networks, data=st.data())
@settings(some, max_examples=20)
def test_the_dense_network_is_untouched_and_the_pruned_one_trains(
    description: Description, data: Any
) -> None:
    graph = traced(description)[1]
    model: Any = copy.deepcopy(traced(description)[0]).train()
    loss(model(images(4))).backward()
    model.head.register_forward_hook(lambda *_: None)
    before = state(model)
    whole = prune(model, graph, PruningPlan())
    small = prune(model, graph, data.draw(plans(graph)))
    loss(small(images(4))).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    torch.optim.SGD(small.parameters(), 0.1).step()
    assert same(state(model), before)
    assert torch.equal(outputs(model.eval(), images(2))[0], outputs(whole.eval(), images(2))[0])


@given(description=networks, data=st.data())
@settings(some, max_examples=12)
def test_pruning_twice_is_pruning_once_by_the_joined_plan(
    description: Description, data: Any
) -> None:
    model, graph = traced(description)
    first = data.draw(plans(graph))
    small = prune(model, graph, first)
    again = trace(small, images(2))
    assert again.cost() == graph.cost(first)
    same_groups = carried_over(graph, first, again)
    drawn = data.draw(plans(again))
    kept = {name: units for name, units in drawn.kept.items() if name in same_groups}
    # Behind a removed block, another may turn out to be one: its input is non-negative now.
    second = PruningPlan(kept, tuple(set(drawn.removed) & set(graph.blocks)))
    twice, once = prune(small, again, second), prune(model, graph, first.then(second))
    assert difference(outputs(once, images(3)), outputs(twice, images(3))) < 1e-6


@given(description=networks)
@settings(some, max_examples=20)
def test_blocks_are_found_and_removing_them_is_zeroing_their_last_layers(
    description: Description,
) -> None:
    model, graph = traced(description)
    residual = {name for name, module in model.named_modules() if hasattr(module, "last")}
    signed = {n for n in residual if type(model.get_submodule(n)).__name__ != "Bottleneck"}
    assert signed <= set(graph.blocks) <= residual
    dense = copy.deepcopy(model)
    for name in graph.blocks:
        block: Any = dense.get_submodule(name)
        for last in block.last:
            for parameter in block.get_submodule(last).parameters():
                nn.init.zeros_(parameter)
    small = prune(model, graph, PruningPlan(removed=tuple(graph.blocks)))
    assert difference(outputs(dense, images(3)), outputs(small, images(3))) < 1e-5
    assert counted(small, images(3)) == graph.cost(PruningPlan(removed=tuple(graph.blocks)))

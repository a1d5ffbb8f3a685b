"""prune equals masking, costs what the graph says, and returns a network that stands alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from paretoprune.surgery import PruningPlan, prune, trace
from paretoprune.surgery.execute import Execution
from paretoprune.surgery.prune import masked_tensors
from tests.unit.surgery.oracles import (
    call,
    carried_over,
    counted,
    difference,
    half,
    loss,
    masked,
    masked_outputs,
    outputs,
    plans,
    same,
    state,
)
from tests.unit.surgery.specimens import ZOO, traced

everything = pytest.mark.parametrize("name", ZOO)
few = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a failing plan is small as it is
)


@everything
@given(data=st.data())
@few
def test_pruned_equals_masked_and_costs_what_the_graph_says(name: str, data: Any) -> None:
    model, graph = traced(name)
    plan = data.draw(plans(graph))
    inputs = ZOO[name].inputs()
    small = prune(model, graph, plan)
    expected = masked_outputs(model, graph, plan, inputs)
    assert difference(expected, outputs(small, inputs)) < 1e-4
    # Where the summed dim of an einsum has one entry, torch multiplies and counts nothing.
    if name != "einsum_attention" or min(map(len, plan.kept.values()), default=2) > 1:
        assert counted(small, inputs) == graph.cost(plan)


@everything
@given(data=st.data())
@settings(few, max_examples=4)
def test_the_program_runs_the_pruned_network_on_any_batch(name: str, data: Any) -> None:
    model, graph = traced(name)
    plan = data.draw(plans(graph))
    small, inputs = prune(model, graph, plan), ZOO[name].inputs(data.draw(st.integers(1, 5)))
    actual = list(Execution(graph, plan).run(small, inputs).values())
    assert difference(outputs(small, inputs), actual) < 1e-5


@everything
def test_a_full_plan_gives_a_bit_identical_copy(name: str) -> None:
    model, graph = traced(name)
    kept = {group.name: tuple(range(group.size)) for group in graph.groups.values()}
    assert kept
    for plan in (PruningPlan(), PruningPlan(kept)):
        small = prune(model, graph, plan)
        inputs = ZOO[name].inputs()
        for a, b in zip(outputs(model, inputs), outputs(small, inputs), strict=True):
            assert torch.equal(a, b)
        assert repr(small) == repr(model)
        mine = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        assert not any(id(t) in mine for t in (*small.parameters(), *small.buffers()))


@everything
def test_the_input_is_untouched_and_the_result_trains_and_copies(name: str) -> None:
    graph = traced(name)[1]
    model = ZOO[name].network().train()
    inputs = ZOO[name].inputs(4)
    loss(call(model, inputs)).backward()
    before = state(model)
    small = prune(model, graph, half(graph))
    assert same(state(model), before)
    assert {m.training for m in small.modules()} == {True}
    assert all(parameter.grad is None for parameter in small.parameters())
    again = copy.deepcopy(small).eval()
    expected = outputs(again, inputs)
    loss(call(small, inputs)).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    torch.optim.SGD(small.parameters(), 0.1).step()
    assert same(state(model), before)
    assert difference(expected, outputs(again, inputs)) == 0


@everything
@given(data=st.data())
@settings(few, max_examples=2)
def test_pruning_twice_is_pruning_once_by_the_joined_plan(name: str, data: Any) -> None:
    model, graph = traced(name)
    first = data.draw(plans(graph))
    small = prune(model, graph, first)
    inputs = ZOO[name].inputs()
    again = trace(small, inputs)
    kept = carried_over(graph, first, again)
    drawn = data.draw(plans(again))
    second = PruningPlan({n: u for n, u in drawn.kept.items() if n in kept}, drawn.removed)
    twice, once = prune(small, again, second), prune(model, graph, first.then(second))
    # Not the modules' types: the smaller network may need a recording where the larger did not.
    assert same(dict(twice.named_parameters()), dict(once.named_parameters()))
    assert difference(outputs(once, inputs), outputs(twice, inputs)) < 1e-6


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].blocks])
def test_removing_blocks_equals_zeroing_their_branches(name: str) -> None:
    model, graph = traced(name)
    inputs = ZOO[name].inputs()
    for removed in (*((block,) for block in graph.blocks), tuple(graph.blocks)):
        branches = [branch for block in removed for branch in graph.extents[block].branches]
        zeroed = list(Execution(graph).run(model, inputs, zeroed=branches).values())
        small = prune(model, graph, PruningPlan(removed=removed))
        assert difference(zeroed, outputs(small, inputs)) < 1e-6
        assert counted(small, inputs) == graph.cost(PruningPlan(removed=removed))


@everything
def test_masked_tensors_mask_the_slices_of_the_groups(name: str) -> None:
    model, graph = traced(name)
    dense = masked(model, graph, half(graph))
    tensors = masked_tensors(model, graph, half(graph))
    for key, tensor in (*dense.named_parameters(), *dense.named_buffers()):
        assert torch.equal(tensors[key], tensor)


@pytest.mark.parametrize(
    ("name", "block", "last"),
    [
        ("residual", "2", "2.conv2"),
        ("pre_activation", "1", "1.conv2"),
        ("nested", "stage.1", "stage.1.conv2"),
    ],
)
def test_a_removed_block_equals_a_branch_of_zeros(name: str, block: str, last: str) -> None:
    model, graph = traced(name)
    dense, inputs = copy.deepcopy(model), ZOO[name].inputs()
    dense.get_submodule(last).register_forward_hook(lambda *call: torch.zeros_like(call[2]))
    plan = PruningPlan(removed=(block,))
    small = prune(model, graph, plan)
    assert difference(outputs(dense, inputs), outputs(small, inputs)) < 1e-6
    assert isinstance(small.get_submodule(block), nn.Identity)
    assert counted(small, inputs) == graph.cost(plan)
    branches = graph.extents[block].branches
    zeroed = list(Execution(graph).run(model, inputs, zeroed=branches).values())
    assert difference(zeroed, outputs(small, inputs)) < 1e-6


def test_attributes_follow_the_weights() -> None:
    model, graph = traced("depthwise")
    small: Any = prune(model, graph, PruningPlan({"0.0": (0, 2, 5)}))
    assert (small[0][0].out_channels, small[0][1].num_features) == (3, 3)
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (3, 3, 3)
    assert (small[4].in_channels, small[4].out_channels, small[4].groups) == (3, 6, 3)
    model, graph = traced("transposed")
    small = prune(model, graph, PruningPlan({"0.0": (1,), "2": (2,)}))
    assert (small[2].in_channels, small[2].out_channels) == (1, 2)
    assert (small[5].in_channels, small[5].out_channels, small[5].groups) == (2, 4, 1)
    assert small[6].num_parameters == 4


def test_pad_widths_follow_the_channels_that_stay() -> None:
    model, graph = traced("padded_by_module")
    small: Any = prune(model, graph, PruningPlan({"conv2.0": (1, 3), "stem.0": (0, 2)}))
    assert small.pad.padding == (0, 0, 0, 0, 0, 2)


def test_requires_grad_and_dtype_are_kept() -> None:
    graph = traced("chain")[1]
    model = ZOO["chain"].network().double()
    next(model.parameters()).requires_grad_(False)
    small = prune(model, graph, half(graph))
    assert [p.requires_grad for p in small.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert {p.dtype for p in small.parameters()} == {torch.float64}


def test_a_tied_weight_stays_tied() -> None:
    model, graph = traced("called_twice")
    small: Any = prune(model, graph, PruningPlan({"norm.0": (0, 4, 5)}))
    assert small.first.weight is small.second.weight
    assert small.first.weight.shape == (3, 3)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (PruningPlan({"none": (0,)}), "names group 'none', which this network does not have"),
        (PruningPlan({"0.0": (0, 8)}), "group '0.0' has units 0 to 7, but the plan keeps 8"),
        (PruningPlan({"5.2": (0,)}), "group '5.2' is frozen .reaches the model's output"),
        (PruningPlan(removed=("3",)), "'3' is no removable block; removable: none"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_everywhere(plan: PruningPlan, sentence: str) -> None:
    model, graph = traced("chain")
    for use in (
        lambda: prune(model, graph, plan),
        lambda: graph.cost(plan),
        lambda: masked_tensors(model, graph, plan),
        lambda: Execution(graph, plan).run(model, ZOO["chain"].inputs()),
    ):
        with pytest.raises(ValueError, match=sentence):
            use()


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda: nn.Sequential(chain_of(16)), "0.weight has 16 channels .* has no such tensor"),
        (lambda: chain_of(32), r"0.weight has 16 channels along axis 0, .* shape \(32, 6\)"),
    ],
    ids=["wrapped", "wider"],
)
def test_the_graph_of_another_network_is_refused(
    other: Callable[[], nn.Module], sentence: str
) -> None:
    graph = trace(chain_of(16), torch.randn(2, 6))
    with pytest.raises(ValueError, match=f"that of another network: {sentence}"):
        prune(other(), graph, PruningPlan({"0": (0, 1)}))


def chain_of(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


class Remembering(nn.Module):
    """Keeps an auxiliary loss with its history, and by a hook what a layer puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.auxiliary: Any = None
        self.seen: dict[str, Any] = {}
        self.hidden.register_forward_hook(lambda *call: self.seen.update(last=call[-1]))

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.relu(self.hidden(x))
        self.auxiliary = x.square().mean()
        return self.out(x)


def test_networks_that_keep_activations_are_traced_and_pruned() -> None:
    torch.manual_seed(0)
    model, inputs = Remembering(), torch.randn(4, 6)
    (model(inputs).sum() + model.auxiliary).backward()
    graph = trace(model, inputs)
    kept = [0, 3, 5]
    for _ in range(2):  # what the export left in the network's tables is no obstacle either
        small = prune(model, graph, PruningPlan({"hidden": tuple(kept)}))
        hidden = torch.relu(model.hidden(inputs))[:, kept]
        expected = hidden @ model.out.weight[:, kept].T + model.out.bias
        torch.testing.assert_close(small(inputs), expected)
        graph = trace(model, inputs)


def test_a_frozen_group_may_be_named_when_it_is_kept_whole() -> None:
    model, graph = traced("chain")
    small = prune(model, graph, PruningPlan({"5.2": (0, 1, 2, 3, 4)}))
    assert repr(small) == repr(model)


def test_hooks_travel_with_the_copy() -> None:
    model, graph = ZOO["mlp"].network(), traced("mlp")[1]
    calls: list[int] = []
    next(model.children()).register_forward_hook(lambda *_: calls.append(1))
    outputs(prune(model, graph, half(graph)), ZOO["mlp"].inputs())
    assert calls == [1]


class Silent(nn.Module):
    """Returns a constant beside its input's size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 3)


def test_a_network_without_anything_to_prune() -> None:
    model = Silent()
    graph = trace(model, torch.randn(2, 4))
    assert not graph.groups
    assert not graph.blocks
    assert graph.cost() == counted(model, torch.randn(2, 4))
    assert torch.equal(prune(model, graph, PruningPlan())(torch.randn(5, 4)), torch.zeros(5, 3))

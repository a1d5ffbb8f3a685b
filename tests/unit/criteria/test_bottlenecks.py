"""Bottlenecks are what a plan spares; widened networks compute the same and can be pruned."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from paretoprune.criteria import select
from paretoprune.criteria.bottlenecks import pressures, reset, widen
from paretoprune.experiments.models import digits_resnet
from paretoprune.surgery import PruningPlan, trace
from tests.unit.surgery.specimen import settle
from tests.unit.surgery.specimens import ZOO, traced


def test_pressures_are_the_pruning_ratios_of_a_plan_tightest_first() -> None:
    _, graph = traced("residual")  # groups of 6, 6, 8, 8, 8
    plan = PruningPlan({"0.0": (0,), "3.conv1.0": tuple(range(7)), "4.conv1.0": (0, 1)})
    found = pressures(graph, plan)
    assert [p.ratio for p in found] == sorted(p.ratio for p in found)
    ratios = {p.group: (p.removed, p.units, p.bottleneck) for p in found}
    # 12 of 36 units go: a third, so that layers under a sixth are bottlenecks
    assert ratios == {
        "0.0": (5, 6, False),
        "2.conv1.0": (0, 6, True),
        "3.conv1.0": (1, 8, True),
        "3.conv2.0": (0, 8, True),
        "4.conv1.0": (6, 8, False),
    }


def test_a_layer_made_indispensable_is_the_bottleneck() -> None:
    _, graph = traced("residual")
    saliency = {group.name: torch.rand(group.size) for group in graph.open_groups}
    saliency["3.conv1.0"] += 10
    found = pressures(graph, select(graph, saliency, budget=0.4))
    assert found[0].group == "3.conv1.0"
    assert found[0].bottleneck


EXACT = ("chain", "residual", "dense", "depthwise", "excitation", "flattened", "mlp",
         "padded_by_module", "called_twice", "gated", "one_dimensional")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "factor"), [*((name, 2.0) for name in EXACT), ("residual", 1.3), ("flattened", 2.6)]
)
def test_a_widened_network_computes_the_same(name: str, factor: float) -> None:
    model, graph = traced(name)
    inputs = ZOO[name].inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for group in graph.open_groups:
        wide = widen(model, graph, [group.name], factor)
        torch.testing.assert_close(wide(inputs), model(inputs), rtol=1e-4, atol=1e-5)
        sizes = {g.name: g.size for g in trace(wide, inputs).open_groups}
        assert sizes[group.name] == -int(-group.size * factor // 1)
        assert all(sizes[g.name] == g.size for g in graph.open_groups if g is not group)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_widened_network_is_pruned_back_to_the_dense_one() -> None:
    model = digits_resnet()
    settle(model)
    model.eval()
    inputs = torch.randn(2, 1, 8, 8)
    graph = trace(model, inputs)
    names = [group.name for group in graph.open_groups][1:3]
    wide = widen(model, graph, names)
    assert trace(wide, inputs).cost().macs > graph.cost().macs
    macs = graph.cost().macs
    wide_graph = trace(wide, inputs)
    saliency = {group.name: torch.rand(group.size) for group in wide_graph.open_groups}
    assert wide_graph.cost(select(wide_graph, saliency, budget=macs)).macs <= macs


def test_reset_draws_new_weights_by_seed_alone() -> None:
    model = digits_resnet()
    random = torch.get_rng_state()
    first, again, other = (reset(model, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), random)
    weights = [dict(each.named_parameters())["conv1.weight"] for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], dict(model.named_parameters())["conv1.weight"])


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
            self.third = nn.Linear(6, 6)
            self.third.weight = self.second.weight
            self.head = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(x))
            x = torch.relu(self.second(x)) + torch.relu(self.third(x)) + x
            y: torch.Tensor = self.head(x)
            return y

    model = Tied().eval()
    inputs = torch.randn(5, 4)
    graph = trace(model, inputs)
    wide = copy.deepcopy(widen(model, graph, [graph.open_groups[0].name]))
    assert isinstance(wide, Tied)
    assert wide.third.weight is wide.second.weight
    torch.testing.assert_close(wide(inputs), model(inputs))


def test_misuse_is_one_clear_sentence() -> None:
    model, graph = traced("residual")
    with pytest.raises(ValueError, match="a widening factor lies above 1, but got 1"):
        widen(model, graph, ["0.0"], 1)
    with pytest.raises(ValueError, match=r"'x' is no prunable group here; prunable: 0\.0"):
        widen(model, graph, ["x"])

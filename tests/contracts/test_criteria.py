"""What every criterion in CRITERIA promises."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA, SharedCalibration, select
from paretoprune.surgery import PruningGraph
from tests.unit.surgery.oracles import call, same, state
from tests.unit.surgery.specimen import draw
from tests.unit.surgery.specimens import ZOO, traced

every = pytest.mark.parametrize("criterion", CRITERIA)
NETWORKS = (
    "residual",
    "dense",
    "depthwise",
    "grouped",
    "excitation",
    "flattened",
    "mlp",
    "one_dimensional",
    "called_twice",
    "fixed_filters",
    "named_inputs",
    "tokens",
    "torch_attention",
)
networks = pytest.mark.parametrize("name", NETWORKS)


def calibration(name: str) -> list[tuple[Any, Tensor]]:
    """Returns batches of different sizes, the last of a single example."""
    torch.manual_seed(3)
    return [(draw(ZOO[name].shape, n), torch.randint(5, (n,))) for n in (16, 16, 1)]


def scores(
    criterion: str, name: str, model: nn.Module | None = None
) -> tuple[PruningGraph, Mapping[str, Tensor]]:
    dense, graph = traced(name)
    return graph, CRITERIA[criterion]()(model or dense, graph, calibration(name))


@every
@networks
def test_one_finite_saliency_per_unit_of_every_open_group(criterion: str, name: str) -> None:
    graph, saliency = scores(criterion, name)
    assert set(saliency) == {group.name for group in graph.open_groups}
    for group in graph.open_groups:
        values = saliency[group.name]
        assert values.shape == (group.size,)
        assert values.dtype.is_floating_point
        assert not values.requires_grad
        assert values.isfinite().all()
        assert (values >= 0).all()


@every
@networks
def test_it_is_deterministic_and_leaves_the_random_state_alone(criterion: str, name: str) -> None:
    _, first = scores(criterion, name)
    torch.manual_seed(99)
    model, graph = traced(name)
    data = calibration(name)
    random = torch.get_rng_state()
    second = CRITERIA[criterion]()(model, graph, data)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(first[group], second[group]) for group in first)


@every
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_untouched(criterion: str, training: bool) -> None:
    name = "residual"
    model = ZOO[name].network()
    for inputs, targets in calibration(name)[:1]:
        F.cross_entropy(call(model, inputs), targets).backward()
    model.train(training)
    next(model.children()).train(not training)
    next(model.parameters()).requires_grad_(False)
    hook = next(model.children()).register_forward_hook(lambda *_: None)
    before = state(model)
    _, saliency = scores(criterion, name, model)
    assert same(state(model), before)
    hook.remove()
    _, expected = scores(criterion, name)  # neither the mode nor frozen weights matter
    assert all(torch.equal(saliency[group], expected[group]) for group in expected)


def permuted(model: nn.Module, graph: PruningGraph, name: str, order: Tensor) -> nn.Module:
    """Returns a copy whose unit u of a group is unit order[u] of `model`."""
    result = copy.deepcopy(model)
    tensors = dict([*result.named_parameters(), *result.named_buffers()])
    for item in graph.groups[name].slices:
        positions = torch.tensor(item.indices)
        tensor = tensors[item.parameter].detach()
        moved = tensor.index_select(item.axis, positions[order].flatten())
        tensor.index_copy_(item.axis, positions.flatten(), moved)
    return result


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
@networks
def test_permuting_the_units_of_a_group_permutes_its_saliencies(criterion: str, name: str) -> None:
    graph, before = scores(criterion, name)
    group = max(graph.open_groups, key=lambda group: group.size)
    order = torch.randperm(group.size)
    model = permuted(traced(name)[0], graph, group.name, order)
    _, after = scores(criterion, name, model)
    for other in graph.open_groups:
        expected = before[other.name]
        if other is group:
            expected = expected[order]
        scale = expected.abs().max().item()
        torch.testing.assert_close(after[other.name], expected, rtol=1e-3, atol=1e-4 * scale)


@every
def test_it_tells_units_apart_and_select_takes_it(criterion: str) -> None:
    graph, saliency = scores(criterion, "residual")
    assert all(len(values.unique()) > 1 for values in saliency.values())
    macs = graph.cost(select(graph, saliency, budget=0.5)).macs
    assert 0.495 * graph.cost().macs < macs <= 0.5 * graph.cost().macs


@every
def test_it_is_a_frozen_value_with_a_summary_and_a_paper(criterion: str) -> None:
    kind: Any = CRITERIA[criterion]
    assert kind.summary
    assert "\n" not in kind.summary
    assert kind.paper
    assert pickle.loads(pickle.dumps(kind())) == kind()
    for item in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), item.name, 1)


def test_the_table_is_read_only() -> None:
    with pytest.raises(TypeError):
        CRITERIA["mine"] = CRITERIA["l2"]  # type: ignore[index]


READ_CLASSES = {"consensus", "gaussian_0", "gaussian_1", "gaussian_2"}
"""Without class labels they take every example for a class of its own."""


@every
def test_targets_may_be_nested(criterion: str) -> None:
    model, graph = traced("residual")
    plain = calibration("residual")
    nested = [
        (inputs, {"kind": [targets], "more": torch.ones(len(targets))})
        for inputs, targets in plain
    ]

    def loss(outputs: Tensor, targets: dict[str, Any]) -> Tensor:
        return F.cross_entropy(outputs, targets["kind"][0])

    expected = CRITERIA[criterion]()(model, graph, plain)
    found = CRITERIA[criterion]()(model, graph, SharedCalibration(nested, loss))
    assert set(found) == set(expected)
    for group, values in found.items():
        assert values.isfinite().all()
        if criterion not in READ_CLASSES:
            assert torch.equal(values, expected[group])

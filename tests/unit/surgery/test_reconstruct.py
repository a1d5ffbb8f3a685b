"""reconstruct brings a pruned network back towards the dense one, and changes nothing else."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.surgery import (
    PruningGraph,
    PruningPlan,
    Reconstructor,
    prune,
    reconstruct,
    trace,
)
from paretoprune.surgery.consumers import find_consumers
from paretoprune.surgery.static import StaticReconstructor
from tests.unit.surgery.oracles import half, outputs, same, state
from tests.unit.surgery.specimen import draw, settle
from tests.unit.surgery.specimens import ZOO, traced

Method = Literal["sequential", "static"]
both = pytest.mark.parametrize("method", ["sequential", "static"])


def calibration(name: str, batches: int = 4) -> list[tuple[Any, Tensor]]:
    return [(draw(ZOO[name].shape, 32), torch.zeros(32)) for _ in range(batches)]


def error(dense: nn.Module, small: nn.Module, inputs: Any) -> float:
    """Returns the error of all outputs relative to their spread over examples."""
    pairs = zip(outputs(dense, inputs), outputs(small, inputs), strict=True)
    return max(float((a - b).norm() / (a - a.mean(0)).norm()) for a, b in pairs)


@both
@pytest.mark.parametrize("name", ZOO)
def test_a_full_plan_changes_nothing(name: str, method: Method) -> None:
    model, graph = traced(name)
    small = prune(model, graph, PruningPlan())
    fitted = reconstruct(small, model, graph, PruningPlan(), calibration(name, 1), method=method)
    inputs = ZOO[name].inputs()
    for a, b in zip(outputs(model, inputs), outputs(fitted, inputs), strict=True):
        assert torch.equal(a, b)


@both
@pytest.mark.parametrize(
    "name",
    [
        "chain",
        "residual",
        "pre_activation",
        "dense",
        "excitation",
        "padded_by_module",
        "padded_in_code",
        "mlp",
        "one_dimensional",
        "three_dimensional",
        "tokens",
        "torch_attention",
        "two_inputs",
        "named_inputs",
        "two_outputs",
        "unflattened",
    ],
)
def test_the_error_on_unseen_inputs_falls_clearly(name: str, method: Method) -> None:
    model, graph = traced(name)
    plan, unseen = half(graph), draw(ZOO[name].shape, 128)
    small = prune(model, graph, plan)
    before = state(small), state(model)
    fitted = reconstruct(small, model, graph, plan, calibration(name), method=method)
    assert error(model, fitted, unseen) < 0.6 * error(model, small, unseen)
    assert same((state(small), state(model)), before)
    assert repr(fitted) == repr(small)


@pytest.mark.parametrize("name", ["residual", "pre_activation", "nested"])
def test_sequential_makes_up_for_removed_blocks(name: str) -> None:
    model, graph = traced(name)
    plan = PruningPlan(half(graph).kept, tuple(graph.blocks)[:1])
    small, unseen = prune(model, graph, plan), draw(ZOO[name].shape, 128)
    fitted = reconstruct(small, model, graph, plan, calibration(name))
    assert error(model, fitted, unseen) < 0.6 * error(model, small, unseen)


def test_sequential_corrects_the_errors_of_earlier_layers() -> None:
    model, graph = traced("depthwise")
    plan, unseen = half(graph), draw(ZOO["depthwise"].shape, 128)
    small, data = prune(model, graph, plan), calibration("depthwise")
    errors = [
        error(model, reconstruct(small, model, graph, plan, data, method=method), unseen)
        for method in ("sequential", "static")
    ]
    assert errors[0] < 0.5 * errors[1]


class Twins(nn.Module):
    """Convolutional and linear layers with two equal units each, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.norm3 = nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.hidden, self.out = nn.Linear(6, 7), nn.Linear(7, 5)
        for layer in (self.conv1, self.conv2, self.hidden):
            for parameter in layer.parameters():
                parameter.detach()[1] = parameter.detach()[0]

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm1(self.conv1(x)))
        x = x + self.norm3(self.conv3(F.relu(self.norm2(self.conv2(x)))))
        return self.out(F.relu(self.hidden(x.mean((2, 3)))))


@both
@pytest.mark.parametrize("group", ["conv2", "hidden"])
def test_a_unit_that_equals_another_is_made_up_for(group: str, method: Method) -> None:
    model = Twins().eval()
    images = torch.randn(256, 3, 8, 8)
    graph = trace(model, images[:2])
    size = graph.groups[group].size
    plan = PruningPlan({group: tuple(unit for unit in range(size) if unit != 1)})
    small = prune(model, graph, plan)
    fitted = reconstruct(small, model, graph, plan, [(images, torch.zeros(256))], method=method)
    unseen = torch.randn(64, 3, 8, 8)
    assert error(model, small, unseen) > 0.05
    assert error(model, fitted, unseen) < 2e-3


@both
def test_it_is_deterministic_and_ignores_the_random_state(method: Method) -> None:
    model, graph = traced("residual")
    plan, data = half(graph), calibration("residual")
    small = prune(model, graph, plan)
    first = reconstruct(small, model, graph, plan, data, method=method)
    torch.manual_seed(99)
    random = torch.get_rng_state()
    second = reconstruct(small, model, graph, plan, data, method=method)
    assert torch.equal(torch.get_rng_state(), random)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [Reconstructor, StaticReconstructor])
def test_one_reconstructor_serves_many_plans(kind: Any) -> None:
    model, graph = traced("residual")
    data = calibration("residual")
    shared = kind(model, graph, data)
    for plan in (half(graph), PruningPlan({"4.conv1.0": (0, 7)}, ("2",)), half(graph)):
        small = prune(model, graph, plan)
        alone = kind(model, graph, data)(small, plan)
        for a, b in zip(alone.state_dict().values(), shared(small, plan).state_dict().values()):  # noqa: B905
            assert torch.equal(a, b)


@both
def test_progress_counts_every_layer_once(method: Method) -> None:
    model, graph = traced("residual")
    for plan in (PruningPlan(), half(graph), PruningPlan(removed=("2",))):
        steps: list[tuple[int, int]] = []
        reconstruct(
            prune(model, graph, plan),
            model,
            graph,
            plan,
            calibration("residual", 1),
            method=method,
            progress=lambda done, total: steps.append((done, total)),  # noqa: B023
        )
        assert steps == [(done + 1, len(steps)) for done in range(len(steps))]


def test_modes_and_gradients_of_the_result_are_those_of_the_pruned_network() -> None:
    model, graph = traced("residual")
    small = prune(model, graph, half(graph)).train()
    next(small.parameters()).requires_grad_(False)
    fitted = reconstruct(small, model, graph, half(graph), calibration("residual", 1))
    assert all(module.training for module in fitted.modules())
    flags = [[p.requires_grad for p in net.parameters()] for net in (small, fitted)]
    assert flags[0] == flags[1]
    assert all(p.is_leaf and p.grad is None for p in fitted.parameters())
    assert repr(copy.deepcopy(fitted)) == repr(small)


@both
def test_no_batch_is_an_error(method: Method) -> None:
    model, graph = traced("mlp")
    with pytest.raises(ValueError, match="needs calibration data, but got no batch"):
        reconstruct(prune(model, graph, half(graph)), model, graph, half(graph), [], method=method)


def test_an_unknown_method_is_an_error() -> None:
    model, graph = traced("mlp")
    method: Any = "parallel"
    with pytest.raises(ValueError, match="'sequential' or 'static', but got 'parallel'"):
        reconstruct(model, model, graph, PruningPlan(), calibration("mlp", 1), method=method)


def test_inputs_by_other_names_are_an_error() -> None:
    model, graph = traced("named_inputs")
    data = [({"image": torch.randn(2, 3, 8, 8), "label": torch.randn(2, 4)}, torch.zeros(2))]
    with pytest.raises(ValueError, match=r"traced with .*'vector', 'image'.*'image', 'label'"):
        Reconstructor(model, graph, data)


class Same(nn.Module):
    """Convolutions padded by word, one of them with an even kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding="same")
        self.second = nn.Conv2d(6, 6, (2, 4), padding="same", dilation=(1, 2))
        self.third = nn.Conv2d(6, 6, 5, padding="same", padding_mode="reflect")
        self.fourth = nn.Conv2d(6, 4, 3, padding="valid")

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.fourth(F.relu(self.third(x)))


@both
def test_padding_by_word(method: Method) -> None:
    model = Same().eval()
    graph = trace(model, torch.randn(2, 3, 9, 9))
    small = prune(model, graph, half(graph))
    data = [(torch.randn(32, 3, 9, 9), torch.zeros(32))]
    fitted = reconstruct(small, model, graph, half(graph), data, method=method)
    unseen = torch.randn(32, 3, 9, 9)
    assert consumers(graph).keys() == {"first.weight", "third.weight", "fourth.weight"}
    assert error(model, fitted, unseen) < error(model, small, unseen)


def consumers(graph: PruningGraph) -> dict[str, Any]:
    return {consumer.weight: consumer for consumer in find_consumers(graph).values()}


def test_consumers_know_the_norm_and_the_stream_behind_them() -> None:
    found = consumers(traced("residual")[1])
    assert found["2.conv1.0.weight"].norm.mean == "2.conv1.1.running_mean"
    assert found["2.conv1.0.weight"].stream is None
    assert found["2.conv2.0.weight"].stream is not None
    projection, branch = found["3.shortcut.0.weight"], found["3.conv2.0.weight"]
    assert (branch.stream is None) != (projection.stream is None)
    assert found["5.2.weight"].bias == "5.2.bias"


class MadeBias(nn.Module):
    """Layers whose bias is made of two parameters, and layers that share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.skip = nn.Linear(6, 24), nn.Conv1d(24, 16, 3)
        self.first, self.second = nn.Linear(24, 16, bias=False), nn.Linear(24, 8, bias=False)
        self.third, self.norm = nn.Conv1d(24, 16, 3, bias=False), nn.BatchNorm1d(16)
        self.left = nn.Parameter(3 + torch.rand(8))
        self.right = nn.Parameter(torch.full((8,), -3.0))

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.hidden(x))
        made = torch.cat([self.left + 0, self.right])
        flat = F.linear(x, self.first.weight, made), F.linear(x, self.second.weight, self.left)
        x = x.unflatten(0, (-1, 8)).mT
        return *flat, self.skip(x) + self.norm(F.conv1d(x, self.third.weight, made))


@both
def test_a_bias_that_is_no_parameter_of_its_own_is_not_added_twice(method: Method) -> None:
    torch.manual_seed(0)
    model = MadeBias().eval()
    settle(model)
    graph = trace(model, torch.randn(8, 6))
    plan = PruningPlan({"hidden": tuple(range(0, 24, 2))})
    small, unseen = prune(model, graph, plan), torch.randn(128, 6)
    data = [(torch.randn(512, 6), torch.zeros(512))]
    fitted = reconstruct(small, model, graph, plan, data, method=method)
    for layer in ("first.weight", "second.weight", "third.weight"):
        consumer = consumers(graph)[layer]
        assert consumer.bias is None
        assert consumer.offset is not None
    assert consumers(graph)["third.weight"].stream is not None
    for a, b, c in zip(*(outputs(n, unseen) for n in (model, small, fitted)), strict=True):
        assert (c - a).norm() < 0.7 * (b - a).norm()


class Repeated(nn.Module):
    """Sums whose other summand is one value per channel, or per token."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.gate = nn.Linear(4, 6), nn.Linear(4, 1)
        self.first, self.second = nn.Conv2d(3, 9, 3), nn.Conv2d(9, 6, 3)
        self.third, self.out = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, time: Tensor) -> Any:
        shift, gate = self.time(time)[:, :, None, None], self.gate(time)[:, None]
        x = self.second(F.relu(self.first(x))) + shift
        x = F.relu(self.third(F.relu(x).flatten(2).mT))
        return self.out(x) + gate


@both
def test_a_summand_that_is_repeated_is_no_stream(method: Method) -> None:
    torch.manual_seed(0)
    model = Repeated().eval()
    graph = trace(model, (torch.randn(2, 3, 7, 7), torch.randn(2, 4)))
    plan = half(graph)
    small, unseen = prune(model, graph, plan), (torch.randn(64, 3, 7, 7), torch.randn(64, 4))
    data = [((torch.randn(128, 3, 7, 7), torch.randn(128, 4)), torch.zeros(128))]
    fitted = reconstruct(small, model, graph, plan, data, method=method)
    assert consumers(graph)["second.weight"].stream is None
    assert consumers(graph)["out.weight"].stream is None
    assert error(model, fitted, unseen) < 0.7 * error(model, small, unseen)


class Factored(nn.Module):
    """A number before the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, factor: Tensor, x: Tensor) -> Any:
        return self.out(F.relu(self.hidden(x)) * factor)


@both
def test_a_number_may_come_before_the_examples(method: Method) -> None:
    model = Factored().eval()
    inputs = torch.tensor(2.0), torch.randn(64, 4)
    graph = trace(model, inputs)
    small = prune(model, graph, half(graph))
    data = [(inputs, torch.zeros(64))]
    fitted = reconstruct(small, model, graph, half(graph), data, method=method)
    assert error(model, fitted, inputs) < error(model, small, inputs)


def test_weights_that_are_used_twice_are_not_fitted() -> None:
    assert not {"conv.weight", "first.weight"} & consumers(traced("called_twice")[1]).keys()


@both
def test_filters_that_are_buffers_keep_their_values(method: Method) -> None:
    model, graph = traced("fixed_filters")
    small = prune(model, graph, half(graph))
    data = calibration("fixed_filters")
    fitted = reconstruct(small, model, graph, half(graph), data, method=method)
    for name in ("blur", "transform", "projection"):
        assert torch.equal(fitted.get_buffer(name), small.get_buffer(name))
    unseen = draw(ZOO["fixed_filters"].shape, 128)
    assert error(model, fitted, unseen) < error(model, small, unseen)  # the other layers make up


@both
def test_a_layer_that_cannot_carry_a_shift_is_fitted_without_one(method: Method) -> None:
    """Behind a ReLU inputs have a mean; without a bias or a norm, weights must make up for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5, bias=False)).eval()
    batches = [(torch.randn(256, 8), torch.zeros(256))]
    graph = trace(model, batches[0][0])
    plan = half(graph)
    small = prune(model, graph, plan)
    fitted = reconstruct(small, model, graph, plan, batches, method=method)
    with torch.no_grad():
        target = model(batches[0][0])
        kept = torch.relu(small.get_submodule("0")(batches[0][0]))
        least = (kept @ torch.linalg.lstsq(kept, target).solution - target).norm()
        assert (fitted(batches[0][0]) - target).norm() < 1.02 * least

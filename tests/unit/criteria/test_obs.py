"""obs against brute force: the best unit goes first, and its error is that of the refit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA, block_saliency
from paretoprune.surgery import PruningPlan, trace
from paretoprune.surgery.least_squares import RIDGE
from tests.unit.surgery.specimen import settle


class Case:
    """One layer that reads a group: its inputs, its weights, and the variance of its target.

    Args:
        features: Inputs of the layer at all positions, shape (positions, features).
        weight: Its weights including the gain of a norm behind it, shape (outputs, features).
        target: The stream or output that errors are relative to, shape (positions, outputs).
        taps: Features of one unit.
    """

    def __init__(self, features: Tensor, weight: Tensor, target: Tensor, taps: int) -> None:
        centred = features.double() - features.double().mean(0)
        self.features = centred / len(centred) ** 0.5
        self.weight = weight.double()
        self.variance = target.double().var(0, correction=0).sum()
        self.taps = taps
        self.ridge = RIDGE * self.features.square().sum(0).mean()

    def error(self, gone: list[int], *, ridge: bool = True) -> float:
        """Returns the relative error after units are gone and the others are refitted."""
        units = self.weight.shape[1] // self.taps
        stays = torch.tensor([unit not in gone for unit in range(units)])
        stays = stays.repeat_interleave(self.taps)
        eye = self.ridge.sqrt() * torch.eye(len(stays), dtype=torch.float64)
        system = torch.cat([self.features, eye]) if ridge else self.features
        goal = system @ self.weight.T
        fitted = torch.linalg.lstsq(system[:, stays], goal, driver="gelsd").solution
        return float((system[:, stays] @ fitted - goal).square().sum() / self.variance)

    def greedy(self) -> tuple[list[int], list[float]]:
        """Returns the order in which units leave by brute force, and the errors left by then."""
        gone: list[int] = []
        errors: list[float] = []
        units = range(self.weight.shape[1] // self.taps)
        while len(gone) < len(units):
            costs = {unit: self.error([*gone, unit]) for unit in units if unit not in gone}
            gone.append(min(costs, key=lambda unit: costs[unit]))
            errors.append(costs[gone[-1]])
        return gone, errors


def check(case: Case, saliency: Tensor) -> None:
    order, errors = case.greedy()
    assert saliency.argsort().tolist() == order
    torch.testing.assert_close(
        saliency[order].double(), torch.tensor(errors).double(), rtol=1e-3, atol=1e-6
    )


def correlated(count: int, *shape: int) -> Tensor:
    """Returns inputs whose features depend on one another, as those of real networks do."""
    mixing = torch.randn(shape[0], shape[0])
    return torch.einsum("nc...,cd->nd...", torch.randn(count, *shape), mixing)


def perceptron() -> tuple[nn.Module, Tensor, Case]:
    first, last = nn.Linear(4, 7), nn.Linear(7, 3)
    model = nn.Sequential(first, nn.ReLU(), last)
    inputs = correlated(300, 4)
    with torch.no_grad():
        hidden = F.relu(first(inputs))
        case = Case(hidden, last.weight, last(hidden), 1)
    return model, inputs, case


class Block(nn.Module):
    """A residual branch that ends in a convolution and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv1, self.conv2 = nn.Conv2d(4, 5, 3, 1, 1), nn.Conv2d(5, 4, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        branch = self.norm(self.conv2(F.relu(self.conv1(x))))
        return (branch + x[:, :, 1:-1:2, 1:-1:2]).mean((2, 3))


def residual() -> tuple[nn.Module, Tensor, Case]:
    model = Block()
    settle(model)
    inputs = correlated(24, 3, 7, 7)
    with torch.no_grad():
        x = F.relu(model.stem(inputs))
        hidden = F.relu(model.conv1(x))
        stream = model.eval().norm(model.conv2(hidden)) + x[:, :, 1:-1:2, 1:-1:2]
        assert model.norm.running_var is not None
        gain = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
        features = F.unfold(hidden, 3, stride=2).transpose(1, 2).flatten(0, 1)
        weight = model.conv2.weight.flatten(1) * gain[:, None]
        case = Case(features, weight, stream.movedim(1, -1).flatten(0, 2), 9)
    return model, inputs, case


def scores(criterion: str, model: nn.Module, inputs: Tensor) -> Any:
    graph = trace(model, inputs[:2])
    data = [(part, torch.zeros(len(part))) for part in inputs.split(len(inputs))]
    return graph, CRITERIA[criterion]()(model, graph, data)


def test_linear_readers_equal_brute_force() -> None:
    model, inputs, case = perceptron()
    check(case, scores("obs", model, inputs)[1]["0"])


def test_convolutions_behind_a_norm_and_into_a_stream_equal_brute_force() -> None:
    model, inputs, case = residual()
    check(case, scores("obs", model, inputs)[1]["conv1"])


@pytest.mark.parametrize(("build", "group"), [(perceptron, "0"), (residual, "conv1")])
def test_errors_are_about_those_of_plain_least_squares(build: Any, group: str) -> None:
    model, inputs, case = build()
    saliency = scores("obs", model, inputs)[1][group]
    gone: list[int] = []
    for unit in saliency.argsort().tolist()[:-1]:
        gone.append(unit)
        plain = case.error(gone, ridge=False)
        assert plain <= saliency[unit].item() * (1 + 1e-3)
        assert saliency[unit].item() == pytest.approx(plain, rel=0.2, abs=0.01)


def test_the_spare_one_of_two_equal_units_goes_first_and_its_twin_does_not_follow() -> None:
    model, inputs, _ = perceptron()
    layers: Any = model
    for parameter in layers[0].parameters():
        parameter.detach()[3] = parameter.detach()[1]
    saliency = scores("obs", model, inputs)[1]["0"]
    first = saliency.argsort().tolist()[0]
    assert first in (1, 3)
    twin = {1: 3, 3: 1}[first]
    assert saliency[first] < 0.05 * saliency[twin]


def test_all_readers_of_a_group_count() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.first(x))
            return self.left(x), self.right(x)

    model, inputs = Two(), correlated(200, 4)
    _, saliency = scores("obs", model, inputs)
    with torch.no_grad():
        hidden = F.relu(model.first(inputs))
        cases = [
            Case(hidden, layer.weight, layer(hidden), 1) for layer in (model.left, model.right)
        ]
    costs = [sum(case.error([unit]) for case in cases) for unit in range(6)]
    first = int(saliency["first"].argmin())
    assert first == min(range(6), key=lambda unit: costs[unit])
    assert saliency["first"][first].item() == pytest.approx(costs[first], rel=1e-3)


def test_error_per_mac_keeps_the_order_and_divides_by_what_a_unit_saves() -> None:
    model, inputs, _ = perceptron()
    graph, per_mac = scores("obs_per_mac", model, inputs)
    errors = scores("obs", model, inputs)[1]["0"]
    order = errors.argsort()
    assert torch.equal(per_mac["0"].argsort(stable=True)[:3], order[:3])
    saved = graph.cost().macs - graph.cost(PruningPlan({"0": (0, 1, 2, 3, 4, 5)})).macs
    added = errors[order].diff(prepend=torch.zeros(1))
    expected = added.cummax(0).values / saved
    torch.testing.assert_close(per_mac["0"][order], expected, rtol=1e-3, atol=1e-9)


def test_error_per_mac_falls_nowhere_along_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = perceptron()
    order = torch.tensor([4, 0, 6, 2, 1, 3, 5])
    steps = {"0": (order, torch.tensor([1.0, 3.0, 2.0, 4.0, 1.0, 5.0, 0.0]))}
    monkeypatch.setattr("paretoprune.criteria.obs._elimination", lambda *_: steps)
    per_mac = scores("obs_per_mac", model, inputs)[1]["0"]
    expected = torch.tensor([1.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0]) / (4 + 3)  # MACs of a unit
    torch.testing.assert_close(per_mac[order], expected)


def test_batches_of_different_sizes_count_by_their_examples() -> None:
    model, inputs, _ = perceptron()
    graph, whole = scores("obs", model, inputs)
    data = [(part, torch.zeros(len(part))) for part in inputs.split([100, 199, 1])]
    parts = CRITERIA["obs"]()(model, graph, data)
    torch.testing.assert_close(parts["0"], whole["0"], rtol=0.1, atol=0.01)


class Mixing(nn.Module):
    """A removable block whose inner channels cannot go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.second(self.first(x).cumsum(1))
        return x + mixed


def test_a_block_of_frozen_units_goes_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Mixing(), nn.Flatten(), nn.Linear(64, 3)).eval()
    graph = trace(model, torch.randn(2, 3, 4, 4))
    assert graph.groups["1.first"].frozen
    batches = [(torch.randn(8, 3, 4, 4), torch.randint(3, (8,)))]
    for name in ("obs", "obs_per_mac"):
        criterion = CRITERIA[name]()
        saliency = criterion(model, graph, batches)
        scores = block_saliency(criterion, saliency, model, graph, batches)
        assert scores["1"] > max(float(values.max()) for values in saliency.values())

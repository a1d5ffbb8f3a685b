"""SOSP against explicit Hessians, Jacobians and exhaustive search, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA, SharedCalibration
from paretoprune.criteria.sosp import gauss_newton, greedy
from paretoprune.criteria.units import Units
from paretoprune.surgery import PruningGraph, trace
from tests.unit.criteria import oracles
from tests.unit.surgery.specimen import draw, settle
from tests.unit.surgery.specimens import ZOO

Case = tuple[nn.Module, PruningGraph, Tensor, Tensor]


def perceptron(activation: Callable[[], nn.Module] = nn.Tanh, *, bias: bool = True) -> Case:
    """About 60 parameters, two hidden layers."""
    layers = [
        *(nn.Linear(4, 4, bias=bias), activation()),
        *(nn.Linear(4, 5, bias=bias), activation()),
        nn.Linear(5, 3, bias=bias),
    ]
    return case(nn.Sequential(*layers), torch.randn(12, 4))


def convolutional() -> Case:
    """A residual block of convolutions with BatchNorms, so that units own norms, too."""
    return case(Small(), torch.randn(6, 2, 5, 5))


class Small(nn.Module):
    """Two coupled layers and one inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(self.bn0(self.stem(x)))
        x = x + self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(x)))))
        return self.head(x.mean((2, 3)))


def case(model: nn.Module, inputs: Tensor) -> Case:
    settle(model)
    model = model.double().eval()
    inputs = inputs.double()
    return model, trace(model, inputs[:2]), inputs, torch.arange(len(inputs)) % 3


def shared(inputs: Tensor, targets: Tensor, size: int = 5) -> SharedCalibration:
    return SharedCalibration(list(zip(inputs.split(size), targets.split(size), strict=True)))


def partly_fixed() -> Case:
    """Layers of which some channels meet a constant padding and always stay."""
    network = ZOO["padded_in_code"].network()
    return case(network, draw(ZOO["padded_in_code"].shape, 6))


class Scaled(nn.Module):
    """A parameter beside the layers belongs to the units, and a weight is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(4, 5), nn.Parameter(torch.rand(5) + 0.5)
        self.twice = nn.Linear(5, 5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(self.first(x)) * self.scale
        x = torch.tanh(self.twice(x)) + x
        return self.head(torch.tanh(self.twice(x)) + x)


def scaled() -> Case:
    return case(Scaled(), torch.randn(9, 4))


class Forked(nn.Module):
    """A layer is read by a norm and beside it; norms without shift, scale or fixed statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn0 = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.bn1.register_parameter("bias", None)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        x = torch.tanh(self.bn0(x) + x)
        x = self.bn1(self.conv1(x))
        return self.head(torch.tanh(self.bn2(self.conv2(torch.tanh(self.bn1(x))))).mean((2, 3)))


def forked() -> Case:
    return case(Forked(), torch.randn(6, 2, 5, 5))


class Beside(nn.Module):
    """A weight is read by its layer and beside it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.first(x) + self.first.weight.sum(1)))


def beside() -> Case:
    return case(Beside(), torch.randn(9, 4))


class Multiplied(nn.Module):
    """Units that a plain product makes, in front of those of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(4, 6))
        self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.layer(torch.tanh(x @ self.factor))))


CASES = pytest.mark.parametrize("build", [perceptron, convolutional])


@CASES
def test_slopes_and_curvature_equal_the_explicit_gradient_and_hessian(build: Any) -> None:
    model, graph, inputs, targets = build()
    measured = shared(inputs, targets).statistics(model, graph, curvature=True)
    assert measured.curvature is not None
    theta = oracles.structures(model, graph)
    everything = torch.cat(list(theta.values())).sum(0)
    g = oracles.gradient(model, inputs, targets, F.cross_entropy)
    h = oracles.hessian(model, inputs, targets, F.cross_entropy)
    units = Units(graph)
    slopes, curvature = (
        torch.cat([vector.split([g.size for g in graph.groups.values()])[at] for at in open_])
        for vector in (measured.slopes, measured.curvature)
        for open_ in [[i for i, each in enumerate(graph.groups.values()) if not each.frozen]]
    )
    rows = torch.cat(list(theta.values()))
    torch.testing.assert_close(slopes, rows @ g, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(curvature, rows @ h @ everything, rtol=1e-10, atol=1e-14)
    total = everything @ h @ everything
    torch.testing.assert_close(measured.curvature[units.open].sum(), total)
    saliency = CRITERIA["sosp_h"]()(model, graph, shared(inputs, targets))
    expected = (rows @ g).abs() + (rows @ h @ everything).abs() / 2
    torch.testing.assert_close(torch.cat(list(saliency.values())), expected.float())


@pytest.mark.parametrize("build", [partly_fixed, scaled, forked, beside])
def test_curvature_counts_weights_beside_layers_and_only_what_may_leave(build: Any) -> None:
    model, graph, inputs, targets = build()
    measured = shared(inputs, targets).statistics(model, graph, curvature=True)
    assert measured.curvature is not None
    rows = torch.cat(list(oracles.structures(model, graph).values()))

    def loss(theta: Tensor) -> Tensor:
        return F.cross_entropy(oracles.call(model, theta, inputs), targets)

    _, product = torch.autograd.functional.vhp(loss, oracles.flat(model), rows.sum(0))
    assert isinstance(product, Tensor)
    found = Units(graph).by_group(measured.curvature)
    expected = (rows @ product).float()
    torch.testing.assert_close(torch.cat(list(found.values())), expected, rtol=1e-5, atol=1e-8)


def test_a_batch_of_any_size_is_measured_whole() -> None:
    """It is cut into parts of 32, the last of which is smaller."""
    torch.manual_seed(0)
    model, graph, _, _ = convolutional()
    inputs, targets = torch.randn(75, 2, 5, 5).double(), torch.arange(75) % 3
    found = SharedCalibration([(inputs, targets)]).statistics(model, graph, curvature=True)
    named = dict(model.named_parameters())
    loss = F.cross_entropy(model(inputs), targets)
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    assert found.examples == 75
    for name, gradient in gradients.items():
        assert torch.allclose(found.gradient[name], gradient, atol=1e-12)
    pairs = list(zip(inputs.split(25), targets.split(25), strict=True))
    thirds = SharedCalibration(pairs).statistics(model, graph, curvature=True)
    assert found.curvature is not None
    assert thirds.curvature is not None
    assert torch.allclose(found.curvature, thirds.curvature, atol=1e-12)
    assert torch.allclose(found.leaks, thirds.leaks, atol=1e-12)


@CASES
def test_the_second_order_estimate_misses_by_the_third_order(build: Any) -> None:
    model, graph, inputs, targets = build()
    measured = shared(inputs, targets).statistics(model, graph, curvature=True)
    assert measured.curvature is not None
    everything = torch.cat(list(oracles.structures(model, graph).values())).sum(0)
    open_ = Units(graph).open
    slope, bend = measured.slopes[open_].sum(), measured.curvature[open_].sum()
    theta = oracles.flat(model)

    def error(size: float) -> float:
        less = oracles.call(model, theta - size * everything, inputs)
        change = F.cross_entropy(less, targets) - F.cross_entropy(model(inputs), targets)
        estimate = -size * slope + size**2 * bend / 2
        return float((change - estimate).abs().detach())

    assert error(1e-3) / error(1e-2) == pytest.approx(1e-3, rel=0.1)


def test_a_hessian_of_zero_leaves_the_slope() -> None:
    model, graph, inputs, _ = perceptron(nn.ReLU)
    linear = SharedCalibration([(inputs, inputs)], lambda outputs, _: outputs[:, 0].mean())
    saliency = CRITERIA["sosp_h"]()(model, graph, linear)
    # the last hidden layer alone: with a linear loss, only pairs of layers have curvature
    one = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    graph = trace(one, inputs[:2])
    saliency = CRITERIA["sosp_h"]()(one, graph, linear)
    slopes = linear.statistics(one, graph).slopes
    torch.testing.assert_close(saliency["0"], slopes[:5].abs().float())


@pytest.mark.parametrize("criterion", ["sosp_h", "sosp_i"])
def test_a_structure_of_zeros_has_no_saliency(criterion: str) -> None:
    model, graph, inputs, targets = perceptron()
    layers: Any = model
    for parameter in layers[0].parameters():
        parameter.detach()[2] = 0
    saliency = CRITERIA[criterion]()(model, graph, shared(inputs, targets))
    assert saliency["0"][2] == 0
    assert (saliency["2"] > 0).all()


@CASES
def test_the_gauss_newton_matrix_equals_the_explicit_one(build: Any) -> None:
    model, graph, inputs, targets = build()
    theta = oracles.structures(model, graph)
    rows = torch.cat(list(theta.values()))
    j = oracles.jacobian(model, inputs)
    r = oracles.softmax_hessian(model(inputs).detach())
    explicit = torch.einsum("ndp,nde,neq->pq", j, r, j) / len(inputs)
    found = gauss_newton(model, graph, shared(inputs, targets), 1000)
    open_ = Units(graph).open
    found = found[open_][:, open_]
    torch.testing.assert_close(found, rows @ explicit @ rows.T, rtol=1e-9, atol=1e-13)
    assert torch.linalg.eigvalsh(found).min() > -1e-12
    assert (found.diagonal() >= 0).all()


def test_the_gauss_newton_matrix_equals_the_expected_fisher_matrix() -> None:
    model, graph, inputs, targets = perceptron()
    rows = torch.cat(list(oracles.structures(model, graph).values()))
    p = F.softmax(model(inputs), 1).detach()
    fisher = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row, each in zip(p, inputs, strict=True):
        for label, chance in enumerate(row):
            g = oracles.gradient(model, each[None], torch.tensor([label]), F.cross_entropy)
            fisher += chance * torch.outer(g, g) / len(inputs)
    found = gauss_newton(model, graph, shared(inputs, targets), 1000)
    open_ = Units(graph).open
    torch.testing.assert_close(found[open_][:, open_], rows @ fisher @ rows.T)


def test_it_is_the_hessian_of_a_network_whose_outputs_are_linear_in_the_weights() -> None:
    class Linear(nn.Module):
        """Units that go straight into the outputs, which the other layer only sums."""

        def __init__(self) -> None:
            super().__init__()
            self.units = nn.Linear(4, 6, bias=False)
            self.sums = nn.Linear(6, 3, bias=False)

        def forward(self, x: Tensor) -> Any:
            return self.sums(self.units(x))

    model, graph, inputs, targets = case(Linear(), torch.randn(12, 4))
    rows = oracles.structures(model, graph)["units"]
    h = oracles.hessian(model, inputs, targets, F.cross_entropy)
    found = gauss_newton(model, graph, shared(inputs, targets), 1000)
    torch.testing.assert_close(found[:6, :6], rows @ h @ rows.T)


@pytest.mark.parametrize("layer", ["0", "2"])
def test_derivatives_by_all_structures_of_a_layer_sum_to_the_outputs(layer: str) -> None:
    """Of a ReLU network without biases, which is linear in every single layer."""
    model, graph, inputs, targets = perceptron(nn.ReLU, bias=False)
    squared = SharedCalibration([(inputs, targets)], lambda out, _: out.square().sum(1).mean() / 2)
    units = [i for i, name in enumerate(n for n, g in graph.groups.items() for _ in range(g.size))
             if name == layer]  # fmt: skip
    found = gauss_newton(model, graph, squared, 1000)[units][:, units]
    torch.testing.assert_close(found.sum(), model(inputs).square().sum(1).mean().detach())


def test_images_bound_the_examples() -> None:
    model, graph, inputs, targets = perceptron()
    few = gauss_newton(model, graph, shared(inputs, targets), 7)
    same = gauss_newton(model, graph, shared(inputs[:7], targets[:7]), 1000)
    torch.testing.assert_close(few, same)


def estimate(slopes: Tensor, matrix: Tensor, gone: tuple[int, ...]) -> float:
    """Returns lambda_I, written out."""
    index = list(gone)
    return float(slopes[index].abs().sum() + matrix[index][:, index].abs().sum() / 2)


def test_greedy_costs_what_the_formula_says_and_no_less_than_the_best_set() -> None:
    slopes, root = torch.randn(7).double(), torch.randn(7, 4).double()
    matrix = root @ root.T
    increments = greedy(slopes, matrix)
    order = increments.argsort().tolist()
    for size in range(1, 8):
        gone = tuple(order[:size])
        cost = estimate(slopes, matrix, gone)
        assert increments[list(gone)].sum().item() == pytest.approx(cost)
        best = min(
            estimate(slopes, matrix, each) for each in itertools.combinations(range(7), size)
        )
        assert best <= cost + 1e-12
        others = [unit for unit in range(7) if unit not in gone[:-1]]
        assert cost == pytest.approx(
            min(estimate(slopes, matrix, (*gone[:-1], unit)) for unit in others)
        )


def test_sosp_i_is_greedy_on_the_networks_matrix() -> None:
    model, graph, inputs, targets = perceptron()
    saliency = CRITERIA["sosp_i"]()(model, graph, shared(inputs, targets))
    rows = torch.cat(list(oracles.structures(model, graph).values()))
    g = oracles.gradient(model, inputs, targets, F.cross_entropy)
    j = oracles.jacobian(model, inputs)
    r = oracles.softmax_hessian(model(inputs).detach())
    q = rows @ torch.einsum("ndp,nde,neq->pq", j, r, j) @ rows.T / len(inputs)
    gone: tuple[int, ...] = ()
    values = torch.cat(list(saliency.values()))
    for unit in values.argsort().tolist():
        before = estimate(rows @ g, q, gone)
        costs = {u: estimate(rows @ g, q, (*gone, u)) for u in range(9) if u not in gone}
        assert costs[unit] == pytest.approx(min(costs.values()))
        assert values[unit].item() == pytest.approx(costs[unit] - before, rel=1e-5)
        gone = (*gone, unit)


def test_units_that_sosp_i_does_not_see_leave_last() -> None:
    model, graph, inputs, targets = case(Multiplied(), torch.randn(12, 4))
    saliency = CRITERIA["sosp_i"]()(model, graph, shared(inputs, targets))
    assert {name: len(values) for name, values in saliency.items()} == {"factor": 6, "layer": 5}
    assert saliency["layer"].min() < saliency["layer"].max()
    assert (saliency["factor"] >= saliency["layer"].max()).all()


class Six(nn.Module):
    """A hard sigmoid of operators that torch differentiates twice."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


@pytest.mark.parametrize("inplace", [False, True])
def test_a_hard_sigmoid_has_a_curvature(inplace: bool) -> None:
    found = []
    for activation in (partial(nn.Hardsigmoid, inplace), Six):
        torch.manual_seed(0)
        model, graph, inputs, targets = perceptron(activation)
        found.append(CRITERIA["sosp_h"]()(model, graph, shared(inputs, targets)))
    for name, values in found[1].items():
        torch.testing.assert_close(found[0][name], values)


def test_sosp_i_of_one_number_per_example() -> None:
    found = []
    for tail in ([], [nn.Flatten(0)]):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), *tail)
        model, graph, inputs, _ = case(layers, torch.randn(12, 4))
        targets = inputs.sum(1).reshape(model(inputs).shape)
        data = SharedCalibration([(inputs, targets)], F.mse_loss)
        found.append(CRITERIA["sosp_i"]()(model, graph, data)["0"])
    torch.testing.assert_close(found[0], found[1])


def test_sosp_i_of_too_many_outputs_is_refused_in_one_sentence() -> None:
    layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3000))
    model, graph, inputs, targets = case(layers, torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"at most 2048 outputs .* returns 3000; rank by sosp_h"):
        CRITERIA["sosp_i"]()(model, graph, shared(inputs, targets))


def test_a_network_of_several_outputs_is_refused_in_one_sentence() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.first(x))
            return self.left(x), self.right(x)

    model = Two()
    graph = trace(model, torch.randn(2, 4))
    data = SharedCalibration(
        [(torch.randn(4, 4), torch.arange(4) % 2)],
        lambda outputs, targets: F.cross_entropy(outputs[1], targets),
    )
    assert CRITERIA["sosp_h"]()(model, graph, data)["first"].shape == (6,)
    with pytest.raises(ValueError, match="returns one tensor with a row per example, but got"):
        CRITERIA["sosp_i"]()(model, graph, data)


def test_float32_agrees_with_float64() -> None:
    model, graph, inputs, targets = convolutional()
    exact = shared(inputs, targets).statistics(model, graph, curvature=True)
    single = SharedCalibration(
        list(zip(inputs.float().split(2), targets.split(2), strict=True))
    ).statistics(model.float(), graph, curvature=True)
    for name in ("slopes", "leaks", "curvature"):
        scale = float(getattr(exact, name).abs().max())
        torch.testing.assert_close(
            getattr(single, name), getattr(exact, name), rtol=1e-4, atol=1e-5 * scale
        )

"""PROscore: the injected leak, the three forms, and what they are invariant to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import SharedCalibration
from paretoprune.criteria.proscore import Form, Proscore, proscore
from paretoprune.surgery import PruningGraph, trace
from tests.unit.surgery.specimen import settle


class Plain(nn.Module):
    """Two layers with a ReLU in between; optionally a leak around it."""

    def __init__(self, *, norm: bool, inplace: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, bias=not norm)
        self.bn = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.sigma = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(5, 3)
        self.leak: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        x = self.bn(self.conv(x))
        if self.leak is not None:
            x = self.sigma(x) + (self.leak - self.leak.detach())[:, None, None] * x
        else:
            x = self.sigma(x)
        return self.head(x.mean((2, 3)))


Case = tuple[Plain, PruningGraph, Tensor, Tensor]


def build(*, norm: bool = True, inplace: bool = False) -> Case:
    model = Plain(norm=norm, inplace=inplace)
    settle(model)
    model.double().eval()
    inputs = torch.randn(10, 2, 6, 6).double()
    return model, trace(model, inputs[:2]), inputs, torch.arange(10) % 3


def shared(inputs: Tensor, targets: Tensor) -> SharedCalibration:
    return SharedCalibration(list(zip(inputs.split(4), targets.split(4), strict=True)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_leaks_are_the_derivatives_of_an_injected_leak(norm: bool, inplace: bool) -> None:
    model, graph, inputs, targets = build(norm=norm, inplace=inplace)
    leaks = shared(inputs, targets).statistics(model, graph).leaks[:5]
    injected = copy.deepcopy(model)
    injected.sigma = nn.ReLU()
    injected.leak = torch.rand(5).double().requires_grad_()
    assert torch.equal(injected(inputs), model(inputs))
    F.cross_entropy(injected(inputs), targets).backward()
    torch.testing.assert_close(leaks, injected.leak.grad)


def test_leaks_of_coupled_layers_are_summed_over_their_activations() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.leaks = [torch.zeros(6, requires_grad=True) for _ in range(2)]

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            x = F.gelu(x) + self.leaks[0] * x
            y = x + self.b(x)
            return self.head(torch.sigmoid(y) + self.leaks[1] * y)

    model = Residual()
    inputs, targets = torch.randn(8, 4), torch.arange(8) % 3

    class Without(Residual):
        def forward(self, x: Tensor) -> Any:
            x = F.gelu(self.a(x))
            return self.head(torch.sigmoid(x + self.b(x)))

    plain = Without()
    plain.load_state_dict(model.state_dict())
    graph = trace(plain, inputs[:2])
    measured = shared(inputs, targets).statistics(plain, graph)
    first, second = torch.autograd.grad(F.cross_entropy(model(inputs), targets), model.leaks)
    torch.testing.assert_close(measured.leaks[:6].float(), first + second)


def vectors(model: Plain, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Returns |F|, |g|, <F, g> of the convolution's filters by plain autograd."""
    grads = torch.autograd.grad(
        F.cross_entropy(model(inputs), targets), list(model.conv.parameters())
    )
    filters = torch.cat([p.detach().flatten(1) if p.ndim > 1 else p.detach()[:, None]
                         for p in model.conv.parameters()], 1)  # fmt: skip
    pushes = torch.cat([g.flatten(1) if g.ndim > 1 else g[:, None] for g in grads], 1)
    return filters, pushes, filters.norm(dim=1), pushes.norm(dim=1), (filters * pushes).sum(1)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("form", ["normalised", "literal"])
def test_scores_equal_the_formulas_written_out(form: Form, norm: bool) -> None:
    model, graph, inputs, targets = build(norm=norm)
    data, step = shared(inputs, targets), 0.3
    scores = Proscore(form, step)(model, graph, data)["conv"].double()
    leak = data.statistics(model, graph).leaks[:5]
    f, g, r, _, _ = vectors(model, inputs, targets)
    if form == "normalised":
        expected = (f / r[:, None] - step * r[:, None] * g).norm(dim=1) / (1 - step * leak).abs()
    else:
        expected = (f - step * g).norm(dim=1) / (r - step * leak).abs()
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["normalised", "literal"])
def test_without_a_step_every_score_is_one(form: Form) -> None:
    model, graph, inputs, targets = build()
    scores = Proscore(form, 0.0)(model, graph, shared(inputs, targets))["conv"]
    assert torch.equal(scores, torch.ones(5))


def rescaled(model: Plain, factor: float) -> Plain:
    """Returns the same function with the first filter times `factor`."""
    other = copy.deepcopy(model)
    for parameter in other.conv.parameters():
        parameter.detach()[0] *= factor
    if isinstance(other.bn, nn.BatchNorm2d):
        assert other.bn.running_mean is not None
        assert other.bn.running_var is not None
        other.bn.running_mean[0] *= factor
        other.bn.running_var[0] = (other.bn.running_var[0] + 1e-5) * factor**2 - 1e-5
    else:
        other.head.weight.detach()[:, 0] /= factor
    return other


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("form", ["normalised", "slope"])
def test_rescaling_a_filter_leaves_normalised_scores(form: Form, norm: bool) -> None:
    model, graph, inputs, targets = build(norm=norm)
    other = rescaled(model, 4.0)
    torch.testing.assert_close(other(inputs), model(inputs))
    criterion = Proscore(form, 0.5 if form == "normalised" else None)
    before, after = (criterion(m, graph, shared(inputs, targets))["conv"] for m in (model, other))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", [False, True])
def test_rescaling_a_filter_changes_the_literal_score(norm: bool) -> None:
    """The paper's own form; reviewers noted it."""
    model, graph, inputs, targets = build(norm=norm)
    other = rescaled(model, 4.0)
    data = shared(inputs, targets)
    before, after = (Proscore("literal", 0.5)(m, graph, data)["conv"] for m in (model, other))
    assert (after - before).abs()[0] > 1e-4


@pytest.mark.parametrize("norm", [False, True])
def test_the_slope_is_the_derivative_of_the_score_by_the_step(norm: bool) -> None:
    model, _, inputs, targets = build(norm=norm)
    _, _, r, push, along = vectors(model, inputs, targets)
    leak = torch.randn(5).double()
    step = 1e-6

    def at(step: float) -> Tensor:
        return proscore(r, push, along, leak, form="normalised", step=step)

    slope = proscore(r, push, along, leak, form="slope", step=None)
    torch.testing.assert_close(slope, leak - along)
    torch.testing.assert_close((at(step) - at(-step)) / (2 * step), slope, rtol=1e-6, atol=1e-8)


def test_of_a_relu_without_norm_and_bias_the_slope_is_the_leak_of_inactive_positions() -> None:
    model, _, inputs, targets = build(norm=False)
    model.conv.bias = None
    graph = trace(model, inputs[:2])
    slope = Proscore("slope")(model, graph, shared(inputs, targets))["conv"].double()
    entering = model.conv(inputs).detach().requires_grad_()
    leaving = F.relu(entering).detach().requires_grad_()
    F.cross_entropy(model.head(leaving.mean((2, 3))), targets).backward()
    assert leaving.grad is not None
    inactive = (leaving.grad * entering.detach() * (entering <= 0)).sum((0, 2, 3))
    torch.testing.assert_close(slope, inactive, rtol=1e-5, atol=1e-9)


def test_scores_are_zero_at_zero_and_above_one_for_a_step_away() -> None:
    one, none = torch.ones(1).double(), torch.zeros(1).double()
    onto_zero = proscore(one, one, one, none, form="normalised", step=1.0)  # F - g = 0
    assert onto_zero.item() == pytest.approx(0)
    away = proscore(one, one, -one, none, form="normalised", step=0.1)
    towards = proscore(one, one, one, none, form="normalised", step=0.1)
    assert towards.item() < 1 < away.item()
    dead = proscore(none, one, none, one, form="normalised", step=0.1)
    assert dead.item() == 0


def test_with_batch_statistics_filters_are_orthogonal_to_their_gradients() -> None:
    model, _, inputs, targets = build()
    assert isinstance(model.bn, nn.BatchNorm2d)
    model.bn.eps = 1e-12
    model.train()
    _, _, r, push, along = vectors(model, inputs, targets)
    assert along.abs().max() < 1e-10
    leak = torch.zeros(5).double()
    assert (proscore(r, push, along, leak, form="normalised", step=0.2) >= 1).all()


def test_no_filter_crosses_zero_with_the_default_step() -> None:
    model, graph, inputs, targets = build()
    for form in ("normalised", "literal"):
        scores = Proscore(form)(model, graph, shared(inputs, targets))["conv"]
        assert (scores > 0.5).all()
        assert (scores < 1.5).all()
        assert len(scores.unique()) == 5


def test_ranks_hardly_depend_on_the_step() -> None:
    model, graph, inputs, targets = build()
    data = shared(inputs, targets)
    measured = data.statistics(model, graph)
    _, _, r, push, _ = vectors(model, inputs, targets)
    step = 0.1 / float((measured.leaks[:5].abs() + r * push).max())
    orders = [Proscore("normalised", s)(model, graph, data)["conv"].argsort().argsort()
              for s in (step / 10, step)]  # fmt: skip
    assert (orders[0] - orders[1]).abs().max() <= 1


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form is 'normalised', 'literal' or 'slope', but got"):
        Proscore("angular")  # type: ignore[arg-type]

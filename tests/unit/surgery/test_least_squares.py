"""Patches, rows and ridge regression against torch's own convolutions and solvers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from paretoprune.surgery.least_squares import (
    Geometry,
    output_positions,
    patches,
    ridge_fit,
    rows,
    solve_ridge,
)

many = settings(max_examples=40, deadline=None, derandomize=True, database=None)
CONVOLUTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, torch.Tensor, torch.Tensor]:
    """Draws a geometry, inputs and weights that fit it."""
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    groups, inside, outside = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, dilation, padding = each(1, 3), each(1, 2), each(0, 2)
    sizes = [d * (k - 1) + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation)]  # noqa: B905
    geometry = Geometry(kernel, each(1, 3), padding, dilation, groups)
    inputs = torch.randn(draw(st.integers(1, 3)), groups * inside, *sizes)
    return geometry, inputs, torch.randn(groups * outside, inside, *kernel)


@given(geometries())
@many
def test_patches_times_weights_are_the_rows_of_the_convolution(
    case: tuple[Geometry, torch.Tensor, torch.Tensor],
) -> None:
    geometry, inputs, weight = case
    convolve = CONVOLUTIONS[len(geometry.kernel) - 1]
    outputs = convolve(
        inputs, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )
    total = output_positions(inputs, geometry)
    assert total == outputs.numel() // outputs.shape[1]
    positions = torch.randperm(total)[: max(1, total // 2)]
    features = patches(inputs, geometry, positions)
    grouped = weight.reshape(geometry.groups, len(weight) // geometry.groups, -1)
    product = (features @ grouped.mT).transpose(0, 1).flatten(1)
    torch.testing.assert_close(product, rows(outputs, geometry, positions), rtol=1e-4, atol=1e-4)


def test_patches_are_those_of_unfold() -> None:
    geometry = Geometry((3, 2), (2, 1), (1, 0), (1, 2), 1)
    inputs = torch.randn(2, 4, 7, 6)
    unfolded = F.unfold(inputs, (3, 2), (1, 2), (1, 0), (2, 1))  # n, features, positions
    positions = torch.arange(output_positions(inputs, geometry))
    expected = unfolded.transpose(1, 2).flatten(0, 1)
    assert torch.equal(patches(inputs, geometry, positions)[0], expected)


def test_a_linear_layer_reads_rows_of_the_last_dim() -> None:
    geometry = Geometry((), (), (), (), 1)
    inputs = torch.randn(2, 5, 3)
    positions = torch.tensor([0, 4, 9])
    assert output_positions(inputs, geometry) == 10
    expected = inputs.reshape(10, 3)[positions]
    assert torch.equal(patches(inputs, geometry, positions), expected[None])
    assert torch.equal(rows(inputs, geometry, positions), expected)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_ridge_is_the_least_squares_solution_of_the_augmented_system(
    intercept: bool, ridge: float
) -> None:
    groups, positions, features, outputs = 2, 40, 5, 3
    u = torch.randn(groups, positions, features) + 2
    y = torch.randn(groups, positions, outputs) + 1
    prior = torch.randn(groups, outputs, features)
    fit = ridge_fit(u, y, prior, intercept=intercept, ridge=ridge)
    for g in range(groups):
        a, b = u[g].double(), y[g].double()
        centred = a - a.mean(0) if intercept else a
        strength = ridge * (centred.T @ centred).diagonal().mean()
        ones = torch.ones(positions, 1, dtype=torch.float64)
        top = torch.cat([a, ones], 1) if intercept else a
        bottom = strength.sqrt() * torch.eye(features, top.shape[1], dtype=torch.float64)
        system = torch.cat([top, bottom])
        goal = torch.cat([b, strength.sqrt() * prior[g].double().T])
        expected = torch.linalg.lstsq(system, goal).solution.T.float()
        torch.testing.assert_close(fit.weight[g], expected[:, :features], rtol=1e-3, atol=1e-4)
        bias = expected[:, -1] if intercept else torch.zeros(outputs)
        torch.testing.assert_close(fit.bias[g], bias, rtol=1e-3, atol=1e-3)


def test_ridge_recovers_a_map_that_exists_and_keeps_the_prior_where_nothing_is_seen() -> None:
    weight, bias = torch.randn(1, 3, 4), torch.randn(3)
    u = torch.randn(1, 500, 4)
    fit = ridge_fit(u, u @ weight.mT + bias, torch.zeros(1, 3, 4), intercept=True, ridge=1e-7)
    torch.testing.assert_close(fit.weight, weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fit.bias[0], bias, rtol=1e-4, atol=1e-4)
    unseen = ridge_fit(torch.zeros(1, 9, 4), torch.zeros(1, 9, 3), weight, intercept=False)
    torch.testing.assert_close(unseen.weight, weight)


def test_ridge_of_collinear_features_is_finite_and_in_the_dtype_of_the_prior() -> None:
    u = torch.randn(1, 50, 1).expand(1, 50, 6)
    prior = torch.zeros(1, 2, 6)
    solution = solve_ridge((u.mT @ u).double(), (u.mT @ u[..., :2]).double(), prior)
    assert solution.dtype == prior.dtype
    torch.testing.assert_close(solution.sum(-1), torch.ones(1, 2), rtol=1e-2, atol=1e-2)

"""Convolutions without second derivatives by their own weights, against PyTorch's, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from paretoprune.criteria.convolution import convolution

SHAPES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    "plain": (F.conv2d, (2, 3, 6, 6), (4, 3, 3, 3), ()),
    "strides": (F.conv2d, (2, 3, 7, 6), (4, 3, 3, 3), ([2, 1], [1, 0], [1, 2])),
    "groups": (F.conv2d, (2, 4, 6, 6), (8, 2, 3, 3), ([1, 1], [1, 1], [1, 1], 2)),
    "1d": (F.conv1d, (2, 3, 9), (4, 3, 3), ([2],)),
    "3d": (F.conv3d, (2, 2, 4, 4, 4), (3, 2, 2, 2, 2), ([1], [1])),
    "same": (F.conv2d, (2, 3, 6, 6), (4, 3, 3, 3), ([1, 1], "same")),
    "one example": (F.conv2d, (3, 6, 6), (4, 3, 3, 3), ()),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", SHAPES)
def test_derivatives_equal_those_of_the_operator(case: str, bias: bool) -> None:
    operator, inputs, filters, settings = SHAPES[case]
    torch.manual_seed(0)
    x, weight, shift = (
        torch.randn(s, dtype=torch.float64) for s in (inputs, filters, filters[:1])
    )

    def derivatives(own: bool) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, *([shift] if bias else []))]
        gate = torch.ones((), dtype=torch.float64, requires_grad=True)
        args = [leaves[0] * gate, leaves[1], leaves[2] if bias else None, *settings]
        value = convolution(operator, args, {}) if own else operator(*args)
        loss = (gate * value).tanh().square().sum()
        first = torch.autograd.grad(loss, [gate, *leaves], create_graph=True)
        second = torch.autograd.grad(first[0], [gate, leaves[0]])
        return [one.detach() for one in first], list(second)

    for ours, theirs in zip(derivatives(True), derivatives(False), strict=True):
        torch.testing.assert_close(ours, theirs)

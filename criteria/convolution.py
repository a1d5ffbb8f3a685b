"""convolution: one whose second derivatives leave out its own weights.

A factor on what a convolution puts out says all about its weights that curvature needs, so the
second backward pass asks for no derivative by them. PyTorch's operator takes it all the same, by
one more convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_DEFAULTS: tuple[Any, ...] = (None, [1], [0], [1], 1)  # bias, stride, padding, dilation, groups
_Settings = tuple[Sequence[int], Sequence[int], Sequence[int], bool, Sequence[int], int]


def convolution(operator: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Returns the value of a `conv1d`, `conv2d` or `conv3d`; see `surgery.program.Instead`.

    A first backward pass that creates its graph gives the derivatives by inputs, weights and bias;
    that graph, and every backward pass without one, has those by inputs alone.

    Args:
        operator: Computes what has no form here: padding by name, or an input without examples.
        args: Input, shape (n, channels, ...); weight, shape (filters, channels / groups, ...); and
            what follows of bias, stride, padding, dilation and groups.
        kwargs: Of the operator.
    """
    value, weight, bias, stride, padding, dilation, groups = [*args, *_DEFAULTS[len(args) - 2 :]]
    if kwargs or isinstance(padding, str) or value.ndim != weight.ndim:
        return operator(*args, **kwargs)
    settings = (stride, padding, dilation, False, [0] * (weight.ndim - 2), groups)
    return _Convolution.apply(value, weight, bias, settings)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings
    ) -> Tensor:
        ctx.save_for_backward(value, weight)
        ctx.sizes, ctx.settings = None if bias is None else list(bias.shape), settings
        result: Tensor = torch.ops.aten.convolution(value, weight, bias, *settings)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        value, weight = (saved.detach() for saved in ctx.saved_tensors)
        wanted, *owned = ctx.needs_input_grad[:3]
        by_value = by_weight = by_bias = None
        if wanted:
            by_value = _ByInput.apply(gradient, value, weight, ctx.settings)
        if torch.is_grad_enabled() and any(owned):
            _, by_weight, by_bias = torch.ops.aten.convolution_backward(
                gradient.detach(), value, weight, ctx.sizes, *ctx.settings, (False, *owned)
            )
        return by_value, by_weight, by_bias, None


class _ByInput(torch.autograd.Function):
    """The derivative by a convolution's input, linear in that by its output."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, value: Tensor, weight: Tensor, settings: _Settings
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings = settings
        mask = (True, False, False)
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            gradient, value, weight, None, *settings, mask
        )
        return found[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        by_gradient = torch.ops.aten.convolution(*gradients, weight, None, *ctx.settings)
        return by_gradient, None, None, None

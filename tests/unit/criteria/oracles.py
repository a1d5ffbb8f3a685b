"""Independent ways to the same numbers: explicit Hessians, per-example Jacobians, structures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria.units import Units
from paretoprune.surgery import PruningGraph

Loss = Callable[[Any, Tensor], Tensor]


def flat(model: nn.Module) -> Tensor:
    """Returns all parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def call(model: nn.Module, theta: Tensor, inputs: Tensor) -> Tensor:
    """Returns the outputs of a network with parameters from one vector."""
    parts, at = {}, 0
    for name, parameter in model.named_parameters():
        parts[name] = theta[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    outputs: Tensor = torch.func.functional_call(model, parts, (inputs,))
    return outputs


def structures(model: nn.Module, graph: PruningGraph) -> dict[str, Tensor]:
    """Returns theta_s of every unit by group, shape (group.size, parameters), from `slices`.

    A unit owns the rows of the weights that make it, and all vectors.
    """
    owned = Units(graph).owned
    result = {}
    for group in graph.open_groups:
        rows = []
        for unit in range(group.size):
            parts = []
            for name, parameter in model.named_parameters():
                own = torch.zeros_like(parameter)
                for item in group.slices:
                    if item.parameter == name and (item.axis == 0 and name in owned):
                        own[list(item.indices[unit])] = parameter.detach()[
                            list(item.indices[unit])
                        ]
                parts.append(own.flatten())
            rows.append(torch.cat(parts))
        result[group.name] = torch.stack(rows)
    return result


def gradient(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Returns g at the network's parameters."""
    theta = flat(model).requires_grad_()
    (found,) = torch.autograd.grad(loss(call(model, theta, inputs), targets), theta)
    return found


def hessian(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Returns the explicit Hessian, shape (parameters, parameters)."""

    def value(theta: Tensor) -> Tensor:
        return loss(call(model, theta, inputs), targets)

    found = torch.autograd.functional.hessian(value, flat(model))
    assert isinstance(found, Tensor)
    return found


def jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    """Returns the derivative of the outputs by all parameters, shape (N, D, parameters)."""

    def outputs(theta: Tensor) -> Tensor:
        return call(model, theta, inputs)

    found = torch.autograd.functional.jacobian(outputs, flat(model))
    assert isinstance(found, Tensor)
    return found


def softmax_hessian(logits: Tensor) -> Tensor:
    """Returns diag(p) - pp' of every example, shape (N, D, D)."""
    p = F.softmax(logits, 1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

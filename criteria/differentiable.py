"""Runs a graph's program with gradients, operator by operator, so that values can be tapped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from paretoprune.surgery import PruningGraph
from paretoprune.surgery.execute import Execution, Values
from paretoprune.surgery.inputs import has_rows, some_rows
from paretoprune.surgery.program import (
    Instead,
    Node,
    as_call,
    constant_on,
    device_of,
    own_copy,
    shared_copy,
)

_RECURRENT = {"gru", "lstm", "rnn_relu", "rnn_tanh"}
Change = Callable[[Node, Values], Tensor | None]
"""Called after every operator; what it returns, if anything, takes the place of the value."""


def leaves_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns new leaves for all floating-point parameters, and all tensors of the network.

    The leaves share memory with the parameters, which keep their gradients and flags; a tied
    parameter has one leaf under all its names.
    """
    made: dict[int, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() and id(parameter) not in made:
            made[id(parameter)] = leaves[name] = parameter.detach().requires_grad_()
        tensors[name] = made.get(id(parameter), parameter.detach())
    return leaves, tensors


class Outputs:
    """Puts a program's output values back into the structure that the model returns.

    Args:
        model: The dense network; called once on a few examples.
        graph: Its graph.
        inputs: A batch.
    """

    def __init__(self, model: nn.Module, graph: PruningGraph, inputs: Any) -> None:
        args, kwargs = as_call(own_copy(some_rows(inputs, 0, 2)))
        with torch.no_grad():
            returned = shared_copy(model).eval()(*args, **kwargs)
        self._leaves, self._spec = torch.utils._pytree.tree_flatten(returned)
        self._names = graph.program.outputs

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Returns what the model would return."""
        found = iter([values[name] for name in self._names])
        leaves = [next(found) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return torch.utils._pytree.tree_unflatten(leaves, self._spec)


def run(
    graph: PruningGraph,
    tensors: Mapping[str, Tensor],
    inputs: Any,
    *,
    before: Callable[[Node, Values], None] | None = None,
    after: Change | None = None,
    instead: Mapping[str, Instead] | None = None,
) -> Values:
    """Returns the values of the whole program, with the gradients that autograd records.

    Args:
        graph: Of the dense network.
        tensors: Its parameters and buffers by name.
        inputs: A tensor, tuple of arguments or dict of keyword arguments.
        before: Called before every operator.
        after: Called after every operator, see `Change`.
        instead: By node, what computes its value from the operator and its arguments.
    """
    execution = Execution(graph)
    args, kwargs = as_call(own_copy(inputs))
    named = {name: kwargs[name] for name in graph.program.keywords}
    leaves = torch.utils._pytree.tree_leaves((args, named))
    device = device_of(itertools.chain(tensors.values(), leaves))
    given = iter(leaves)
    values: Values = {}
    batch = 0
    # the fused attention kernels have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _without_cudnn(graph):
        for node in graph.program.nodes.values():
            if node.kind == "input":
                values[node.name] = next(given)
                if not batch and has_rows(values[node.name]):
                    batch = len(values[node.name])
            elif node.kind == "parameter":
                values[node.name] = tensors.get(node.target)
            elif node.kind == "constant":
                values[node.name] = constant_on(node, device)
            else:
                if before is not None:
                    before(node, values)
                values = execution.ahead([node.name], values, batch or 1, instead)
                if after is not None and (changed := after(node, values)) is not None:
                    values[node.name] = changed
    return values


@contextmanager
def _without_cudnn(graph: PruningGraph) -> Iterator[None]:
    """Keeps recurrent layers from cuDNN, whose gradients are for training mode alone."""
    cudnn = torch.backends.cudnn
    before = cudnn.enabled
    recurrent = any(node.operator in _RECURRENT for node in graph.program.nodes.values())
    cudnn.enabled = before and not recurrent
    try:
        yield
    finally:
        cudnn.enabled = before

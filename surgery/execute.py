"""Runs a program node by node, dense or pruned, so that values inside can be seen and changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.surgery.errors import UnsupportedModel
from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.inputs import has_rows
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.program import (
    Instead,
    Node,
    Program,
    as_call,
    call,
    constant_on,
    device_of,
    own_copy,
)
from paretoprune.surgery.resize import resized

Values = dict[str, Any]
Visit = Callable[[Node, Values], None]


class Execution:
    """One way to run a graph's program: dense, or with a plan.

    Args:
        graph: From `trace`.
        plan: The plan whose pruned weights will be run; None for the dense network.

    Raises:
        UnsupportedModel: If the network's code takes examples one by one.
    """

    def __init__(self, graph: PruningGraph, plan: PruningPlan | None = None) -> None:
        if graph.program.unrolled is not None:
            raise UnsupportedModel(
                f"the code of {graph.program.unrolled or 'the network'} takes the examples of a "
                "batch one by one, so that it cannot be run operation by operation on other "
                "batches; let it treat them together, or rank by a criterion without data."
            )
        self.graph = graph
        self.program: Program = graph.program
        mask = graph.kept_mask(plan or PruningPlan())
        self._resized = {
            node.name: resized(graph, node, mask)
            for node in self.program.nodes.values()
            if plan is not None and node.kind == "call"
        }
        extents = [graph.extents[name] for name in (plan.removed if plan else ())]
        self._skipped = frozenset().union(*(extent.nodes for extent in extents))
        self._aliases = {extent.result: extent.source for extent in extents}
        self._last_use = self._lifetimes()
        nodes = self.program.nodes.values()
        self._parameters = [node.name for node in nodes if node.kind == "parameter"]

    def run(
        self,
        model: nn.Module | Mapping[str, Tensor],
        inputs: Any,
        *,
        before: Visit | None = None,
        after: Visit | None = None,
        zeroed: Collection[str] = (),
        until: str | None = None,
        instead: Mapping[str, Instead] | None = None,
    ) -> Values:
        """Runs the program with the weights of `model` and returns the output values by name.

        Args:
            model: Module with the dense parameter names, or its tensors by name; weights are read
                when their operator runs, so `before` may change them in place.
            inputs: A tensor, tuple of arguments or dict of keyword arguments.
            before: Called before every operator with the values computed so far.
            after: Called after every operator, likewise.
            zeroed: Names of values that are replaced by zeros; what only they need does not run.
            until: Stop after the node of this name.
            instead: By node, what computes its value from the operator and its arguments.
        """
        tensors: Mapping[str, Tensor] = (
            {
                name: tensor.detach()
                for name, tensor in (
                    *model.named_parameters(remove_duplicate=False),
                    *model.named_buffers(remove_duplicate=False),
                )
            }
            if isinstance(model, nn.Module)
            else model
        )
        given = self._leaves(own_copy(inputs))
        device = device_of(itertools.chain(tensors.values(), given))
        leaves = iter(given)
        values: Values = {}
        batch: int | None = None
        needed = self._needed(zeroed) if zeroed else None
        with torch.no_grad():
            for node in self.program.nodes.values():
                if node.kind == "input":
                    values[node.name] = next(leaves)
                    if batch is None and has_rows(values[node.name]):
                        batch = len(values[node.name])
                elif node.kind == "parameter":
                    values[node.name] = tensors.get(node.target)
                elif node.kind == "constant":
                    values[node.name] = constant_on(node, device)
                elif node.name in self._skipped:
                    if node.name in self._aliases:
                        values[node.name] = values[self._aliases[node.name]]
                else:
                    if node.name in zeroed:
                        values[node.name] = self._zeros(node, values, batch or 1)
                        continue
                    if needed is not None and node.name not in needed:
                        continue
                    if before is not None:
                        before(node, values)
                    computed = None if instead is None else instead.get(node.name)
                    values[node.name] = self._call(node, values, batch or 1, device, computed)
                    if after is not None:
                        after(node, values)
                if node.name == until:
                    break
                for name in self._last_use.get(node.name, ()):
                    values.pop(name, None)
        return {name: values[name] for name in self.program.outputs if name in values}

    def ahead(
        self,
        names: Iterable[str],
        values: Values,
        batch: int,
        instead: Mapping[str, Instead] | None = None,
    ) -> Values:
        """Returns `values` with some nodes run before their turn; `values` stays as it is."""
        known = dict(values)
        device = self._device(values)
        for name in names:
            computed = None if instead is None else instead.get(name)
            known[name] = self._call(self.program.nodes[name], known, batch, device, computed)
        return known

    def _needed(self, zeroed: Collection[str]) -> set[str]:
        """Returns the values that the outputs depend on when some values are zeros."""
        needed: set[str] = set()
        waiting = list(self.program.outputs)
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                if name not in zeroed:
                    waiting += self.program.nodes[name].refs()
        return needed

    def _zeros(self, node: Node, values: Values, batch: int) -> Tensor:
        shape: Any = node.shape
        rows = self.program.batch
        like = next(v for v in values.values() if isinstance(v, Tensor) and v.is_floating_point())
        if rows != batch:
            shape = [size // rows * batch if size % rows == 0 else size for size in shape]
        return like.new_zeros(shape)

    def _leaves(self, inputs: Any) -> list[Any]:
        """Returns the inputs one by one, in the order of the program."""
        args, kwargs = as_call(inputs)
        names = self.program.keywords
        if set(kwargs) != set(names):
            raise ValueError(
                f"the network was traced with the keyword arguments {list(names)}, but got "
                f"inputs with {list(kwargs)}."
            )
        return torch.utils._pytree.tree_leaves((args, {name: kwargs[name] for name in names}))

    def _call(
        self,
        node: Node,
        values: Values,
        batch: int,
        device: torch.device,
        computed: Instead | None = None,
    ) -> Any:
        def scaled(size: int) -> int:
            return size // self.program.batch * batch

        return call(self._resized.get(node.name, node), values, scaled, device, computed)

    def _device(self, values: Values) -> torch.device:
        """Returns where the weights are; constants among the values may still be elsewhere."""
        weights = (values[name] for name in self._parameters if name in values)
        return device_of(itertools.chain(weights, values.values()))

    def _lifetimes(self) -> dict[str, list[str]]:
        """Returns, by node, the values that nobody reads after it."""
        last: dict[str, str] = {}
        for node in self.program.nodes.values():
            if node.name in self._aliases:
                last[self._aliases[node.name]] = node.name
            elif node.name in self._skipped:
                continue
            for name in node.refs():
                last[name] = node.name
        uses: dict[str, list[str]] = {}
        for name, user in last.items():
            if self.program.nodes[name].kind != "parameter" and name not in self.program.outputs:
                uses.setdefault(user, []).append(name)
        return uses

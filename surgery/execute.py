"""Runs a program node by node, dense or pruned, so that values inside can be seen and changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.program import BatchSize, Node, Program, Ref, as_call, resolve_target

Values = dict[str, Any]
Visit = Callable[[Node, Values], None]

_SIZED = {"view", "reshape", "_unsafe_view", "expand"}


class Execution:
    """One way to run a graph's program: dense, or with a plan.

    Args:
        graph: From `trace`.
        plan: The plan whose pruned weights will be run; None for the dense network.
    """

    def __init__(self, graph: PruningGraph, plan: PruningPlan | None = None) -> None:
        self.graph = graph
        self.program: Program = graph.program
        self._mask = graph.kept_mask(plan or PruningPlan())
        extents = [graph.extents[name] for name in (plan.removed if plan else ())]
        self._skipped = frozenset().union(*(extent.nodes for extent in extents))
        self._aliases = {extent.result: extent.source for extent in extents}
        self._last_use = self._lifetimes()

    def run(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        before: Visit | None = None,
        after: Visit | None = None,
        zeroed: Collection[str] = (),
        until: str | None = None,
    ) -> Values:
        """Runs the program with the weights of `model` and returns the output values by name.

        Args:
            model: Module with the dense parameter names; its weights are read when their
                operator runs, so `before` may change them in place.
            inputs: A tensor, tuple of arguments or dict of keyword arguments.
            before: Called before every operator with the values computed so far.
            after: Called after every operator, likewise.
            zeroed: Names of values that are replaced by zeros.
            until: Stop after the node of this name.
        """
        tensors = {
            name: tensor.detach()
            for name, tensor in (
                *model.named_parameters(remove_duplicate=False),
                *model.named_buffers(remove_duplicate=False),
            )
        }
        leaves = iter(self._leaves(inputs))
        values: Values = {}
        batch: int | None = None
        with torch.no_grad():
            for node in self.program.nodes.values():
                if node.kind == "input":
                    values[node.name] = next(leaves)
                    if batch is None and isinstance(values[node.name], Tensor):
                        batch = len(values[node.name])
                elif node.kind == "parameter":
                    values[node.name] = tensors.get(node.target)
                elif node.kind == "constant":
                    values[node.name] = node.value
                elif node.name in self._skipped:
                    if node.name in self._aliases:
                        values[node.name] = values[self._aliases[node.name]]
                else:
                    if before is not None:
                        before(node, values)
                    values[node.name] = self._call(node, values, batch or 1)
                    if node.name in zeroed:
                        values[node.name] = torch.zeros_like(values[node.name])
                    if after is not None:
                        after(node, values)
                if node.name == until:
                    break
                for name in self._last_use.get(node.name, ()):
                    values.pop(name, None)
        return {name: values[name] for name in self.program.outputs if name in values}

    def ahead(self, names: Iterable[str], values: Values, batch: int) -> Values:
        """Returns `values` with some nodes run before their turn; `values` stays as it is."""
        known = dict(values)
        for name in names:
            known[name] = self._call(self.program.nodes[name], known, batch)
        return known

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

    def _call(self, node: Node, values: Values, batch: int) -> Any:
        def resolve(value: Any) -> Any:
            if isinstance(value, Ref):
                return values[value.name]
            if isinstance(value, BatchSize):
                return value // self.program.batch * batch
            if isinstance(value, (tuple, list)):
                return type(value)(resolve(item) for item in value)
            return value

        args: list[Any] = [resolve(argument) for argument in node.args]
        kwargs = {key: resolve(value) for key, value in node.kwargs.items()}
        operator = node.target.split(".")[1] if node.target.startswith("aten.") else ""
        if operator in _SIZED:
            args[1] = self._sizes(node, args[1], 0, batch)
        elif operator == "unflatten":
            args[2] = self._sizes(node, args[2], args[1] % args[0].ndim, batch)
        elif operator in ("split", "split_with_sizes"):
            args[1] = self._parts(node, args[1], args[2] if len(args) > 2 else 0)
        elif operator.startswith("conv") and len(args) > 6 and args[6] > 1:
            args[6] = len(args[1]) * args[6] // self._dense_rows(node)
        elif operator in ("pad", "constant_pad_nd") and node.module in self.graph.pads:
            args[1] = self._padding(node, list(args[1]))
        return resolve_target(node.target)(*args, **kwargs)

    def _dense_rows(self, node: Node) -> int:
        return int(self.program.nodes[node.args[1].name].shape[0])  # type: ignore[index, arg-type]

    def _padding(self, node: Node, widths: list[int]) -> list[int]:
        dim, units = self.graph.pads[node.module]
        kept = self._mask[units]
        before, after = widths[2 * dim], widths[2 * dim + 1]
        widths[2 * dim] = int(kept[:before].sum())
        widths[2 * dim + 1] = int(kept[len(kept) - after :].sum())
        return widths

    def _sizes(self, node: Node, sizes: list[int], first: int, batch: int) -> list[int]:
        """Returns the sizes that the code would compute for the kept channels.

        Args:
            node: A view, reshape, expand or unflatten.
            sizes: Sizes in the code, for this batch.
            first: The dim of the result that the first size is for.
            batch: Number of examples.
        """
        layout = self.graph.layouts.get(node.name)
        if layout is None:
            return sizes
        written = node.args[2 if "unflatten" in node.target else 1]
        result = []
        for dim, size in enumerate(sizes, first):
            kept = self._kept_along(layout, dim)
            if kept is None or size < 0:
                result.append(size)
            elif isinstance(written[dim - first], BatchSize):  # channels merged with the batch
                result.append(kept // self.program.batch * batch)
            else:
                result.append(kept)
        return result

    def _parts(self, node: Node, size: int | list[int], dim: int) -> int | list[int]:
        """Returns the size or sizes of the equal parts of the kept channels."""
        layout = self.graph.layouts.get(node.name)
        kept = None if layout is None else self._kept_along(layout, dim)
        if kept is None:
            return size
        return kept if isinstance(size, int) else [kept] * len(size)

    def _kept_along(self, layout: Tensor, dim: int) -> int | None:
        if layout.shape[dim] == 1:
            return None
        others = [other for other in range(layout.ndim) if other != dim % layout.ndim]
        kept = self._mask[layout]
        return int((kept.amax(others) if others else kept).sum())

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

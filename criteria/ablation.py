"""Ablation: what the network returns without each unit and each block, one at a time.

A unit is masked by zeroing all its slices, a block is replaced by its input; both equal removing
it. Only the operators behind the first one that is touched run again, so that a structure costs
half a forward pass on average.

Batches of images pass one after the other, so that intermediate values take the memory of one.
What the network returns without each of up to 64 structures is kept until all have passed: 256 MiB
at most, or one structure's. The operators in front run once more for them and every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from paretoprune.criteria.shared import SharedCalibration
from paretoprune.criteria.similarity import CHANGES, Response
from paretoprune.criteria.units import LAYERS
from paretoprune.surgery import PrunableGroup, PruningGraph, PruningPlan
from paretoprune.surgery.execute import Execution, Values
from paretoprune.surgery.program import Node, Ref

_TOGETHER = 64  # structures
_BYTES = 2**28  # of what the network returns without these
_PASS = {"dropout", "flatten", "view", "reshape", "contiguous", "clone", "alias", "detach"}


@dataclass(frozen=True, slots=True)
class Changes:
    """How much each structure changes the network, by the measures in `similarity.CHANGES`.

    Attributes:
        units: By measure, by open group, shape (group.size,), float64.
        blocks: By measure, by block.
    """

    units: Mapping[str, Mapping[str, Tensor]]
    blocks: Mapping[str, Mapping[str, float]]


def changes(
    model: nn.Module, graph: PruningGraph, calibration: SharedCalibration, images: int
) -> Changes:
    """Returns the changes by all measures; criteria that share the calibration share them.

    Args:
        model: The dense network; left untouched.
        graph: Its graph.
        calibration: Training batches, shared.
        images: At most this many examples are used, of as many batches as that needs.

    Raises:
        ValueError: If there is no batch, or the network does not return one tensor per example.
    """

    def measure() -> Changes:
        return _measure(model, graph, calibration, images)

    return calibration.once(f"ablation {images}", model, graph, measure)


def penultimate(graph: PruningGraph) -> str:
    """Returns the name of the value that the network's last layer reads; else its output."""
    nodes = graph.program.nodes
    name = graph.program.outputs[0]
    while nodes[name].operator in _PASS and isinstance(nodes[name].args[0], Ref):
        name = nodes[name].args[0].name
    if nodes[name].operator in LAYERS and isinstance(nodes[name].args[0], Ref):
        return str(nodes[name].args[0].name)
    return name


def penultimate_features(
    model: nn.Module, graph: PruningGraph, inputs: Any, plan: PruningPlan | None = None
) -> Tensor:
    """Returns what a network's last layer reads, shape (examples, features).

    Args:
        model: The dense network, or the pruned one of a plan.
        graph: The dense network's graph.
        inputs: A tensor, tuple of arguments or dict of keyword arguments.
        plan: Of the pruned network.
    """
    name = penultimate(graph)
    found: list[Tensor] = []

    def before(node: Node, values: Values) -> None:
        if name in node.refs() and not found:
            found.append(values[name].flatten(1))

    outputs = Execution(graph, plan).run(model, inputs, before=before)
    return found[0] if found else outputs[graph.program.outputs[0]].flatten(1)


def _measure(
    model: nn.Module, graph: PruningGraph, calibration: SharedCalibration, images: int
) -> Changes:
    parts = _gathered(calibration, images)
    targets = torch.cat([targets for _, targets in parts])
    ablation = _Ablation(model, graph, [inputs for inputs, _ in parts])
    dense = ablation.dense()
    if len(graph.program.outputs) != 1 or dense.outputs.shape[:1] != targets.shape[:1]:
        raise ValueError(
            "criteria that compare outputs need a network that returns one tensor with a row per "
            f"example, but it returns {len(graph.program.outputs)} values."
        )
    units = {
        name: {g.name: torch.zeros(g.size, dtype=torch.float64) for g in graph.open_groups}
        for name in CHANGES
    }
    blocks: dict[str, dict[str, float]] = {name: {} for name in CHANGES}
    total = sum(group.size for group in graph.open_groups) + len(graph.extents)
    done = 0

    def visit(structure: str, unit: int | None, response: Response) -> None:
        for name, change in CHANGES.items():
            value = float(change(dense, response, targets))
            if unit is None:
                blocks[name][structure] = value
            else:
                units[name][structure][unit] = value
        nonlocal done
        done += 1
        calibration.progress(done, total)

    ablation.run(visit)
    return Changes(units, blocks)


def _gathered(calibration: SharedCalibration, images: int) -> list[tuple[Any, Tensor]]:
    """Returns batches of `images` examples together; a small rest goes with the batch before."""
    parts: list[tuple[Any, Tensor]] = []
    for batch in calibration:
        left = images - sum(len(targets) for _, targets in parts)
        parts.append(tree_map_only(Tensor, lambda leaf: leaf[:left], batch))  # noqa: B023
        if len(batch[1]) >= left:
            break
    if not parts:
        raise ValueError("the criterion needs calibration data, but got no batch.")
    if len(parts) > 1 and 2 * len(parts[-1][1]) < len(parts[-2][1]):
        parts[-2:] = [tree_map(_joined, *parts[-2:])]
    return parts


def _joined(*leaves: Any) -> Any:
    return torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]


Structure = tuple[str, int | None]
"""(group, unit) or (block, None)."""


class _Ablation:
    """Runs a network on batches of inputs without one structure at a time."""

    def __init__(self, model: nn.Module, graph: PruningGraph, parts: Sequence[Any]) -> None:
        self._model = model
        self._graph = graph
        self._parts = parts
        self._execution = Execution(graph)
        nodes = graph.program.nodes
        self._order = [node for node in nodes.values() if node.kind == "call"]
        self._watched = (penultimate(graph), graph.program.outputs[0])
        self._parameters = {
            node.target: node.name for node in nodes.values() if node.kind == "parameter"
        }
        self._constants = {n.name: n.value for n in nodes.values() if n.kind == "constant"}
        self._dense: list[dict[str, Tensor]] = []
        last: dict[str, int] = {}
        for index, node in enumerate(self._order):
            for name in node.refs():
                last[name] = index
        self._dead: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in self._watched:
                self._dead.setdefault(index, []).append(name)

    def dense(self) -> Response:
        """Returns what the whole network returns."""
        for inputs in self._parts:
            found: dict[str, Tensor] = {}

            def after(node: Node, values: Values, found: dict[str, Tensor] = found) -> None:
                for name in self._watched:
                    if name not in found and name in values:
                        found[name] = values[name].clone()

            self._execution.run(self._model, inputs, after=after)
            self._dense.append(found)
        return self._response(self._dense)

    def _response(self, parts: Sequence[Mapping[str, Tensor]]) -> Response:
        features, outputs = (torch.cat([part[name] for part in parts]) for name in self._watched)
        return Response(features.flatten(1).double(), outputs.double())

    def run(self, visit: Callable[[str, int | None, Response], None]) -> None:
        """Calls `visit` with (group, unit, response) and with (block, None, response)."""
        size = sum(v.numel() * v.element_size() for part in self._dense for v in part.values())
        few = max(1, min(_TOGETHER, _BYTES // size))
        for start, structures in self._starts().items():
            step = len(structures) if len(self._parts) == 1 else few
            for first in range(0, len(structures), step):
                self._run_some(start, structures[first : first + step], visit)

    def _starts(self) -> dict[str, list[Structure]]:
        """Returns all structures by the first operator that is touched, in their order."""
        starts: dict[str, list[Structure]] = {}
        for name, extent in self._graph.extents.items():
            start = next(node.name for node in self._order if node.name in extent.nodes)
            starts.setdefault(start, []).append((name, None))
        for group in self._graph.open_groups:
            touched = {
                self._parameters[i.parameter]
                for i in group.slices
                if i.parameter in self._parameters
            }
            first = next((n for n in self._order if touched & set(n.refs())), None)
            if first is not None:
                starts.setdefault(first.name, []).extend(
                    (group.name, u) for u in range(group.size)
                )
        return starts

    def _run_some(
        self,
        start: str,
        structures: Sequence[Structure],
        visit: Callable[[str, int | None, Response], None],
    ) -> None:
        """Visits structures that touch the operator `start` first."""
        place = next(index for index, node in enumerate(self._order) if node.name == start)
        kept: list[list[Mapping[str, Tensor]]] = [[] for _ in structures]
        for inputs, dense in zip(self._parts, self._dense, strict=True):
            leaves = tree_leaves(inputs)
            batch = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))

            def before(
                node: Node, values: Values, dense: Mapping[str, Tensor] = dense, batch: int = batch
            ) -> None:
                if node.name != start:
                    return
                for (name, unit), parts in zip(structures, kept, strict=True):
                    known, skipped = self._without(values, name, unit)
                    found = self._finish(known, self._rest(place, skipped), batch)
                    parts.append({n: found.get(n, dense[n]) for n in self._watched})
                    if len(parts) == len(self._parts):
                        visit(name, unit, self._response(parts))
                        parts.clear()

            self._execution.run(self._model, inputs, before=before, until=start)

    def _without(
        self, values: Values, name: str, unit: int | None
    ) -> tuple[Values, frozenset[str]]:
        """Returns values that lack a structure, and the operators that do not run then."""
        if unit is not None:
            return self._masked(values, self._graph.groups[name], unit), frozenset()
        extent = self._graph.extents[name]
        return {**values, extent.result: values[extent.source]}, extent.nodes

    def _rest(self, start: int, skipped: frozenset[str]) -> list[tuple[Node, Sequence[str]]]:
        return [
            (node, self._dead.get(index, ()))
            for index, node in enumerate(self._order[start:], start)
            if node.name not in skipped
        ]

    def _masked(self, values: Values, group: PrunableGroup, unit: int) -> Values:
        known = dict(values)
        for item in group.slices:
            name = self._parameters.get(item.parameter)
            if name is not None and known.get(name) is not None:
                index = torch.tensor(item.indices[unit], device=known[name].device)
                known[name] = known[name].index_fill(item.axis, index, 0)
        return known

    def _finish(
        self, values: Values, rest: list[tuple[Node, Sequence[str]]], batch: int
    ) -> Values:
        known = {**self._constants, **values}
        for node, dead in rest:
            overwritten = node.args[0] if node.in_place else None
            if isinstance(overwritten, Ref):  # other ablations still need what is overwritten
                known[overwritten.name] = known[overwritten.name].clone()
            known = self._execution.ahead([node.name], known, batch)
            for name in dead:
                known.pop(name, None)
        return known

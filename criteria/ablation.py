"""Ablation: what the network returns without each unit and each block, one at a time.

A unit is masked by zeroing all its slices, a block is replaced by its input; both equal removing
it. Only the operators behind the first one that is touched run again, so that a structure costs
half a forward pass on average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.criteria.shared import SharedCalibration
from paretoprune.criteria.similarity import CHANGES, Response
from paretoprune.criteria.units import LAYERS
from paretoprune.surgery import PrunableGroup, PruningGraph, PruningPlan
from paretoprune.surgery.execute import Execution, Values
from paretoprune.surgery.program import Node, Ref

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
        images: At most this many examples are used, as one batch.

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
    inputs, targets = _gathered(calibration, images)
    ablation = _Ablation(model, graph)
    dense = ablation.dense(inputs)
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

    ablation.run(inputs, visit)
    return Changes(units, blocks)


def _gathered(calibration: SharedCalibration, images: int) -> tuple[Any, Tensor]:
    parts: list[tuple[Any, Tensor]] = []
    count = 0
    for inputs, targets in calibration:
        parts.append((inputs, targets))
        count += len(targets)
        if count >= images:
            break
    if not parts:
        raise ValueError("the criterion needs calibration data, but got no batch.")
    joined = torch.utils._pytree.tree_map(
        lambda *leaves: torch.cat(leaves)[:images] if isinstance(leaves[0], Tensor) else leaves[0],
        *parts,
    )
    return joined[0], joined[1]


class _Ablation:
    def __init__(self, model: nn.Module, graph: PruningGraph) -> None:
        self._model = model
        self._graph = graph
        self._execution = Execution(graph)
        nodes = graph.program.nodes
        self._order = [node for node in nodes.values() if node.kind == "call"]
        self._watched = (penultimate(graph), graph.program.outputs[0])
        self._parameters = {
            node.target: node.name for node in nodes.values() if node.kind == "parameter"
        }
        self._constants = {n.name: n.value for n in nodes.values() if n.kind == "constant"}
        self._dense: dict[str, Tensor] = {}
        last: dict[str, int] = {}
        for index, node in enumerate(self._order):
            for name in node.refs():
                last[name] = index
        self._dead: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in self._watched:
                self._dead.setdefault(index, []).append(name)

    def dense(self, inputs: Any) -> Response:
        """Returns what the whole network returns."""

        def after(node: Node, values: Values) -> None:
            for name in self._watched:
                if name not in self._dense and name in values:
                    self._dense[name] = values[name].clone()

        self._execution.run(self._model, inputs, after=after)
        return self._response({})

    def _response(self, values: Mapping[str, Any]) -> Response:
        features, outputs = (values.get(name, self._dense.get(name)) for name in self._watched)
        assert isinstance(features, Tensor)
        assert isinstance(outputs, Tensor)
        return Response(features.flatten(1).double(), outputs.double())

    def run(self, inputs: Any, visit: Callable[[str, int | None, Response], None]) -> None:
        """Calls `visit` with (group, unit, response) and with (block, None, response)."""
        starts: dict[str, list[PrunableGroup]] = {}
        for group in self._graph.open_groups:
            touched = {
                self._parameters[i.parameter]
                for i in group.slices
                if i.parameter in self._parameters
            }
            first = next((n for n in self._order if touched & set(n.refs())), None)
            if first is not None:
                starts.setdefault(first.name, []).append(group)
        blocks: dict[str, list[str]] = {}
        for name, extent in self._graph.extents.items():
            start = next(node.name for node in self._order if node.name in extent.nodes)
            blocks.setdefault(start, []).append(name)
        places = {node.name: index for index, node in enumerate(self._order)}
        leaves = torch.utils._pytree.tree_leaves(inputs)
        batch = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))

        def before(node: Node, values: Values) -> None:
            for block in blocks.get(node.name, ()):
                extent = self._graph.extents[block]
                known = dict(values)
                known[extent.result] = values[extent.source]
                rest = self._rest(places[node.name], extent.nodes)
                visit(block, None, self._finish(known, rest, batch))
            for group in starts.get(node.name, ()):
                rest = self._rest(places[node.name], frozenset())
                for unit in range(group.size):
                    known = self._masked(values, group, unit)
                    visit(group.name, unit, self._finish(known, rest, batch))

        self._execution.run(self._model, inputs, before=before)

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
    ) -> Response:
        known = {**self._constants, **values}
        for node, dead in rest:
            overwritten = node.args[0] if node.in_place else None
            if isinstance(overwritten, Ref):  # other ablations still need what is overwritten
                known[overwritten.name] = known[overwritten.name].clone()
            known = self._execution.ahead([node.name], known, batch)
            for name in dead:
                known.pop(name, None)
        return self._response(known)

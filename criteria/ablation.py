"""Ablation: what the network returns without each unit and each block, one at a time.

A unit is masked by zeroing all its slices, a block is replaced by its input; both equal removing
it. Only the operators behind the first one that is touched run again, so that a structure costs
half a forward pass on average.

Batches of images pass one after the other, so that intermediate values take the memory of one.
What the network returns without each of up to 64 structures is kept until all have passed: 256 MiB
at most, or one structure's. The operators in front run once more for them and every batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from paretoprune.criteria.shared import SharedCalibration
from paretoprune.criteria.similarity import CHANGES, Response
from paretoprune.criteria.units import LAYERS
from paretoprune.surgery import PrunableGroup, PruningGraph, PruningPlan
from paretoprune.surgery.execute import Execution, Values
from paretoprune.surgery.inputs import count_rows, has_rows, join_rows, some_rows
from paretoprune.surgery.program import Node, Ref

_TOGETHER = 64  # structures
_BYTES = 2**28  # of what the network returns without these
_PASS = {
    "dropout", "flatten", "squeeze", "view", "reshape", "contiguous", "clone", "alias", "detach",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Changes:
    """How much each structure changes the network, by one measure.

    Attributes:
        units: By open group, shape (group.size,), float64.
        blocks: By block.
    """

    units: Mapping[str, Tensor]
    blocks: Mapping[str, float]


def changes(
    model: nn.Module,
    graph: PruningGraph,
    calibration: SharedCalibration,
    images: int,
    measures: Iterable[str],
) -> dict[str, Changes]:
    """Returns the changes by each of some measures.

    Criteria that share the calibration share the measures. Only those that nobody asked for before
    are measured, all in one pass, since some cost far more than the network itself.

    Args:
        model: The dense network; left untouched.
        graph: Its graph.
        calibration: Training batches, shared.
        images: At most this many examples are used, of as many batches as that needs.
        measures: Names in `similarity.CHANGES`.

    Raises:
        ValueError: If there is no batch, or the network does not return one tensor per example.
    """
    known: dict[str, Changes] = calibration.once(f"ablation {images}", model, graph, dict)
    wanted = tuple(measures)
    missing = [name for name in wanted if name not in known]
    if missing:
        known.update(_measure(model, graph, calibration, images, missing))
    return {name: known[name] for name in wanted}


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
        if name in node.refs():  # the last of them: others may write it through a view
            found[:] = [values[name].flatten(1)]

    outputs = Execution(graph, plan).run(model, inputs, before=before)
    return found[0] if found else outputs[graph.program.outputs[0]].flatten(1)


def _measure(
    model: nn.Module,
    graph: PruningGraph,
    calibration: SharedCalibration,
    images: int,
    measures: Sequence[str],
) -> dict[str, Changes]:
    parts = _gathered(calibration, images)
    targets = join_rows(*(targets for _, targets in parts))
    ablation = _Ablation(model, graph, [inputs for inputs, _ in parts])
    dense = ablation.dense()
    returned = len(set(graph.program.outputs))
    if returned != 1 or len(dense.outputs) != count_rows(targets):
        raise ValueError(
            "criteria that compare outputs need a network that returns one tensor with a row per "
            f"example, but it returns {returned} values."
        )
    units = {
        name: {g.name: torch.zeros(g.size, dtype=torch.float64) for g in graph.open_groups}
        for name in measures
    }
    blocks: dict[str, dict[str, float]] = {name: {} for name in measures}
    total = sum(group.size for group in graph.open_groups) + len(graph.extents)
    done = 0

    def visit(structure: str, unit: int | None, response: Response) -> None:
        for name in measures:
            value = float(CHANGES[name](dense, response, targets))
            if unit is None:
                blocks[name][structure] = value
            else:
                units[name][structure][unit] = value
        nonlocal done
        done += 1
        calibration.progress(done, total)

    ablation.run(visit)
    return {name: Changes(units[name], blocks[name]) for name in measures}


def _gathered(calibration: SharedCalibration, images: int) -> list[tuple[Any, Any]]:
    """Returns batches of `images` examples together; a small rest goes with the batch before."""
    parts: list[tuple[Any, Any]] = []
    for batch in calibration:
        left = images - sum(map(count_rows, parts))
        parts.append(some_rows(batch, 0, left))
        if count_rows(batch) >= left:
            break
    if not parts:
        raise ValueError("the criterion needs calibration data, but got no batch.")
    if len(parts) > 1 and 2 * count_rows(parts[-1]) < count_rows(parts[-2]):
        parts[-2:] = [join_rows(*parts[-2:])]
    return parts


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
        overwritten = {n.args[0].name for n in self._order if n.in_place and _is_ref(n)}
        self._unwritten = set(self._parameters.values()) - overwritten
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
                found.update({name: values[name] for name in self._watched if name in values})

            self._execution.run(self._model, inputs, after=after)
            self._dense.append({name: value.clone() for name, value in found.items()})
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
            batch = next(len(leaf) for leaf in leaves if has_rows(leaf))

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
        extent = self._graph.extents[name]  # the result may be overwritten where the source is not
        return {**values, extent.result: values[extent.source].clone()}, extent.nodes

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
            if (item.parameter, item.axis) in self._graph.divisors:
                continue  # zero over zero is no number
            if name is not None and known.get(name) is not None:
                index = torch.tensor(item.indices[unit], device=known[name].device)
                known[name] = known[name].index_fill(item.axis, index, 0)
        return known

    def _finish(
        self, values: Values, rest: list[tuple[Node, Sequence[str]]], batch: int
    ) -> Values:
        known = {**self._constants, **values}
        if any(node.in_place for node, _ in rest):  # other ablations still need what is there
            known = self._copied(known)
        for node, dead in rest:
            known = self._execution.ahead([node.name], known, batch)
            for name in dead:
                known.pop(name, None)
        return known

    def _copied(self, values: Values) -> Values:
        """Returns values that may be overwritten; what is a view of another one stays its view."""
        own = {name: value for name, value in values.items() if name not in self._unwritten}
        return {**values, **copy.deepcopy(own)}


def _is_ref(node: Node) -> bool:
    return bool(node.args) and isinstance(node.args[0], Ref)

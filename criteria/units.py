"""Vectors over all units of a graph: from lines along parameter axes, and back to groups.

Legend: n is the number of all units of all groups, frozen ones included, in the order of
`graph.groups`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paretoprune.surgery import PruningGraph
from paretoprune.surgery.program import Instead, Node, Ref

_TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
LAYERS = {*CONVOLUTIONS, "linear", *_TRANSPOSED}
"""Operators whose weight is their second argument, and their bias the third."""
_PRODUCTS = {"matmul", "mm", "bmm"}
_NORMS = {"batch_norm": 1, "layer_norm": 2, "group_norm": 2}  # where the scale is


@dataclass(frozen=True, slots=True)
class Tap:
    """An operator that is linear in its own weights, which make some units.

    Attributes:
        node: Name of its node.
        weights: Names of its weights.
        axis: The dim of its output along which the units lie.
        units: The unit at each position of that dim, -1 where it always stays; shape (channels,).
        examples: The dim of its output along which examples, or windows of them, lie.
    """

    node: str
    weights: tuple[str, ...]
    axis: int
    units: Tensor
    examples: int = 0


class Units:
    """Where the units of a graph lie.

    Args:
        graph: From `surgery.trace`.

    Attributes:
        count: n.
        open: Whether a unit may be pruned, shape (n,).
        filters: Of every convolution and linear layer, the weight and the bias that make units,
            with the axis along which the units lie.
        owned: `filters`, and every other parameter on the way of the units, such as the scale and
            shift of a norm. A weight that only reads units is not among them, so that every
            weight belongs to one unit at most.
        taps: The operators that make units out of `owned` weights, all of whose uses are such.
    """

    def __init__(self, graph: PruningGraph) -> None:
        self._graph = graph
        self.count = sum(group.size for group in graph.groups.values())
        self.open = torch.cat(
            [torch.full((group.size,), group.frozen is None) for group in graph.groups.values()]
            or [torch.zeros(0, dtype=torch.bool)]
        )
        self.filters: dict[str, int] = {}
        self.owned: dict[str, int] = {}
        self.taps: list[Tap] = []
        reading: set[tuple[str, int]] = set()
        for node in graph.program.nodes.values():
            if node.operator in LAYERS:
                made, read = (1, 0) if node.operator in _TRANSPOSED else (0, 1)
                weight, bias = self._parameter(node, 1), self._parameter(node, 2)
                if weight is not None:
                    reading.add((weight, read))
                    if (weight, made) in graph.units:
                        self.filters[weight] = made
                        axis = -1 if node.operator == "linear" else 1
                        self._tap(node, axis, (weight, made))
                if bias is not None and (bias, 0) in graph.units:
                    self.filters[bias] = 0
            elif node.operator in _PRODUCTS and (factor := self._parameter(node, 1)) is not None:
                shape = graph.program.nodes[node.args[1].name].shape
                reading.add((factor, len(shape or ()) - 2))
            elif node.operator in _NORMS:
                scale = self._parameter(node, _NORMS[node.operator])
                if scale is not None and (scale, 0) in graph.units:
                    self._tap(node, -1 if node.operator == "layer_norm" else 1, (scale, 0))
        self._drop_shared_taps()
        self.owned.update(self.filters)
        for name, axis in graph.units:
            if (name, axis) not in reading:
                self.owned.setdefault(name, axis)

    def _parameter(self, node: Node, position: int) -> str | None:
        ref = node.args[position] if len(node.args) > position else None
        if not isinstance(ref, Ref):
            return None
        source = self._graph.program.nodes[ref.name]
        return source.target if source.kind == "parameter" else None

    def _tap(self, node: Node, axis: int, place: tuple[str, int]) -> None:
        first = _NORMS.get(node.operator, 1)
        weights = (self._parameter(node, at) for at in (first, first + 1))
        names = tuple(name for name in weights if name is not None)
        batch = self._graph.program.batch
        sizes = [size for size in node.shape or () if isinstance(size, int)]
        examples = next((dim for dim, size in enumerate(sizes) if size % batch == 0), 0)
        self.taps.append(Tap(node.name, names, axis, self._graph.units[place], examples))

    def _drop_shared_taps(self) -> None:
        """Leaves out taps of weights that something else uses, too."""
        users = self._graph.program.users()
        tapped = {tap.node for tap in self.taps}
        shared = {
            node.target
            for node in self._graph.program.nodes.values()
            if node.kind == "parameter" and not tapped.issuperset(u.name for u in users[node.name])
        }
        self.taps = [tap for tap in self.taps if shared.isdisjoint(tap.weights)]

    def gated(self, value: Tensor, tap: Tap, gates: Tensor) -> Tensor:
        """Returns what a tap puts out, times a factor per unit.

        A layer or a norm is linear in its own weights, so this is the same as the factor on all
        weights of the unit.

        Args:
            value: The tap's output.
            tap: The tap.
            gates: Shape (1 or examples, n + 1), the last of them for what always stays.
        """
        own = gates[:, tap.units.remainder(self.count + 1).to(gates.device)]
        if len(own) > 1:  # windows of one example follow each other
            own = own.repeat_interleave(value.shape[tap.examples] // len(own), 0)
        shape = [1] * value.ndim
        shape[tap.examples], shape[tap.axis] = own.shape
        return value * own.reshape(shape)

    def gated_norm(self, norm: Tap, layer: Tap | None, gates: Tensor) -> Instead:
        """Returns what computes a BatchNorm in eval mode, times the factors of its units.

        With fixed statistics it is a factor and a shift per channel, into which the gates of the
        norm, and of the layer before it, go: one pass over the values, which is differentiated
        twice several times as fast as the norm's own operator and two products.

        Args:
            norm: The tap of the norm.
            layer: The tap that puts out what the norm reads, ungated; None where there is none.
            gates: Shape (1, n + 1).
        """

        def line(tap: Tap) -> Tensor:
            return gates[0, tap.units.remainder(self.count + 1).to(gates.device)]

        def compute(_operator: Any, args: list[Any], _kwargs: dict[str, Any]) -> Tensor:
            value, weight, bias, mean, var, _, _, eps = args[:8]
            factor = weight * (var + eps).rsqrt()
            shift = -mean * factor if bias is None else bias - mean * factor
            own, shape = line(norm), (-1, *[1] * (value.ndim - 2))
            scale = factor * own if layer is None else factor * own * line(layer)
            return torch.addcmul((shift * own).reshape(shape), value, scale.reshape(shape))

        return compute

    def places(self, names: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
        """Yields every (parameter, axis) along which units lie, of the parameters in `names`."""
        for name, axis in self._graph.units:
            if name in names:
                yield name, axis

    def at(self, name: str, axis: int, device: torch.device) -> Tensor:
        """Returns the unit at each position of an axis, n where the position always stays."""
        return self._graph.units[name, axis].remainder(self.count + 1).to(device)

    def summed(self, values: Tensor, name: str, axis: int) -> Tensor:
        """Returns, per unit, the float64 sum of elementwise values of a parameter, shape (n,).

        Args:
            values: In the parameter's shape.
            name: Of the parameter.
            axis: Along which the units lie.
        """
        others = [dim for dim in range(values.ndim) if dim != axis]
        line = (values.sum(others) if others else values).double()
        total = line.new_zeros(self.count + 1)
        return total.index_add(0, self.at(name, axis, line.device), line)[:-1]

    def spread(self, vector: Tensor, name: str, axis: int, rank: int) -> Tensor:
        """Returns a value per unit along an axis of a parameter of `rank` dims, else 0.

        Args:
            vector: Shape (n,).
            name: Of the parameter.
            axis: Along which the units lie.
            rank: Number of the parameter's dims; the result broadcasts to its shape.
        """
        padded = torch.cat([vector, vector.new_zeros(1)])
        shape = [1] * rank
        shape[axis] = -1
        return padded[self.at(name, axis, vector.device)].reshape(shape)

    def by_group(self, vector: Tensor) -> dict[str, Tensor]:
        """Returns the parts of a vector of shape (n,) by open group, float32, on the CPU."""
        groups = self._graph.groups.values()
        parts = vector.detach().float().cpu().split([group.size for group in groups])
        return {
            group.name: part.clone()
            for group, part in zip(groups, parts, strict=True)
            if group.frozen is None
        }

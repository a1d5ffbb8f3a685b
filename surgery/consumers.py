"""The layers that read channels, most of which reconstruction refits, and what surrounds them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.least_squares import Geometry
from paretoprune.surgery.program import Node, Program, Ref

_LAYERS = {"conv1d": 1, "conv2d": 2, "conv3d": 3, "linear": 0}
_PASS = {"dropout", "contiguous", "clone", "alias", "detach"}


@dataclass(frozen=True)
class Norm:
    """A BatchNorm right after a layer: names of its tensors, and its epsilon."""

    scale: str | None
    shift: str | None
    mean: str
    variance: str
    epsilon: float


@dataclass(frozen=True)
class Consumer:
    """A convolution or linear layer that reads channels.

    Attributes:
        node: Name of its node.
        source: Name of the value that it reads.
        weight: Name of its weight.
        bias: Name of its bias, if it is a parameter of its own.
        offset: Name of the value that it adds as bias, if that is anything else.
        geometry: How it reads its input.
        fixed: Whether its weight is a buffer (a blur, a Sobel filter), which is not refitted.
        norm: The BatchNorm that alone reads its output, if any.
        stream: Name of the sum that its output (after the norm) is added into, if any.
        shortcut: Name of the other summand.
        ahead: Names of the nodes that must run to know the shortcut before the layer runs.
    """

    node: str
    source: str
    weight: str
    bias: str | None
    offset: str | None
    geometry: Geometry
    fixed: bool
    norm: Norm | None = None
    stream: str | None = None
    shortcut: str | None = None
    ahead: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """Name of the dense value that the layer should reproduce."""
        return self.stream or self.node


def find_consumers(graph: PruningGraph) -> dict[str, Consumer]:
    """Returns the layers with weights of their own, by node name in execution order.

    A layer whose weight is used twice is left out: two sites cannot be fitted one after another.
    So is a convolution padded to the same size with an even kernel, whose sides differ.
    """
    program = graph.program
    users = program.users()
    order = {name: index for index, name in enumerate(program.nodes)}
    uses = Counter(
        program.nodes[ref].target
        for node in program.nodes.values()
        for ref in node.refs()
        if program.nodes[ref].kind == "parameter"
    )

    def parameter(ref: Any, *, once: bool = True) -> str | None:
        if not isinstance(ref, Ref) or program.nodes[ref.name].kind != "parameter":
            return None
        name = program.nodes[ref.name].target
        return name if not once or uses[name] == 1 else None

    def only_user(name: str) -> Node | None:
        while len(users[name]) == 1 and name not in program.outputs:
            user = users[name][0]
            if user.operator not in _PASS:
                return user
            name = user.name
        return None

    consumers = {}
    for node in program.nodes.values():
        weight = parameter(node.args[1]) if node.operator in _LAYERS else None
        if weight is None or not isinstance(node.args[0], Ref):
            continue
        if program.nodes[node.args[0].name].kind == "parameter":
            continue
        added = node.args[2] if len(node.args) > 2 else None
        bias = parameter(added)
        offset = added.name if bias is None and isinstance(added, Ref) else None
        geometry = _geometry(node, program.nodes[node.args[1].name].shape)
        if geometry is None:
            continue
        after = only_user(node.name)
        norm = None
        if after is not None and after.operator == "batch_norm" and not after.args[5]:
            names = [parameter(ref) for ref in after.args[1:5]]
            if names[2] is not None and names[3] is not None:
                norm = Norm(names[0], names[1], names[2], names[3], float(after.args[7]))
                after = only_user(after.name)
            else:
                after = None
        stream, shortcut, ahead = _addition(after, node, order, program)
        consumers[node.name] = Consumer(
            node.name,
            node.args[0].name,
            weight,
            bias,
            offset,
            geometry,
            program.nodes[node.args[1].name].is_buffer,
            norm,
            stream,
            shortcut,
            ahead,
        )
    return consumers


def _addition(
    after: Node | None, node: Node, order: dict[str, int], program: Program
) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Returns the sum, its other summand, and what must run ahead to know that summand.

    A summand that is repeated along some dim has other positions than the layer's output.
    The other summand may come later in the program, as long as it needs neither this layer nor
    any other layer's weights (a padded shortcut); else the sum is left to that other layer.
    """
    none = (None, None, ())
    if after is None or after.operator != "add" or after.kwargs or len(after.args) != 2:
        return none
    if after.shape != node.shape or not all(isinstance(ref, Ref) for ref in after.args):
        return none
    for ref in after.args:
        other = program.nodes[ref.name]
        ahead = _ahead(ref.name, node, order, program)
        if ahead is not None and other.kind != "parameter" and other.shape == node.shape:
            return after.name, ref.name, ahead
    return none


def _ahead(
    name: str, node: Node, order: dict[str, int], program: Program
) -> tuple[str, ...] | None:
    """Returns the nodes after `node` that make a value without weights, or None."""
    if order[name] < order[node.name]:
        return ()
    maker = program.nodes[name]
    if name == node.name or maker.kind != "call" or maker.in_place:
        return None
    steps: list[str] = []
    for ref in maker.refs():
        before = _ahead(ref, node, order, program)
        if before is None or program.nodes[ref].kind == "parameter":
            return None
        steps += before
    return tuple(dict.fromkeys([*steps, name]))


def _geometry(node: Node, weight: Any) -> Geometry | None:
    """Returns how a layer reads its input, or None if its padding differs between two sides."""
    rank = _LAYERS[node.operator]
    if rank == 0:
        return Geometry((), (), (), (), 1)

    def argument(position: int, default: int) -> tuple[int, ...]:
        value = node.args[position] if len(node.args) > position else default
        if value == "valid":
            return (0,) * rank
        if value == "same":
            return tuple(width // 2 for width in reach)
        sizes = (value,) if isinstance(value, int) else tuple(value)
        return sizes * rank if len(sizes) == 1 else sizes

    reach = [d * (k - 1) for d, k in zip(argument(5, 1), weight[2:], strict=True)]
    if len(node.args) > 4 and node.args[4] == "same" and any(width % 2 for width in reach):
        return None
    groups = int(node.args[6]) if len(node.args) > 6 else 1
    return Geometry(tuple(weight[2:]), argument(3, 1), argument(4, 0), argument(5, 1), groups)

"""Rules of recurrent layers: a hidden unit is one in all gates, layers and directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paretoprune.surgery.labels import Labels
from paretoprune.surgery.program import FILLS, Node, Ref
from paretoprune.surgery.rules.base import Result, out, outs

if TYPE_CHECKING:
    from paretoprune.surgery.tracer import Tracer

_GATES = {"gru": 3, "lstm": 4}


def recurrent(tracer: Tracer, node: Node) -> Result:
    """gru, lstm, rnn_tanh, rnn_relu: layers, perhaps in two directions, over a sequence."""
    parameters, _, layers = node.args[2:5]
    shapes = outs(node)
    directions = 2 if node.args[7] else 1
    names = [tracer.parameter(ref) for ref in parameters]
    source = tracer.labels(node.args[0]) if isinstance(node.args[2], (list, tuple)) else None
    channels = None if source is None else source.line(-1)
    if channels is None or None in names:  # a packed sequence, or weights made by other operators
        for ref in node.refs():
            tracer.freeze(tracer.labels(ref), f"feeds {node.operator} in another form")
        tracer.counted(node)
        return tuple(Labels.none(shape) for shape in shapes)
    width = len(parameters) // (layers * directions)
    gates = _GATES.get(node.operator, 1)
    projected = width % 2 == 1
    units = tracer.unions.fresh(tracer.shape(parameters[1])[0] // gates)
    made = tracer.unions.fresh(shapes[0][-1] // directions) if projected else units
    if projected:  # torch tells a projection by its being narrower
        tracer.unions.freeze(units, "are projected to fewer, which must stay fewer")
    steps = math.prod(shapes[0][:-1])
    for number in range(layers * directions):
        some = [str(name) for name in names[number * width : (number + 1) * width]]
        if number == directions:
            channels = torch.cat([made] * directions)
        _cell(tracer, node, some, channels, units.repeat(gates), made, steps)
        if projected:
            tracer.record(some[-1], 0, made, makes=True)
            tracer.record(some[-1], 1, units)
            tracer.macs(node, steps, made, units)
    states = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    for state, line in zip(states, (made, units), strict=False):
        _begin(tracer, state, line)
    lines = [torch.cat([made] * directions), made, units]
    return tuple(
        Labels.along(len(shape) - 1, line, shape)
        for shape, line in zip(shapes, lines, strict=False)
    )


def cell(tracer: Tracer, node: Node) -> Result:
    """gru_cell, lstm_cell, rnn_tanh_cell, rnn_relu_cell: one step."""
    names = [tracer.parameter(ref) for ref in node.args[2:] if isinstance(ref, Ref)]
    channels = tracer.labels(node.args[0]).line(-1)
    shapes = outs(node) if node.operator == "lstm_cell" else (out(node),)
    if channels is None or None in names:
        for ref in node.refs():
            tracer.freeze(tracer.labels(ref), f"feeds {node.operator} in another form")
        tracer.counted(node)
        return (
            tuple(Labels.none(shape) for shape in shapes) if shapes[1:] else Labels.none(*shapes)
        )
    gates = _GATES.get(node.operator.removesuffix("_cell"), 1)
    units = tracer.unions.fresh(shapes[0][-1])
    steps = math.prod(shapes[0][:-1])
    _cell(tracer, node, list(map(str, names)), channels, units.repeat(gates), units, steps)
    states = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    for state in states:
        _begin(tracer, state, units)
    results = tuple(Labels.along(len(shape) - 1, units, shape) for shape in shapes)
    return results if shapes[1:] else results[0]


def _cell(
    tracer: Tracer,
    node: Node,
    names: Sequence[str],
    channels: Tensor,
    gates: Tensor,
    made: Tensor,
    steps: int,
) -> None:
    """Records the channels of one layer in one direction, and what they cost.

    Args:
        tracer: Where they are recorded.
        node: The operator.
        names: The weights that read inputs and states, then biases.
        channels: Labels of its inputs.
        gates: Labels of its units, once for each gate.
        made: Labels of its outputs.
        steps: Positions in all sequences of the batch.
    """
    for name, line in zip(names, (channels, made), strict=False):
        tracer.record(name, 0, gates, makes=True)
        tracer.record(name, 1, line)
        tracer.macs(node, steps, gates, line)
    for name in names[2:4] if len(names) > 3 else ():
        tracer.record(name, 0, gates)


def _begin(tracer: Tracer, state: Any, line: Tensor) -> None:
    """Notes that a state has the units of a layer: one of zeros is as long as they are."""
    labels = tracer.labels(state)
    begun = Labels.along(len(labels.shape) - 1, line, labels.shape)
    node = tracer.program.nodes[state.name]
    if not labels.present and node.operator in FILLS:
        tracer.values[state.name] = begun
        tracer.number(node, len(line), begun, -1)
    else:
        tracer.unions.unify(labels.ids, begun.ids, "meets fixed channels in a recurrent layer")

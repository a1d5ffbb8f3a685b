"""Rules of convolutions and embeddings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from paretoprune.surgery.labels import Labels
from paretoprune.surgery.program import Node
from paretoprune.surgery.rules.base import Result, argument, out
from paretoprune.surgery.weight_axes import whole_weight

if TYPE_CHECKING:
    from paretoprune.surgery.tracer import Tracer


def convolution(tracer: Tracer, node: Node, *, transposed: bool = False) -> Result:
    """conv1d/2d/3d and their transposes; whole groups of a grouped convolution are one unit."""
    source = tracer.labels(node.args[0])
    weight = whole_weight(tracer, node.args[1])
    groups = int(argument(node, 6, "groups", 1))
    shape = out(node)
    weight_shape = tracer.shape(node.args[1])
    channel_dim = len(shape) - (len(weight_shape) - 1)
    if channel_dim in source.varying:  # features that were viewed as images: channels of them go
        elsewhere = [dim for dim in source.varying if dim != channel_dim]
        source = tracer.narrowed(source, elsewhere)
    channels = source.line(channel_dim)
    if weight is None or channels is None:
        computed = (
            "whose weight is computed in the code" if weight is None else "along another dim"
        )
        for ref in node.args[:2]:
            tracer.freeze(tracer.labels(ref), f"feeds a convolution {computed}")
        tracer.counted(node)
        return Labels.none(shape)
    made = tracer.unions.fresh(shape[channel_dim])
    spatial = tracer.shape(node.args[0]) if transposed else shape
    positions = math.prod(spatial) // spatial[channel_dim] * math.prod(weight_shape[2:])
    if groups == 1:
        tracer.record(weight, 0 if transposed else 1, channels)
        tracer.record(weight, 1 if transposed else 0, made, makes=True)
        tracer.macs(node, positions, made, channels)
    else:
        inside = channels.reshape(groups, -1)
        outside = made.reshape(groups, -1)
        for ids in (inside, outside):
            tracer.unions.unify(ids, outside[:, :1], "shares a convolution group with fixed ones")
        tracer.number(node, groups, Labels.along(0, outside[:, 0], (groups,)), 0)
        read, written = (outside, channels) if transposed else (inside, made)
        tracer.record(weight, 0, written, makes=True)
        tracer.macs(node, positions * read.shape[1], written)
    bias = tracer.parameter(argument(node, 2, "bias"))
    if bias is not None:
        tracer.record(bias, 0, made)
    return Labels.along(channel_dim, made, shape)


def transposed_convolution(tracer: Tracer, node: Node) -> Result:
    """conv_transpose1d/2d/3d: the weight's first axis reads, its second makes channels."""
    return convolution(tracer, node, transposed=True)


def embedding(tracer: Tracer, node: Node) -> Result:
    """embedding: the table's columns are channels, its rows stay."""
    shape = out(node)
    table = tracer.parameter(node.args[0])
    if table is None:
        tracer.freeze(tracer.labels(node.args[0]), "feeds an embedding after other operators")
        return Labels.none(shape)
    made = tracer.unions.fresh(shape[-1])
    tracer.record(table, 1, made, makes=True)
    return Labels.along(len(shape) - 1, made, shape)

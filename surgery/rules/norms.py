"""Rules of normalisations: which channels share statistics.

A norm over the pruned dim itself (layer norm, RMS norm) computes other statistics once channels
go: the tracer is told, the group says so, and the self-check compares with statistics over the
channels that stay. Group norm loses whole groups, whose statistics nobody else uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paretoprune.surgery.labels import Labels
from paretoprune.surgery.program import Node
from paretoprune.surgery.rules.base import Result, argument

if TYPE_CHECKING:
    from paretoprune.surgery.tracer import Tracer


def batch_norm(tracer: Tracer, node: Node) -> Result:
    """batch_norm and instance_norm: one of each parameter per channel, nothing shared."""
    source = tracer.labels(node.args[0])
    channels = source.line(1)
    if channels is None:
        elsewhere = [dim for dim in source.varying if dim != 1]
        source = tracer.constant(node.args[0], elsewhere, f"feeds a {node.operator} elsewhere")
        channels = source.line(1)
        assert channels is not None, "labels vary along dim 1 alone now"
    for ref in node.args[1:5]:
        parameter = tracer.parameter(ref)
        if parameter is not None:
            tracer.record(parameter, 0, channels)
    tracer.number(node, source.shape[1], source, 1)
    return source


def layer_norm(tracer: Tracer, node: Node) -> Result:
    """layer_norm and rms_norm over the last dims."""
    source = tracer.tokens(node.args[0])
    rank = len(source.shape)
    first = rank - len(argument(node, 1, "normalized_shape"))
    inside = [dim for dim in source.varying if dim >= first]
    if not inside:
        return source
    if len(source.varying) > 1:
        return tracer.constant(node.args[0], inside, f"is normalised by {node.operator}")
    dim = inside[0]
    channels = source.line(dim)
    assert channels is not None, "labels vary along one dim"
    for ref in node.args[2:4]:
        parameter = tracer.parameter(ref)
        if parameter is not None:
            tracer.record(parameter, dim - first, channels)
    tracer.number(node, source.shape[dim], source, dim)
    tracer.statistic(node, dim, channels)
    return source


def group_norm(tracer: Tracer, node: Node) -> Result:
    """group_norm: the channels of one group go together; a single group is a layer norm."""
    source = tracer.labels(node.args[0])
    channels = source.line(1)
    if channels is None:
        return tracer.freeze(source, "feeds a group norm along another dim")
    groups = int(argument(node, 1, "num_groups"))
    for ref in node.args[2:4]:
        parameter = tracer.parameter(ref)
        if parameter is not None:
            tracer.record(parameter, 0, channels)
    tracer.number(node, source.shape[1], source, 1)
    if groups == 1:
        tracer.statistic(node, 1, channels)
    else:
        members = channels.reshape(groups, -1)
        tracer.number(node, groups, Labels.along(0, members[:, 0], (groups,)), 0)
        tracer.unions.unify(members, members[:, :1], "shares a group norm group with fixed ones")
    return Labels(source.ids, source.shape)

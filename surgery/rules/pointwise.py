"""Rules of elementwise operators, and of those that change no label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from paretoprune.surgery.labels import Labels
from paretoprune.surgery.program import Node, Ref, Shape
from paretoprune.surgery.rules.base import Result, out, word

if TYPE_CHECKING:
    from paretoprune.surgery.tracer import Tracer


def pointwise(tracer: Tracer, node: Node) -> Result:
    """Elementwise with broadcasting: labels of operands that meet are equal."""
    arguments = torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
    refs = [ref for ref in arguments if isinstance(ref, Ref)]
    refs = [ref for ref in refs if isinstance(tracer.value(ref), Labels)]
    return meet(tracer, refs, out(node), f"meets fixed channels in {word(node)}")


def meet(tracer: Tracer, items: Sequence[Ref | Labels], shape: Shape, reason: str) -> Labels:
    """Returns the labels of values that broadcast against each other.

    A parameter takes part only along the dims in which the other values have channels: a table
    with one row per position loses whole columns.
    """
    flowing = [aligned(tracer.read(i), shape) for i in items if not tracer.is_weight(i)]
    channels = {dim for operand in flowing for dim in operand.varying}
    tables = [aligned(tracer.read(i), shape) for i in items if tracer.is_weight(i)]
    if flowing:
        tables = [
            tracer.narrowed(table, [dim for dim in table.varying if dim not in channels])
            for table in tables
        ]
    operands = flowing + tables
    if not operands:
        return Labels.none(shape)
    widest = max(operands, key=lambda operand: len(operand.varying))
    for operand in operands:
        if operand is widest:
            continue
        if not set(operand.varying) <= set(widest.varying):
            tracer.freeze(operand, "meets channels along another dim")
            tracer.freeze(widest, "meets channels along another dim")
            widest = Labels.none(shape)
        elif any(operand.shape[dim] > 1 for dim in widest.varying):
            repeated = [dim for dim in widest.varying if operand.shape[dim] == 1]
            tracer.meets(widest, operand, repeated, reason)
    return Labels(widest.ids, shape)


def aligned(labels: Labels, shape: Shape) -> Labels:
    """Returns labels with the leading dims that broadcasting adds."""
    missing = len(shape) - len(labels.shape)
    ids = labels.ids.reshape([1] * missing + list(labels.ids.shape))
    return Labels(ids, (1,) * missing + labels.shape)


def same(tracer: Tracer, node: Node) -> Result:
    """Labels pass unchanged: dropout, contiguous, clone, dtype changes."""
    labels = tracer.labels(node.args[0])
    return Labels(labels.ids, out(node))


def prelu(tracer: Tracer, node: Node) -> Result:
    """prelu: one slope for all channels, or one per channel."""
    source = tracer.labels(node.args[0])
    if math.prod(tracer.shape(node.args[1])) == 1:
        return source
    slopes, channels = tracer.parameter(node.args[1]), source.line(1)
    if slopes is None or channels is None:
        tracer.freeze(tracer.labels(node.args[1]), "are slopes of channels that stay")
        return tracer.freeze(source, "feeds a PReLU along another dim")
    tracer.record(slopes, 0, channels)
    return source

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
    with one row per position loses whole columns. Where the other values have none (a mask that
    all heads share), it has its own along the dims that they lack, until it meets some. Where
    channels meet others along another dim, as in an outer product, the more numerous may go.
    """
    flowing = [aligned(tracer.read(i), shape) for i in items if not tracer.is_weight(i)]
    channels = {dim for operand in flowing for dim in operand.varying}
    if flowing and not channels:
        lacking = [d for d in range(len(shape)) if all(x.shape[d] == 1 for x in flowing)]
        tables = [_own(tracer, i, shape, lacking) for i in items if tracer.is_weight(i)]
    else:
        known = channels if flowing else None
        tables = [_table(tracer, i, shape, known) for i in items if tracer.is_weight(i)]
    operands = flowing + tables
    if not operands:
        return Labels.none(shape)
    widest = max(operands, key=lambda x: (*_claim(tracer, x), x.ids.numel()))
    for operand in operands:
        if operand is widest:
            continue
        elsewhere = [dim for dim in operand.varying if dim not in widest.varying]
        if elsewhere and tracer.is_repeat(operand):
            operand = tracer.narrowed(operand, elsewhere)
        elif elsewhere:
            operand = tracer.freeze(operand, "meets channels along another dim")
        if any(operand.shape[dim] > 1 for dim in widest.varying):
            repeated = [dim for dim in widest.varying if operand.shape[dim] == 1]
            tracer.meets(widest, operand, repeated, reason)
    return Labels(widest.ids, shape)


def _claim(tracer: Tracer, labels: Labels) -> tuple[bool, int]:
    """Returns how much labels have to say: what is only repeated takes those of what it meets."""
    return bool(labels.varying) and not tracer.is_repeat(labels), len(labels.varying)


def _own(tracer: Tracer, item: Ref | Labels, shape: Shape, dims: Sequence[int]) -> Labels:
    """Returns new labels of a parameter along some dims; they become those of what it meets later.

    Args:
        tracer: Where they are recorded.
        item: The parameter, or what was computed from parameters.
        shape: Shape of the result.
        dims: The dims.
    """
    table = aligned(tracer.read(item), shape)
    sizes = [size if dim in dims else 1 for dim, size in enumerate(table.shape)]
    made = tracer.repeated(math.prod(sizes)).reshape(sizes)
    tracer.unions.unify(table.ids, made, "goes together with fixed channels")
    return Labels(made, table.shape)


def _table(tracer: Tracer, item: Ref | Labels, shape: Shape, channels: set[int] | None) -> Labels:
    """Returns the labels of a parameter along the dims in which it meets channels.

    Args:
        tracer: Where they are recorded.
        item: The parameter, or what was computed from parameters.
        shape: Shape of the result.
        channels: Dims in which the other operands have channels; None if they are parameters too.
    """
    name = tracer.parameter(item)
    if name is None or channels is None:
        table = aligned(tracer.read(item), shape)
        dims = [] if channels is None else [dim for dim in table.varying if dim not in channels]
        return tracer.narrowed(table, dims)
    sizes = tracer.shape(item)
    missing = len(shape) - len(sizes)
    met = [dim for dim in sorted(channels) if dim >= missing and sizes[dim - missing] > 1]
    if len(met) != 1:
        table = aligned(tracer.read(item), shape)
        return tracer.narrowed(table, [dim for dim in table.varying if dim not in channels])
    made = tracer.unions.fresh(sizes[met[0] - missing])  # one label per channel, not per element
    tracer.record(name, met[0] - missing, made)
    return Labels.along(met[0], made, (1,) * missing + sizes)


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

"""Rules of operators that combine all positions of some dims: sums, means, norms, softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paretoprune.surgery.labels import Labels
from paretoprune.surgery.program import Node, Ref, Shape
from paretoprune.surgery.rules.base import Result, argument, dims_of, out, outs, word
from paretoprune.surgery.rules.pointwise import meet, pointwise

if TYPE_CHECKING:
    from paretoprune.surgery.tracer import Tracer

_NORMS = {"linalg_vector_norm", "linalg_norm", "norm"}
_ADDS_UP = {"sum", *_NORMS}  # zeros change nothing
_AVERAGES = {"mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min"}


def reduction(tracer: Tracer, node: Node) -> Result:
    """Reductions over some dims; labels survive along the others.

    Sums and norms over the channels themselves ignore channels that are zero. Means and extremes
    count them, which is a statistic. Anything else over channels freezes them.
    """
    if isinstance(argument(node, 1, "other"), Ref):  # max and min of two tensors
        return pointwise(tracer, node)
    source = tracer.labels(node.args[0])
    rank = len(source.shape)
    position = 2 if node.operator in _NORMS else 1
    dims = dims_of(argument(node, position, "dim"), rank)
    reduced = sorted(dims & set(source.varying))
    if reduced and set(source.varying) - dims:
        source = tracer.constant(node.args[0], reduced, f"is reduced by {word(node)}")
    elif reduced:
        line = source.line(reduced[0])
        if line is None or node.operator not in _ADDS_UP | _AVERAGES:
            tracer.freeze(source, f"is reduced by {word(node)}")
        elif node.operator in _AVERAGES:
            tracer.statistic(node, reduced[0], line)
        source = Labels.none(source.shape)
    sizes = [1 if dim in dims else size for dim, size in enumerate(source.ids.shape)]

    def result(shape: Shape) -> Labels:
        kept = sizes if len(shape) == rank else [s for d, s in enumerate(sizes) if d not in dims]
        return Labels(source.ids.reshape(kept), shape)

    if isinstance(node.shape, tuple) and node.shape and isinstance(node.shape[0], tuple):
        return tuple(result(shape) for shape in outs(node))
    return result(out(node))


def similarity(tracer: Tracer, node: Node) -> Result:
    """cosine_similarity: products and lengths over a dim, to which zeros add nothing."""
    first, second = node.args[:2]
    shape = tuple(torch.broadcast_shapes(tracer.shape(first), tracer.shape(second)))
    source = meet(tracer, (first, second), shape, "is compared with fixed channels")
    dim = int(argument(node, 2, "dim", 1)) % len(shape)
    if dim in source.varying and len(source.varying) > 1:
        source = tracer.narrowed(source, [dim])
    elif dim in source.varying:
        source = Labels.none(shape)
    return Labels(source.ids.squeeze(dim), out(node))


def ordering(tracer: Tracer, node: Node) -> Result:
    """topk, sort, argsort: positions of one dim change places."""
    source = tracer.labels(node.args[0])
    position = 2 if node.operator == "topk" else 1
    dims = dims_of(argument(node, position, "dim", -1), len(source.shape))
    mixed = sorted(dims & set(source.varying))
    if mixed:
        source = tracer.constant(node.args[0], mixed, f"is ordered by {word(node)}")
    if node.operator == "argsort":
        return Labels(source.ids, out(node))
    return tuple(Labels(source.ids, shape) for shape in outs(node))


def along(tracer: Tracer, node: Node) -> Result:
    """softmax, cumsum and the like: every position of one dim is computed from all of it."""
    source = tracer.labels(node.args[0])
    dims = dims_of(argument(node, 1, "dim"), len(source.shape))
    mixed = sorted(dims & set(source.varying))
    if mixed:
        source = tracer.constant(node.args[0], mixed, f"is mixed by {word(node)}")
    return Labels(source.ids, out(node))

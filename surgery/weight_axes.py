"""weight_axes: which parameter an operand of an operator is, seen through what comes between.

Code may move the axes of a weight, cut it, scale it, mask it, give its rows lengths (weight norm),
or pick it from a stack. What scales or masks it loses channels with it: its companions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from paretoprune.surgery.labels import Labels
from paretoprune.surgery.notes import Piece
from paretoprune.surgery.program import Node, Ref, resolve_target

if TYPE_CHECKING:
    from paretoprune.surgery.tracer import Tracer

PARTS = {"chunk", "split", "split_with_sizes"}
"""Operators that cut a value in parts."""
_MOVES = {"t", "numpy_T", "mT", "transpose", "permute", "movedim", "moveaxis"}
_KEEPS = {"contiguous", "clone", "detach", "alias", "to"}
_CHANGES_RANK = {"select", "unsqueeze"}


def weight_axes(
    tracer: Tracer, item: Ref | Labels
) -> tuple[str, tuple[int, ...], Piece | None] | None:
    """Returns the parameter that an operand is, element by element in some other order.

    It may be scaled, masked by another parameter, given lengths, or picked from several.

    Args:
        tracer: Of the walk; companions are noted there.
        item: The operand.

    Returns:
        Its name, for every dim of the operand the parameter's axis (-1 for one that is none), and
        which part of the parameter it is, if not all of it; None if the operand is anything else.
    """
    if isinstance(item, Labels):
        return None
    steps = _steps(tracer, item)
    if steps is None or not (tracer.is_weight(item) or any(_picks(tracer, s) for s in steps)):
        return None
    source = tracer.program.nodes[(steps[0].args[0] if steps else item).name]
    axes = list(range(len(tracer.shape(Ref(source.name)))))
    piece = None
    for position, step in enumerate(steps, 1):
        if step.operator in PARTS:
            dim = int(step.args[2] if len(step.args) > 2 else 0) % len(axes)
            if piece is not None or position == len(steps) or axes[dim] < 0:
                return None
            sizes = [shape[dim] for shape in step.shape]  # type: ignore[union-attr, index]
            stops = tuple(itertools.accumulate(sizes, initial=0))
            piece = Piece(step, axes[dim], dim, stops, int(steps[position].args[1]))
        elif step.operator in _CHANGES_RANK or step.operator == "index":
            axes = _other_rank(tracer, step, axes)
        elif step.operator in _MOVES:
            order = torch.empty(tuple(range(1, len(axes) + 1)), device="meta")
            moved = resolve_target(step.target)(order, *step.args[1:], **step.kwargs)
            axes = [axes[size - 1] for size in moved.shape]
        else:
            _note_companions(tracer, source.target, axes, step)
    return source.target, tuple(axes), piece


def whole_weight(tracer: Tracer, ref: Any) -> str | None:
    """Returns the name of the parameter that an argument is whole, its axes in their order."""
    name, axes, piece = weight_axes(tracer, ref) or (None, (), None)
    return name if piece is None and axes == tuple(range(len(axes))) else None


def _steps(tracer: Tracer, item: Ref) -> list[Node] | None:
    """Returns the operators that make an operand of a parameter, the first one first.

    The first argument of each is what the one before makes; None if others are among them.
    """
    node = tracer.program.nodes[item.name]
    steps: list[Node] = []
    while node.kind == "call":
        scaled = node.name in tracer.weights and tracer.is_pointwise(node)
        known = node.operator in _MOVES | _KEEPS | _CHANGES_RANK or _picks(tracer, node)
        if not (known or scaled or tracer.is_part_of_weight(node)) or node.in_place:
            return None
        main = next(node.refs())
        if scaled:  # a gain may come first, and broadcast
            same = (ref for ref in node.refs() if tracer.shape(Ref(ref)) == node.shape)
            main = next(same, "")
            if not main:
                return None
            others = (Ref(ref) for ref in node.refs() if ref != main)
            node = dataclasses.replace(node, args=(Ref(main), *others))
        steps.append(node)
        node = tracer.program.nodes[main]
    return steps[::-1] if node.kind == "parameter" else None


def _picks(tracer: Tracer, node: Node) -> bool:
    """Whether a node picks matrices from a stack of them, such as experts, by their number."""
    if node.operator != "index" or len(tracer.shape(node.args[0])) < 3:
        return False
    return isinstance(node.args[1][0], Ref) and not any(node.args[1][1:])


def _other_rank(tracer: Tracer, step: Node, axes: Sequence[int]) -> list[int]:
    """Returns the axes of a parameter by dim after an operator that drops or adds some dims."""
    changed = list(axes)
    if step.operator == "select":
        del changed[int(step.args[1])]
    elif step.operator == "unsqueeze":
        changed.insert(int(step.args[1]) % (len(axes) + 1), -1)
    else:
        changed[:1] = [-1] * len(tracer.shape(step.args[1][0]))
    return changed


def _note_companions(tracer: Tracer, parameter: str, axes: Sequence[int], step: Node) -> None:
    """Notes which parameters go along with one, axis by axis, as its mask or lengths do.

    Args:
        tracer: Where they are noted.
        parameter: Qualified name.
        axes: Its axis for each dim of what the step returns.
        step: An operator on it, of which other arguments may be such parameters.
    """
    for ref in step.args[1:]:
        other = weight_axes(tracer, ref) if isinstance(ref, Ref) else None
        if other is None or other[2] is not None or other[0] == parameter:
            continue
        missing = len(axes) - len(other[1])
        pairs = zip(axes[missing:], other[1], strict=True)
        along = {axis: theirs for axis, theirs in pairs if axis >= 0 and theirs >= 0}
        if not any(name == parameter for name, _ in tracer.companions.get(other[0], ())):
            noted = tracer.companions.setdefault(parameter, [])
            if (other[0], along) not in noted:
                noted.append((other[0], along))

"""What every rule needs: its type, and how it reads a node's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from paretoprune.surgery.labels import Labels
from paretoprune.surgery.program import Node, Shape

if TYPE_CHECKING:
    from paretoprune.surgery.tracer import Tracer

Result = Labels | tuple[Labels, ...] | None
Rule = Callable[["Tracer", Node], Result]
"""(tracer, node) -> labels of what the operator returns."""


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Returns an argument given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def out(node: Node) -> Shape:
    """Returns the shape of the one tensor that a node returns."""
    return node.shape  # type: ignore[return-value]


def outs(node: Node) -> tuple[Shape, ...]:
    """Returns the shapes of the tensors that a node returns."""
    return node.shape  # type: ignore[return-value]


def word(node: Node) -> str:
    """Returns the operator's name for people, as `mean` for `aten.mean.dim`."""
    return node.operator or node.target


def dims_of(given: Any, rank: int) -> set[int]:
    """Returns the dims that an argument names; none means all."""
    if given is None or given == []:
        return set(range(rank))
    return {int(dim) % rank for dim in ([given] if isinstance(given, int) else given)}

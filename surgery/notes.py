"""What a walk on channel labels notes of costs, of numbers in the code, and of cut parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from paretoprune.surgery.program import Node


@dataclass(frozen=True)
class MacsTerm:
    """MACs of one operator: `coefficient` times the number of kept positions of each factor.

    Attributes:
        node: Name of the operator's node.
        coefficient: MACs for one kept position of every factor, for one example.
        factors: Labels along the axes that surgery may shorten.
    """

    node: str
    coefficient: float
    factors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Number:
    """A number in the code of a module that counts channels.

    Attributes:
        module: Qualified name.
        value: The number.
        ids: Labels of the positions that it counts, shape (value, anything): a position stays
            when any of its labels does.
    """

    module: str
    value: int
    ids: Tensor


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that an operand is: one of several along an axis.

    Attributes:
        node: What cuts the parameter.
        axis: The parameter's axis that is cut.
        dim: The dim of the value that is cut.
        stops: The boundaries.
        index: Which part it is.
    """

    node: Node
    axis: int
    dim: int
    stops: tuple[int, ...]
    index: int

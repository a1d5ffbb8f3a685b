"""Cost of a plan in closed form: MACs and params are polynomials in the kept unit counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one forward pass of one example.

    Attributes:
        macs: Multiply-accumulates of convolutions, linear layers and matrix products.
        params: Number of scalars in all parameters.
    """

    macs: int
    params: int


@dataclass(frozen=True)
class Factor:
    """The number of kept positions along one axis: `constant + per_unit @ counts`.

    Attributes:
        constant: Positions that always stay.
        per_unit: Positions of one unit, by group index.
    """

    constant: int
    per_unit: dict[int, int]


@dataclass(frozen=True)
class Term:
    """`coefficient` times the product of the factors; gone when one of `blocks` is removed."""

    coefficient: float
    factors: tuple[Factor, ...]
    blocks: frozenset[int] = frozenset()


class Polynomial:
    """A sum of terms, evaluated for many plans at once with a few small matrix products.

    Args:
        terms: The summands.
        n_groups: Length of a vector of unit counts.
        n_blocks: Length of a vector of removed blocks.
    """

    def __init__(self, terms: Sequence[Term], n_groups: int, n_blocks: int) -> None:
        depth = max((len(term.factors) for term in terms), default=1) or 1
        self._coefficient = torch.tensor([t.coefficient for t in terms], dtype=torch.float64)
        self._constant = torch.ones(depth, len(terms), dtype=torch.float64)
        self._per_unit = torch.zeros(depth, len(terms), n_groups, dtype=torch.float64)
        self._blocks = torch.zeros(len(terms), n_blocks, dtype=torch.float64)
        for row, term in enumerate(terms):
            for level, factor in enumerate(term.factors):
                self._constant[level, row] = factor.constant
                for group, positions in factor.per_unit.items():
                    self._per_unit[level, row, group] = positions
            for block in term.blocks:
                self._blocks[row, block] = 1

    def __call__(self, counts: Tensor, removed: Tensor) -> Tensor:
        """Returns the value of every plan, shape (n_plans,).

        Args:
            counts: Kept units, float64, shape (n_plans, n_groups).
            removed: 1 for a removed block, float64, shape (n_blocks,) or (n_plans, n_blocks).
        """
        positions = counts @ self._per_unit.mT + self._constant[:, None]  # depth, plans, terms
        alive = (removed @ self._blocks.mT == 0).to(torch.float64)
        return (positions.prod(0) * alive) @ self._coefficient

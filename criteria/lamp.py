"""LAMP: magnitude relative to all that is larger. Lee et al., ICLR 2021, arXiv:2010.07611.

The score of a weight is its square over the sum of the squares of all weights of its layer that
are at least as large. Here a unit's square is the sum over all its coupled weights, and a group
takes the place of a layer: the score of its largest unit is 1 in every group, which keeps at least
that one under a global ranking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from paretoprune.criteria.base import Calibration, CostClass, sum_over_group
from paretoprune.surgery import PruningGraph


@dataclass(frozen=True, slots=True)
class Lamp:
    """Squared norm of a unit over the sum of those at least as large in its group."""

    summary: ClassVar[str] = "squared norm over the sum of all at least as large in the group"
    paper: ClassVar[str] = "Lee et al., ICLR 2021, arXiv:2010.07611"
    cost: ClassVar[CostClass] = CostClass.WEIGHTS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`."""
        squares = sum_over_group(model, graph, lambda name, w: w.square() if w.ndim > 1 else None)
        return {name: _lamp(values) for name, values in squares.items()}


def _lamp(squares: Tensor) -> Tensor:
    """Returns the scores of a group's units, shape (group.size,); equal units score alike."""
    ordered, order = squares.double().sort()
    rest = ordered.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ordered, ordered)  # of equal ones: each counts all the others
    scores = torch.empty_like(ordered)
    scores[order] = ordered / rest[first].clamp_min(torch.finfo(ordered.dtype).tiny)
    return scores.float()

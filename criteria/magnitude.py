"""Magnitude: the norm of all weights that a unit owns. Li et al., ICLR 2017, arXiv:1608.08710.

L1 is the sum of absolute weights, L2 the root of the sum of squares, over the weights of all
coupled layers; divided by the group's mean, since layers of other fan-in have other norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from paretoprune.criteria.base import Calibration, CostClass, relative_to_mean, sum_over_group
from paretoprune.surgery import PruningGraph


@dataclass(frozen=True, slots=True)
class L1:
    """Sum of absolute weights of a unit, relative to its group's mean."""

    summary: ClassVar[str] = "sum of absolute weights, relative to the group's mean"
    paper: ClassVar[str] = "Li et al., ICLR 2017, arXiv:1608.08710"
    cost: ClassVar[CostClass] = CostClass.WEIGHTS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`."""
        return relative_to_mean(
            sum_over_group(model, graph, lambda name, w: w.abs() if w.ndim > 1 else None)
        )


@dataclass(frozen=True, slots=True)
class L2:
    """Euclidean norm of the weights of a unit, relative to its group's mean."""

    summary: ClassVar[str] = "Euclidean norm of the weights, relative to the group's mean"
    paper: ClassVar[str] = "Li et al., ICLR 2017, arXiv:1608.08710"
    cost: ClassVar[CostClass] = CostClass.WEIGHTS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`."""
        squares = sum_over_group(model, graph, lambda name, w: w.square() if w.ndim > 1 else None)
        return relative_to_mean({name: values.sqrt() for name, values in squares.items()})

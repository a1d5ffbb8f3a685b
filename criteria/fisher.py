"""Fisher: Optimal Brain Damage with the diagonal of the empirical Fisher matrix.

LeCun, Denker & Solla, NeurIPS 1989: zeroing a weight w of a trained network raises the loss by
about w^2 H_ww / 2. The Hessian's diagonal is replaced by that of the Fisher matrix (Theis et al.,
arXiv:1801.05787), and the terms of all coupled weights of a unit are summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from paretoprune.criteria.base import Calibration, CostClass
from paretoprune.criteria.shared import SharedCalibration
from paretoprune.criteria.units import Units
from paretoprune.surgery import PruningGraph


@dataclass(frozen=True, slots=True)
class Fisher:
    """Half the sum of w^2 times the Fisher diagonal over all coupled weights of a unit."""

    summary: ClassVar[str] = "second-order loss change, diagonal Fisher, all coupled parameters"
    paper: ClassVar[str] = "LeCun et al., NeurIPS 1989; Theis et al., arXiv:1801.05787"
    cost: ClassVar[CostClass] = CostClass.GRADIENTS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch.
        """
        measured = SharedCalibration.of(calibration).statistics(model, graph)
        return Units(graph).by_group(measured.fisher / 2)

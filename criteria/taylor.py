"""First-order Taylor saliency. Molchanov et al., CVPR 2019, arXiv:1906.10771.

The loss change when a weight w becomes zero is about -g w. A unit owns weights in several layers
(the filter that makes it, its BatchNorm scale and shift, the weights that read it); its saliency
is the squared sum of g w over the filter that makes it, plus likewise for each other coupled
parameter: sum over parameters of (sum over the unit's elements of g w)^2, averaged over batches.
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
class Taylor:
    """Squared first-order loss change of removing a unit, over all coupled parameters."""

    summary: ClassVar[str] = "squared first-order loss change, all coupled parameters"
    paper: ClassVar[str] = "Molchanov et al., CVPR 2019, arXiv:1906.10771"
    cost: ClassVar[CostClass] = CostClass.GRADIENTS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch.
        """
        measured = SharedCalibration.of(calibration).statistics(model, graph)
        return Units(graph).by_group(measured.changes)

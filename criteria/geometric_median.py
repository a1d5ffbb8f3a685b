"""Geometric median: filters that the others can replace go first.

FPGM: He et al., CVPR 2019, arXiv:1811.00250. The saliency of a filter is the sum of its Euclidean
distances to all filters of its layer: those nearest to the geometric median are most redundant.
Coupled filters are concatenated, and sums are relative to the group's mean, since filters of other
layers have other sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from paretoprune.criteria.base import Calibration, CostClass, relative_to_mean
from paretoprune.criteria.units import Units
from paretoprune.surgery import PruningGraph


@dataclass(frozen=True, slots=True)
class GeometricMedian:
    """Summed distance of a unit's filters to those of all units of its group."""

    summary: ClassVar[str] = "summed distance to all other filters of the group (FPGM)"
    paper: ClassVar[str] = "He et al., CVPR 2019, arXiv:1811.00250"
    cost: ClassVar[CostClass] = CostClass.WEIGHTS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`."""
        filters = Units(graph).filters
        parameters = dict(model.named_parameters())
        saliency = {}
        for group in graph.open_groups:
            squares = torch.zeros(group.size, group.size, dtype=torch.float64)
            for item in group.slices:
                if filters.get(item.parameter) != item.axis or item.parameter not in parameters:
                    continue
                weight = parameters[item.parameter].detach().double().cpu()
                own = weight.movedim(item.axis, 0)[torch.tensor(item.indices)].flatten(1)
                squares += torch.cdist(own, own).square()
            saliency[group.name] = squares.sqrt().sum(1).float()
        return relative_to_mean(saliency)

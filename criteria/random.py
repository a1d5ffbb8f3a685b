"""Random saliencies: the baseline that every criterion must beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from paretoprune.criteria.base import Calibration, CostClass
from paretoprune.surgery import PruningGraph


@dataclass(frozen=True, slots=True)
class Random:
    """Uniform random saliencies.

    Attributes:
        seed: Seed of the draw.
    """

    seed: int = 0
    summary: ClassVar[str] = "uniform random saliencies"
    paper: ClassVar[str] = "baseline"
    cost: ClassVar[CostClass] = CostClass.WEIGHTS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            group.name: torch.rand(group.size, generator=generator) for group in graph.open_groups
        }

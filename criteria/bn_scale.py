"""BatchNorm scale: network slimming. Liu et al., ICCV 2017, arXiv:1708.06519.

The saliency of a channel is |gamma| of the BatchNorm over it, averaged over coupled BatchNorms. A
group without BatchNorm over its channels has no such score: its units get the quantiles of all
others' scores in the order of their weights' norms, so that they are pruned at an average rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from paretoprune.criteria.base import Calibration, CostClass, sum_over_group
from paretoprune.surgery import PrunableGroup, PruningGraph


@dataclass(frozen=True, slots=True)
class BnScale:
    """Absolute BatchNorm scale of a channel, averaged over the coupled BatchNorms."""

    summary: ClassVar[str] = "absolute BatchNorm scale (network slimming)"
    paper: ClassVar[str] = "Liu et al., ICCV 2017, arXiv:1708.06519"
    cost: ClassVar[CostClass] = CostClass.WEIGHTS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`."""
        scales = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, _NormBase) and module.weight is not None
        }
        totals = sum_over_group(model, graph, lambda name, w: w.abs() if name in scales else None)
        squares = sum_over_group(model, graph, lambda name, w: w.square() if w.ndim > 1 else None)
        saliency: dict[str, Tensor] = {}
        missing: list[PrunableGroup] = []
        for group in graph.open_groups:
            norms = sum(len(item.indices[0]) for item in group.slices if item.parameter in scales)
            if norms:
                saliency[group.name] = totals[group.name] / norms
            else:
                missing.append(group)
        known = torch.cat(list(saliency.values())) if saliency else torch.linspace(0, 1, 101)
        for group in missing:
            ranks = squares[group.name].argsort(stable=True).argsort(stable=True)
            saliency[group.name] = known.quantile((ranks + 0.5) / group.size)
        return saliency

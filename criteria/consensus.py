"""Consensus: the rank sum over several similarities of the penultimate features.

Duarte et al., arXiv:2411.14345, for layers: each measure ranks the structures by how much the
features change without them, and the sum of the ranks decides. The eight measures are theirs: CKA,
shape distances with alpha 0 and 1, the permutation distance, Gaussian-stochastic shape distances
with alpha 0, 1 and 2, and the 1-Wasserstein distance of all feature values (see `similarity`).

Ranks are quantiles among all units, averaged instead of summed. A block takes the quantile that
its change per inner unit has among the units. Before very wide features, as in dense prediction,
the permutation distance is a tie of all (see `similarity`), and the other seven decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from paretoprune.criteria.ablation import Changes, changes
from paretoprune.criteria.base import Calibration, CostClass
from paretoprune.criteria.blocks import inner_units
from paretoprune.criteria.shared import SharedCalibration
from paretoprune.criteria.similarity import SIMILARITIES
from paretoprune.surgery import PruningGraph

_GRAIN = 1e-3  # of the largest change: a small angle is a root of a rounding error


@dataclass(frozen=True, slots=True)
class Consensus:
    """Mean quantile of a unit over eight measures of how the penultimate features change.

    Attributes:
        images: Calibration examples used at most.
    """

    images: int = 256
    summary: ClassVar[str] = "rank sum over eight similarities of the penultimate features"
    paper: ClassVar[str] = "Duarte et al., arXiv:2411.14345"
    cost: ClassVar[CostClass] = CostClass.ABLATION

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch, or the network returns several values.
        """
        shared = SharedCalibration.of(calibration)
        found = changes(model, graph, shared, self.images, SIMILARITIES)
        if not graph.open_groups:
            return {}
        quantiles = [_share_below(values, values) for values in map(_all, found.values())]
        mean = torch.stack(quantiles).mean(0).float()
        parts = mean.split([group.size for group in graph.open_groups])
        return {g.name: part for g, part in zip(graph.open_groups, parts, strict=True)}

    def blocks(
        self,
        model: nn.Module,
        graph: PruningGraph,
        calibration: Calibration,
        saliency: Mapping[str, Tensor],
    ) -> Mapping[str, float]:
        """Returns the mean quantile of each block's changes per inner unit."""
        shared = SharedCalibration.of(calibration)
        found = changes(model, graph, shared, self.images, SIMILARITIES)
        scores = {}
        for name in graph.blocks:
            quantiles = [
                _share_below(
                    torch.tensor([each.blocks[name] / inner_units(graph, name)]).double(),
                    _all(each),
                )
                for each in found.values()
            ]
            scores[name] = float(torch.stack(quantiles).mean())
        return scores


def _all(changes: Changes) -> Tensor:
    return torch.cat(list(changes.units.values()))


def _share_below(values: Tensor, among: Tensor) -> Tensor:
    """Returns, for every value, the share of `among` that is smaller; ties count half.

    Differences that rounding errors may make are ties.
    """
    grain = _GRAIN * among.max().clamp_min(torch.finfo(among.dtype).tiny)
    values, among = (values / grain).round(), (among / grain).round()
    ordered = among.sort().values
    low = torch.searchsorted(ordered, values)
    high = torch.searchsorted(ordered, values, right=True)
    return (low + high) / (2 * len(among))

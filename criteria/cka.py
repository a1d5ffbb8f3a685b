"""CKA: how far the features before the last layer move when a unit or a block is removed.

Pons et al., ICPR 2024, arXiv:2405.17081, for layers: the saliency is 1 - CKA(features, features
without it), linear and biased. Units are scored alike, which the paper leaves to other criteria;
a block's saliency is its own 1 - CKA per inner unit, so that both can be ranked together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from paretoprune.criteria.ablation import changes, penultimate_features
from paretoprune.criteria.base import Calibration, CostClass
from paretoprune.criteria.blocks import inner_units
from paretoprune.criteria.shared import SharedCalibration
from paretoprune.criteria.similarity import cka
from paretoprune.surgery import PruningGraph, PruningPlan


def cka_to_dense(
    small: nn.Module, plan: PruningPlan, graph: PruningGraph, inputs: Any, dense: Tensor
) -> float:
    """Returns the CKA of a candidate's penultimate features with its parent's, in [0, 1].

    Args:
        small: The pruned network.
        plan: Its plan.
        graph: The parent's graph.
        inputs: Examples, many more than there are features.
        dense: `penultimate_features` of the parent for these examples.
    """
    return float(cka(dense, penultimate_features(small, graph, inputs, plan)))


@dataclass(frozen=True, slots=True)
class Cka:
    """1 - CKA of the penultimate features with those without the unit.

    Attributes:
        images: Calibration examples used at most; many more than features make CKA unbiased.
    """

    images: int = 256
    summary: ClassVar[str] = "1 - CKA of the penultimate features without the unit or block"
    paper: ClassVar[str] = "Pons et al., ICPR 2024, arXiv:2405.17081"
    cost: ClassVar[CostClass] = CostClass.ABLATION

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch, or the network returns several values.
        """
        shared = SharedCalibration.of(calibration)
        found = changes(model, graph, shared, self.images, ["cka"])["cka"]
        return {name: values.clamp_min(0).float() for name, values in found.units.items()}

    def blocks(
        self,
        model: nn.Module,
        graph: PruningGraph,
        calibration: Calibration,
        saliency: Mapping[str, Tensor],
    ) -> Mapping[str, float]:
        """Returns 1 - CKA without each block, per inner unit."""
        shared = SharedCalibration.of(calibration)
        found = changes(model, graph, shared, self.images, ["cka"])["cka"]
        return {
            name: max(0.0, value) / inner_units(graph, name)
            for name, value in found.blocks.items()
        }

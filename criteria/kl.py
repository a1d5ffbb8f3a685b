"""KL: how far the predicted classes move when a unit or a block is removed.

Luo & Wu, CURL, CVPR 2020, arXiv:2004.02164; taken for neurons and layers alike by Nascimento et
al., Pruning Everything, IJCNN 2025, arXiv:2506.04513. With p the softmax of the dense network's
logits and q that of the network without the unit, the saliency is the mean of KL(q || p). Their
code applies a second softmax to networks that end in one; here it is applied once, to logits. A
block's saliency is its own divergence per inner unit, so that both can be ranked together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from paretoprune.criteria.ablation import changes
from paretoprune.criteria.base import Calibration, CostClass
from paretoprune.criteria.blocks import inner_units
from paretoprune.criteria.shared import SharedCalibration
from paretoprune.surgery import PruningGraph


@dataclass(frozen=True, slots=True)
class Kl:
    """KL divergence of the predicted classes without the unit from those with it.

    Attributes:
        images: Calibration examples used at most; the paper takes 5,000 on CIFAR-10.
    """

    images: int = 256
    summary: ClassVar[str] = "KL divergence of the predictions without the unit or block"
    paper: ClassVar[str] = "Luo & Wu, CVPR 2020; Nascimento et al., IJCNN 2025, arXiv:2506.04513"
    cost: ClassVar[CostClass] = CostClass.ABLATION

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch, or the network returns several values or no
                classes.
        """
        shared = SharedCalibration.of(calibration)
        found = changes(model, graph, shared, self.images, ["kl"])["kl"]
        return {name: values.float() for name, values in found.units.items()}

    def blocks(
        self,
        model: nn.Module,
        graph: PruningGraph,
        calibration: Calibration,
        saliency: Mapping[str, Tensor],
    ) -> Mapping[str, float]:
        """Returns the divergence without each block, per inner unit."""
        shared = SharedCalibration.of(calibration)
        found = changes(model, graph, shared, self.images, ["kl"])["kl"]
        return {name: value / inner_units(graph, name) for name, value in found.blocks.items()}

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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria.base import Calibration
from paretoprune.surgery import PruningGraph
from paretoprune.surgery.program import as_call, shared_copy


@dataclass(frozen=True, slots=True)
class Taylor:
    """Squared first-order loss change of removing a unit, over all coupled parameters."""

    summary: ClassVar[str] = "squared first-order loss change, all coupled parameters"
    paper: ClassVar[str] = "Molchanov et al., CVPR 2019, arXiv:1906.10771"

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch.
        """
        copy = shared_copy(model).eval()
        parameters = {name: p for name, p in copy.named_parameters() if p.is_floating_point()}
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        totals = {group.name: torch.zeros(group.size) for group in graph.open_groups}
        batches = 0
        for inputs, targets in calibration:
            args, kwargs = as_call(inputs)
            with torch.enable_grad():
                outputs = torch.func.functional_call(copy, leaves, args, kwargs)
                loss = F.cross_entropy(outputs, targets)
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            products = {
                name: gradient * leaf.detach()
                for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
                if gradient is not None
            }
            _add(graph, products, totals)
            batches += 1
        if not batches:
            raise ValueError("the taylor criterion needs calibration data, but got no batch.")
        return {name: total / batches for name, total in totals.items()}


def _add(graph: PruningGraph, products: Mapping[str, Tensor], totals: dict[str, Tensor]) -> None:
    lines: dict[tuple[str, int], Tensor] = {}
    for group in graph.open_groups:
        for item in group.slices:
            product = products.get(item.parameter)
            if product is None:
                continue
            key = (item.parameter, item.axis)
            if key not in lines:
                others = [axis for axis in range(product.ndim) if axis != item.axis]
                lines[key] = (product.sum(others) if others else product).float().cpu()
            change = lines[key][torch.tensor(item.indices)].sum(1)
            totals[group.name] += change.square()

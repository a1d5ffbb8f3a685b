"""Mean activation: how much of a unit arrives at the layers that read it.

Polyak & Wolf, IEEE Access 2015; a baseline of Molchanov et al., ICLR 2017, arXiv:1611.06440. The
saliency of a unit is the mean absolute value, over examples and positions, of what the layers that
read it receive from it, averaged over these layers and relative to the group's mean. A unit that
no layer reads as such goes last.
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
from paretoprune.surgery.consumers import find_consumers
from paretoprune.surgery.execute import Execution, Values
from paretoprune.surgery.inputs import count_rows
from paretoprune.surgery.program import Node


@dataclass(frozen=True, slots=True)
class MeanActivation:
    """Mean absolute activation of a unit as its readers see it, relative to the group's mean."""

    summary: ClassVar[str] = "mean absolute activation, relative to the group's mean"
    paper: ClassVar[str] = "Polyak & Wolf 2015; Molchanov et al., ICLR 2017, arXiv:1611.06440"
    cost: ClassVar[CostClass] = CostClass.ACTIVATIONS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch.
        """
        readers = {
            consumer.node: consumer
            for consumer in find_consumers(graph).values()
            if consumer.geometry.groups == 1 and (consumer.weight, 1) in graph.units
        }
        sums: dict[str, Tensor] = {}

        def before(node: Node, values: Values) -> None:
            if node.name in readers:
                reader = readers[node.name]
                channels = 1 if reader.geometry.kernel else -1
                value = values[reader.source].abs().movedim(channels, -1)
                mean = value.flatten(0, -2).mean(0).double() * len(value)
                sums[node.name] = sums.get(node.name, torch.zeros_like(mean)) + mean

        seen = 0
        for inputs, _ in calibration:
            Execution(graph).run(model, inputs, before=before)
            seen += count_rows(inputs)
        if not seen:
            raise ValueError(
                "the mean_activation criterion needs calibration data, but got no batch."
            )
        units = Units(graph)
        total = torch.zeros(units.count + 1, dtype=torch.float64)
        places = torch.zeros(units.count + 1, dtype=torch.float64)
        for name, mean in sums.items():
            index = units.at(readers[name].weight, 1, torch.device("cpu"))
            total.index_add_(0, index, mean.cpu() / seen)
            places.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
        known = places[:-1] > 0
        activity = torch.where(known, total[:-1] / places[:-1].clamp_min(1), torch.nan)
        relative = relative_to_mean(
            {name: values for name, values in units.by_group(activity).items() if _known(values)}
        )
        most = max((float(values.max()) for values in relative.values()), default=1.0)
        return {
            group.name: relative.get(group.name, torch.full((group.size,), most))
            for group in graph.open_groups
        }


def _known(values: Tensor) -> bool:
    return bool(values.isfinite().all())

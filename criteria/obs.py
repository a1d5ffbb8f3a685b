"""Optimal Brain Surgeon over units: least reconstruction error, greedily.

Hassibi & Stork, NeurIPS 1993, for weights; structured and per layer as in Frantar & Alistarh
(NeurIPS 2022, arXiv:2208.11580) and Kurtic et al. (ZipLM, NeurIPS 2023, arXiv:2302.04089).

A layer that reads the units has weights W (outputs x features) and the Gram matrix G of its
inputs. With H = (G + lambda I)^-1 and F the features of a unit, removing the unit and refitting
the others raises the squared output error by

    sum over outputs of  W[:, F] (H[F, F])^-1 W[:, F]'

and leaves W - W[:, F] (H[F, F])^-1 H[F, :]. The cheapest unit goes, W and H are updated, and so
on. Errors are relative to the variance of the residual stream that the layer feeds (else of its
own output), which makes layers comparable, and summed over all layers that read the units. This is
the error that `surgery.reconstruct` leaves, which is why the two fit together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor, nn

from paretoprune.criteria.base import Calibration, CostClass
from paretoprune.criteria.shared import SharedCalibration
from paretoprune.surgery import ChannelSlice, PruningGraph, PruningPlan
from paretoprune.surgery.consumers import Consumer, find_consumers
from paretoprune.surgery.execute import Execution, Values
from paretoprune.surgery.inputs import count_rows, sample_positions
from paretoprune.surgery.least_squares import RIDGE, output_positions, patches
from paretoprune.surgery.program import Node

_STEPS = 64  # at least this many elimination steps for a large group


@dataclass(frozen=True, slots=True)
class Obs:
    """Reconstruction error that a unit's removal leaves, after all cheaper ones went.

    Attributes:
        images: Calibration examples used at most.
        samples: Output positions per layer and batch used at most.
    """

    images: int = 512
    samples: int = 8192
    summary: ClassVar[str] = (
        "reconstruction error, greedily with refitting (Optimal Brain Surgeon)"
    )
    paper: ClassVar[str] = "Hassibi & Stork 1993; Kurtic et al., NeurIPS 2023, arXiv:2302.04089"
    cost: ClassVar[CostClass] = CostClass.ACTIVATIONS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch.
        """
        steps = _elimination(model, graph, calibration, self.images, self.samples)
        return _by_unit(
            graph, {name: (o, errors.cumsum(0)) for name, (o, errors) in steps.items()}
        )

    def blocks(
        self,
        model: nn.Module,
        graph: PruningGraph,
        calibration: Calibration,
        saliency: Mapping[str, Tensor],
    ) -> Mapping[str, float]:
        """Returns the error that is left once all units of a block are gone: its last unit's."""
        scores = {}
        for block in graph.blocks.values():
            inner = [float(saliency[name].max()) for name in block.groups if name in saliency]
            scores[block.name] = max(inner, default=inf)
        return scores


@dataclass(frozen=True, slots=True)
class ObsPerMac:
    """Reconstruction error that a unit's removal adds, per MAC that it saves.

    The order within a group is that of `Obs`. Ranking all units by error per MAC minimises the sum
    of all layers' errors for a budget, which is right as long as errors stay small: at moderate
    budgets this allocation is the better one, at small budgets that of `Obs`, which spares groups
    that lost much already.

    Attributes:
        images: Calibration examples used at most.
        samples: Output positions per layer and batch used at most.
    """

    images: int = 512
    samples: int = 8192
    summary: ClassVar[str] = "reconstruction error added per MAC saved, in the order of obs"
    paper: ClassVar[str] = "Hassibi & Stork 1993; Kurtic et al., NeurIPS 2023, arXiv:2302.04089"
    cost: ClassVar[CostClass] = CostClass.ACTIVATIONS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch.
        """
        dense = graph.cost().macs
        steps = _elimination(model, graph, calibration, self.images, self.samples)
        ladders = {}
        for name, (order, errors) in steps.items():
            less = PruningPlan({name: tuple(range(1, graph.groups[name].size))})
            saved = max(1, dense - graph.cost(less).macs)
            ladders[name] = (order, errors.cummax(0).values / saved)
        return _by_unit(graph, ladders)

    def blocks(
        self,
        model: nn.Module,
        graph: PruningGraph,
        calibration: Calibration,
        saliency: Mapping[str, Tensor],
    ) -> Mapping[str, float]:
        """Returns the error left once all units of a block are gone, per MAC that it saves."""
        dense = graph.cost().macs
        steps = _elimination(model, graph, calibration, self.images, self.samples)
        scores = {}
        for block in graph.blocks.values():
            errors = [float(steps[name][1].sum()) for name in block.groups if name in steps]
            saved = max(1, dense - graph.cost(PruningPlan(removed=(block.name,))).macs)
            scores[block.name] = max(errors, default=inf) / saved
        return scores


def _by_unit(
    graph: PruningGraph, ladders: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Returns saliencies by unit from (order, ascending saliencies in that order) by group."""
    saliency: dict[str, Tensor] = {}
    for name, (order, values) in ladders.items():
        saliency[name] = torch.empty(len(order))
        saliency[name][order.cpu()] = values.float().cpu()
    most = max((values.max().item() for values in saliency.values()), default=1.0)
    for group in graph.open_groups:
        if group.name not in saliency:  # no layer tells the worth of its units: they go last
            saliency[group.name] = torch.full((group.size,), most)
    return saliency


def _elimination(
    model: nn.Module, graph: PruningGraph, calibration: Calibration, images: int, samples: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns, by group, the units in the order they leave and the error each adds.

    The criteria of this file share it, where the calibration data is shared.
    """

    def measure() -> dict[str, tuple[Tensor, Tensor]]:
        moments = _observe(model, graph, calibration, images, samples)
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        steps = {}
        for group in graph.open_groups:
            readers = [
                _Reader(item, moments[item.parameter], tensors)
                for item in group.slices
                if item.axis == 1 and item.parameter in moments
            ]
            if readers:
                steps[group.name] = _eliminate(group.size, readers)
        return steps

    shared = SharedCalibration.of(calibration)
    return shared.once(f"elimination {images} {samples}", model, graph, measure)


class _Moments:
    """Sums over sampled positions: features, their products, and the variance of the target."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.count = 0
        self.variance = 0.0
        self._sum: Tensor | float = 0.0
        self._products: Tensor | float = 0.0

    def add(self, features: Tensor) -> None:
        self.count += len(features)
        self._sum = self._sum + features.double().sum(0)
        self._products = self._products + (features.T @ features).double()

    @property
    def gram(self) -> Tensor:
        mean = torch.as_tensor(self._sum) / self.count
        return torch.as_tensor(self._products) / self.count - mean[:, None] * mean


def _observe(
    model: nn.Module, graph: PruningGraph, calibration: Calibration, images: int, samples: int
) -> dict[str, _Moments]:
    """Returns, by weight, the moments of the inputs of every layer that reads units."""
    moments: dict[str, _Moments] = {}
    by_target: dict[str, list[_Moments]] = {}
    for consumer in find_consumers(graph).values():
        if consumer.geometry.groups == 1 and (consumer.weight, 1) in graph.units:
            moments[consumer.weight] = _Moments(consumer)
            by_target.setdefault(consumer.target, []).append(moments[consumer.weight])
    by_node = {each.consumer.node: each for each in moments.values()}

    def before(node: Node, values: Values) -> None:
        if node.name in by_node:
            found = by_node[node.name]
            inputs, geometry = values[found.consumer.source], found.consumer.geometry
            total = output_positions(inputs, geometry)
            positions = sample_positions(total, samples, inputs.device)
            found.add(patches(inputs, geometry, positions)[0])

    def after(node: Node, values: Values) -> None:
        for found in by_target.get(node.name, ()):
            value = values[node.name]
            channel = 1 if found.consumer.geometry.kernel else -1
            outputs = value.movedim(channel, -1).flatten(0, -2)
            found.variance += outputs.var(0, correction=0).sum().item() * len(value)

    seen = 0
    for inputs, _ in calibration:
        Execution(graph).run(model, inputs, before=before, after=after)
        seen += count_rows(inputs)
        if seen >= images:
            break
    if not seen:
        raise ValueError("the obs criterion needs calibration data, but got no batch.")
    for found in moments.values():
        found.variance /= seen
    return moments


class _Reader:
    """One layer that reads the units: its weights and inverse Gram matrix while units leave."""

    def __init__(self, item: ChannelSlice, moments: _Moments, tensors: Mapping[str, Tensor]):
        consumer = moments.consumer
        weight = tensors[consumer.weight].detach().double().flatten(1)
        variance = moments.variance
        if consumer.norm is not None:
            deviation = (tensors[consumer.norm.variance].double() + consumer.norm.epsilon).sqrt()
            scale = tensors[consumer.norm.scale].detach().double() if consumer.norm.scale else 1.0
            gain = scale / deviation
            weight = weight * gain[:, None]
            if consumer.stream is None:
                variance = float((gain.square() * variance / len(gain)).sum())
        gram = moments.gram
        strength = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self.weight = weight / max(variance, 1e-12) ** 0.5
        self.inverse = torch.linalg.inv(gram + strength * eye)
        taps = weight.shape[1] // tensors[consumer.weight].shape[1]
        positions = torch.tensor(item.indices, device=gram.device)
        spread = positions[..., None] * taps + torch.arange(taps, device=gram.device)
        self.features = spread.flatten(1)  # units, features of one unit

    def costs(self, units: Tensor) -> Tensor:
        """Returns the error that each unit's removal adds, shape (len(units),)."""
        index = self.features[units]
        if index.shape[1] == 1:  # no spatial taps: the blocks are the diagonal
            line = index.squeeze(1)
            single: Tensor = self.weight[:, line].square().sum(0) / self.inverse.diagonal()[line]
            return single
        blocks = self.inverse[index[:, :, None], index[:, None, :]]
        weights = self.weight[:, index].movedim(0, -1)
        costs: Tensor = (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))
        return costs

    def remove(self, units: Tensor) -> None:
        """Removes units and refits the other weights."""
        index = self.features[units].flatten()
        block = self.inverse[index][:, index]
        gain = torch.linalg.solve(block, self.inverse[index])
        self.weight = self.weight - self.weight[:, index] @ gain
        self.inverse = self.inverse - self.inverse[:, index] @ gain
        keep = torch.ones(len(self.inverse), dtype=torch.bool, device=index.device)
        keep[index] = False
        moved = keep.cumsum(0) - 1
        self.weight = self.weight[:, keep]
        self.inverse = self.inverse[keep][:, keep]
        self.features = moved[self.features]


def _eliminate(size: int, readers: list[_Reader]) -> tuple[Tensor, Tensor]:
    """Returns the units in the order they leave, and the relative error each adds; (size,)."""
    device = readers[0].weight.device
    alive = torch.arange(size, device=device)
    order: list[Tensor] = []
    errors: list[Tensor] = []
    while len(alive):
        costs = torch.stack([reader.costs(alive) for reader in readers]).sum(0).clamp_min(0)
        leaving = costs.argsort(stable=True)[: max(1, len(alive) // _STEPS)]
        order.append(alive[leaving])
        errors.append(costs[leaving])
        for reader in readers:
            reader.remove(alive[leaving])
        stays = torch.ones(len(alive), dtype=torch.bool, device=device)
        stays[leaving] = False
        alive = alive[stays]
    return torch.cat(order), torch.cat(errors)

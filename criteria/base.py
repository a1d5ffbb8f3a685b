"""Criterion: a model and its groups in, one saliency per unit out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from paretoprune.surgery import PruningGraph

Calibration = Iterable[tuple[Any, Any]]
"""A re-iterable of (inputs, targets) batches of training data."""


class CostClass(IntEnum):
    """What a criterion needs, from cheap to dear."""

    WEIGHTS = 0
    ACTIVATIONS = 1
    GRADIENTS = 2
    HESSIAN = 3
    JACOBIAN = 4
    ABLATION = 5
    TRAINING = 6

    def __str__(self) -> str:
        return _COSTS[self]


_COSTS = (
    "weights alone",
    "one forward pass over the data",
    "one gradient pass over the data",
    "one gradient and Hessian pass over the data",
    "a backward pass per output over the data",
    "a forward pass per unit over few images",
    "a short training",
)


class Criterion(Protocol):
    """Scores all groups of a network in one call; implementations are frozen dataclasses.

    Attributes:
        summary: One line for people.
        paper: Where the method comes from.
        cost: What it needs.
    """

    summary: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[CostClass]

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """Returns the saliency of every unit of every group that is not frozen.

        Args:
            model: The dense network; left untouched.
            graph: Its graph.
            calibration: Training batches; criteria that look at weights alone ignore it. A
                `SharedCalibration` brings its loss, and shares its passes among criteria.

        Returns:
            By group name a float tensor of shape (group.size,); higher = keep. Saliencies of
            different groups can be ranked together.
        """
        ...


@runtime_checkable
class ScoresBlocks(Protocol):
    """A criterion that scores blocks by itself; see `block_saliency` for all others."""

    def blocks(
        self,
        model: nn.Module,
        graph: PruningGraph,
        calibration: Calibration,
        saliency: Mapping[str, Tensor],
    ) -> Mapping[str, float]:
        """Returns the saliency of every removable block, comparable with that of its units.

        Args:
            model: The dense network; left untouched.
            graph: Its graph.
            calibration: As for the units.
            saliency: Of the units.
        """
        ...


def sum_over_group(
    model: nn.Module, graph: PruningGraph, score: Callable[[str, Tensor], Tensor | None]
) -> dict[str, Tensor]:
    """Returns, per unit, the sum of an elementwise score over all coupled parameters.

    Args:
        model: The dense network.
        graph: Its graph.
        score: (qualified name, parameter) -> a score per element in the parameter's shape, or
            None to leave the parameter out.

    Returns:
        By open group a float32 tensor of shape (group.size,), on the CPU.
    """
    parameters = dict(model.named_parameters())
    scores: dict[str, Tensor | None] = {}
    lines: dict[tuple[str, int], Tensor] = {}
    saliency: dict[str, Tensor] = {}
    for group in graph.open_groups:
        total = torch.zeros(group.size)
        for item in group.slices:
            name = item.parameter
            if name not in parameters:  # a buffer: statistics are no weights
                continue
            if name not in scores:
                scores[name] = score(name, parameters[name].detach())
            values = scores[name]
            if values is None:
                continue
            key = (name, item.axis)
            if key not in lines:
                others = [axis for axis in range(values.ndim) if axis != item.axis]
                lines[key] = (values.sum(others) if others else values).float().cpu()
            total += lines[key][torch.tensor(item.indices)].sum(1)
        saliency[group.name] = total
    return saliency


def relative_to_mean(saliency: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns saliencies divided by their group's mean, so that groups of other scale compare."""
    return {
        name: values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)
        for name, values in saliency.items()
    }

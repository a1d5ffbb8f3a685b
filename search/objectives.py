"""What a search can optimise, and the reference points that hypervolumes count from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from paretoprune.criteria.statistics import loss_on
from paretoprune.search.metrics import device_of, evaluating, forward, to_device
from paretoprune.search.problem import Batch, Direction, Metric, Objective
from paretoprune.surgery import Cost

MEASURED: Mapping[str, tuple[Direction, str]] = MappingProxyType(
    {
        "loss": (Direction.MINIMIZE, "nats"),
        "accuracy": (Direction.MAXIMIZE, "fraction"),
        "macs": (Direction.MINIMIZE, "MACs"),
        "params": (Direction.MINIMIZE, "scalars"),
        "cka": (Direction.MAXIMIZE, "similarity"),
        "latency": (Direction.MINIMIZE, "ms"),
    }
)
"""Direction and unit of every metric that can be an objective of any search."""

SIMILARITY = "cka_to_parent"
"""Name of the metric that decides between the candidates of a step of `everything`."""


def own_metrics(measured: Mapping[str, float]) -> dict[str, float]:
    """Returns those of the measured metrics that are a problem's own."""
    others = {*MEASURED, SIMILARITY, "examples"}
    return {name: value for name, value in measured.items() if name not in others}


def measured_of(metrics: Mapping[str, Metric]) -> dict[str, tuple[Direction, str]]:
    """Returns direction and unit of every metric that can be an objective, with those given."""
    own = {name: (metric.direction, metric.unit) for name, metric in metrics.items()}
    return {**MEASURED, **own}


def directions_of(
    names: Iterable[str], measured: Mapping[str, tuple[Direction, str]] = MEASURED
) -> dict[str, Direction]:
    """Returns which way is better, of objectives by name."""
    return {name: measured[name][0] for name in names}


def objectives_of(
    names: Sequence[str],
    dense: Cost,
    dense_metrics: Mapping[str, float],
    chance: float,
    measured: Mapping[str, tuple[Direction, str]] = MEASURED,
) -> tuple[Objective, ...]:
    """Returns objectives with the reference points of one problem.

    Costs and the latency count from the dense network's, the loss from what a network reaches that
    knows nothing, accuracy and the similarity to the dense network from 0, and a metric of one's
    own from 0 where that is worse than the dense network's, else from its double.

    Args:
        names: Keys of `measured`.
        dense: Cost of the dense network.
        dense_metrics: Its `loss` and, for a classifier, `accuracy` on the search split; its
            `latency` where that was measured.
        chance: From `chance_loss`.
        measured: From `measured_of`.

    Raises:
        ValueError: If an objective is not measured on this problem.
    """
    references = {
        name: _worse(direction, dense_metrics[name])
        for name, (direction, _) in measured.items()
        if name in dense_metrics
    }
    references |= {"macs": float(dense.macs), "params": float(dense.params), "cka": 0.0}
    if "latency" in dense_metrics:
        references["latency"] = dense_metrics["latency"]
    loss = dense_metrics["loss"]
    references["loss"] = (
        chance if math.isfinite(chance) and chance > loss else loss + abs(loss) + 1
    )
    for name in names:
        if name not in references:
            raise ValueError(
                f"objective {name!r} is not measured on this problem; measured: "
                f"{', '.join(references)}."
            )
    return tuple(Objective(name, *measured[name], references[name]) for name in names)


def _worse(direction: Direction, dense: float) -> float:
    """Returns a value that is clearly worse than the dense network's."""
    if direction is Direction.MAXIMIZE:
        return 0.0 if dense > 0 else 2 * dense - (dense == 0)
    return 0.0 if dense < 0 else 2 * dense + (dense == 0)


def chance_loss(model: nn.Module, batch: Batch, loss: Callable[[Any, Any], Tensor]) -> float:
    """Returns the loss of outputs that are all 0; for cross-entropy that is the uniform guess.

    Args:
        model: For the shape of its outputs.
        batch: (inputs, targets).
        loss: (outputs, targets) -> scalar mean loss.
    """
    (inputs, targets), device = batch, device_of(model)
    with evaluating(model), torch.no_grad():
        outputs = tree_map_only(Tensor, torch.zeros_like, forward(model, inputs))
        return float(loss_on(loss, device)(outputs, to_device(targets, device)))

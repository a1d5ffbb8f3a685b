"""What a search can optimise, and the reference points that hypervolumes count from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.search.metrics import device_of, evaluating, forward
from paretoprune.search.problem import Batch, Direction, Objective
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
"""Direction and unit of every metric that can be an objective."""


def objectives_of(
    names: Sequence[str], dense: Cost, dense_metrics: Mapping[str, float], chance: float
) -> tuple[Objective, ...]:
    """Returns objectives with the reference points of one problem.

    Costs and the latency count from the dense network's, the loss from what a network reaches that
    knows nothing, accuracy and the similarity to the dense network from 0.

    Args:
        names: Keys of `MEASURED`.
        dense: Cost of the dense network.
        dense_metrics: Its `loss` and, for a classifier, `accuracy` on the search split; its
            `latency` where that was measured.
        chance: From `chance_loss`.

    Raises:
        ValueError: If an objective is not measured on this problem.
    """
    references = {"macs": float(dense.macs), "params": float(dense.params), "cka": 0.0}
    if "accuracy" in dense_metrics:
        references["accuracy"] = 0.0
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
    return tuple(Objective(name, *MEASURED[name], references[name]) for name in names)


def chance_loss(model: nn.Module, batch: Batch, loss: Callable[[Any, Tensor], Tensor]) -> float:
    """Returns the loss of outputs that are all 0; for cross-entropy that is the uniform guess.

    Args:
        model: For the shape of its outputs.
        batch: (inputs, targets).
        loss: (outputs, targets) -> scalar mean loss.
    """
    inputs, targets = batch
    with evaluating(model), torch.no_grad():
        outputs = _zeros(forward(model, inputs))
        return float(loss(outputs, targets.to(device_of(model))))


def _zeros(outputs: Any) -> Any:
    """Returns outputs of the same structure with zeros for every tensor."""
    if isinstance(outputs, Tensor):
        return torch.zeros_like(outputs)
    if isinstance(outputs, dict):
        return type(outputs)({name: _zeros(value) for name, value in outputs.items()})
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(_zeros(value) for value in outputs)
    return outputs

"""evaluate: the loss and accuracy of a network on a split, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from paretoprune.criteria.statistics import loss_on
from paretoprune.search.problem import Batch, Metric, Tally
from paretoprune.surgery.inputs import count_rows
from paretoprune.surgery.program import as_call


def to_device(value: Any, device: torch.device) -> Any:
    """Returns `value` with every tensor in it (through tuples, lists and dicts) on `device`."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the model's first parameter; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def forward(model: nn.Module, inputs: Any) -> Any:
    """Returns the outputs of `model` for the inputs of one batch, which are moved to its device.

    Args:
        model: Called as it is; its mode is not changed.
        inputs: A tensor, a tuple of arguments or a dict of keyword arguments.
    """
    args, kwargs = as_call(to_device(inputs, device_of(model)))
    return model(*args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module of `model` in eval mode, and back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a network on a split.

    Attributes:
        metrics: `loss`, for a classifier `accuracy`, and those of one's own.
        losses: Mean loss of every batch that was measured, in order.
        whole: Whether that is all of them.
    """

    metrics: dict[str, float]
    losses: tuple[float, ...]
    whole: bool


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    metrics: Mapping[str, Metric] = MappingProxyType({}),
) -> dict[str, float]:
    """Returns `loss` (mean per example), for a classifier `accuracy` (top-1), and metrics given.

    The mean is over examples, not over batches, so batches of different sizes do not bias it.
    Accuracy is there where outputs, or their `logits`, are a tensor with two classes or more along
    dim 1 and targets are integers of the remaining shape; those that name no class, such as -100
    or 255, are not counted.

    Args:
        model: Evaluated in eval mode and without gradients; left as it was.
        batches: (inputs, targets) batches; tensors of targets have shape (n, ...).
        loss: (outputs, targets) -> scalar mean loss of the batch.
        metrics: What else is measured, by name.

    Raises:
        ValueError: If there is no example.
    """
    return evaluate_until(model, batches, loss, metrics, lambda losses: False).metrics


def evaluate_until(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Any, Any], Tensor],
    metrics: Mapping[str, Metric],
    stop: Callable[[Sequence[float]], bool],
) -> Measured:
    """Returns what `evaluate` does, of the batches until it is stopped.

    Args:
        model: As of `evaluate`.
        batches: As of `evaluate`.
        loss: As of `evaluate`.
        metrics: As of `evaluate`.
        stop: Asked after every batch, with the mean losses of the batches so far.

    Raises:
        ValueError: If there is no example.
    """
    examples = labels = 0
    total = 0.0
    losses: list[float] = []
    whole = True
    correct: int | None = 0
    loss = loss_on(loss, device_of(model))
    tallies = {name: _tally(metric, device_of(model)) for name, metric in metrics.items()}
    with evaluating(model), torch.no_grad():
        for inputs, targets in batches:
            count = count_rows(targets)
            if not count:
                continue
            outputs = forward(model, inputs)
            targets = to_device(targets, device_of(model))
            losses.append(float(loss(outputs, targets)))
            total += losses[-1] * count
            examples += count
            hits = _hits(outputs, targets)
            if hits is None or correct is None:
                correct = None
            else:
                correct, labels = correct + hits[0], labels + hits[1]
            for tally in tallies.values():
                tally.update(outputs, targets)
            if stop(losses):
                whole = False
                break
    if not examples:
        raise ValueError("evaluation needs at least one example, but the split is empty.")
    found = {"loss": total / examples}
    if correct is not None and labels:
        found["accuracy"] = correct / labels
    found |= {name: float(tally.compute()) for name, tally in tallies.items()}
    return Measured(found, tuple(losses), whole)


class _Mean:
    """The mean over examples of what a function returns for batches; a `Tally`."""

    def __init__(self, measure: Callable[[Any, Any], Any]) -> None:
        self._measure = measure
        self.reset()

    def reset(self) -> None:
        self._total, self._examples = 0.0, 0

    def update(self, outputs: Any, targets: Any, /) -> None:
        count = count_rows(targets)
        self._total += float(self._measure(outputs, targets)) * count
        self._examples += count

    def compute(self) -> float:
        return self._total / self._examples


def _tally(metric: Metric, device: torch.device) -> Tally:
    """Returns what counts a metric from nothing on, on a device."""
    if not isinstance(metric.measure, Tally):
        return _Mean(metric.measure)
    tally = copy.deepcopy(metric.measure)
    if isinstance(tally, nn.Module):  # those of torchmetrics are
        tally.to(device)
    tally.reset()
    return tally


def _hits(outputs: Any, targets: Any) -> tuple[int, int] | None:
    """Returns how many labels are correct, and of how many; None where that has no meaning."""
    outputs = getattr(outputs, "logits", outputs)  # as networks of Hugging Face return them
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if outputs.dim() < 2 or targets.is_floating_point():
        return None
    if outputs.shape[:1] + outputs.shape[2:] != targets.shape or outputs.shape[1] < 2:
        return None
    counted = (targets >= 0) & (targets < outputs.shape[1])  # others are ignored, as losses do
    return int((outputs.argmax(1)[counted] == targets[counted]).sum()), int(counted.sum())

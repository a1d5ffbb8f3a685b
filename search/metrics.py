"""evaluate: the loss and accuracy of a network on a split, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from paretoprune.search.problem import Batch
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
        metrics: `loss` and, for a classifier, `accuracy`.
        losses: Mean loss of every batch that was measured, in order.
        whole: Whether that is all of them.
    """

    metrics: dict[str, float]
    losses: tuple[float, ...]
    whole: bool


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, float]:
    """Returns `loss` (mean per example) and, for a classifier, `accuracy` (top-1, a fraction).

    The mean is over examples, not over batches, so batches of different sizes do not bias it.
    Accuracy is there where outputs are a tensor with classes along dim 1 and targets are
    integers of the remaining shape.

    Args:
        model: Evaluated in eval mode and without gradients; left as it was.
        batches: (inputs, targets) batches; targets have shape (n, ...).
        loss: (outputs, targets) -> scalar mean loss of the batch.

    Raises:
        ValueError: If there is no example.
    """
    return evaluate_until(model, batches, loss, lambda losses: False).metrics


def evaluate_until(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Any, Tensor], Tensor],
    stop: Callable[[Sequence[float]], bool],
) -> Measured:
    """Returns what `evaluate` does, of the batches until it is stopped.

    Args:
        model: As of `evaluate`.
        batches: As of `evaluate`.
        loss: As of `evaluate`.
        stop: Asked after every batch, with the mean losses of the batches so far.

    Raises:
        ValueError: If there is no example.
    """
    examples = labels = 0
    total = 0.0
    losses: list[float] = []
    whole = True
    correct: int | None = 0
    with evaluating(model), torch.no_grad():
        for inputs, targets in batches:
            if not len(targets):
                continue
            outputs = forward(model, inputs)
            targets = targets.to(device_of(model))
            losses.append(float(loss(outputs, targets)))
            total += losses[-1] * len(targets)
            examples += len(targets)
            labels += targets.numel()
            hits = _hits(outputs, targets)
            correct = None if hits is None or correct is None else correct + hits
            if stop(losses):
                whole = False
                break
    if not examples:
        raise ValueError("evaluation needs at least one example, but the split is empty.")
    metrics = {"loss": total / examples}
    if correct is not None:
        metrics["accuracy"] = correct / labels
    return Measured(metrics, tuple(losses), whole)


def _hits(outputs: Any, targets: Tensor) -> int | None:
    """Returns the number of correct labels; None where accuracy has no meaning."""
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or targets.is_floating_point():
        return None
    if outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        return None
    return int((outputs.argmax(1) == targets).sum())

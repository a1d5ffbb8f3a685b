"""evaluate: the loss and accuracy of a network on a split, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
    examples = labels = 0
    total = 0.0
    correct: int | None = 0
    with evaluating(model), torch.no_grad():
        for inputs, targets in batches:
            if not len(targets):
                continue
            outputs = forward(model, inputs)
            targets = targets.to(device_of(model))
            total += float(loss(outputs, targets)) * len(targets)
            examples += len(targets)
            labels += targets.numel()
            hits = _hits(outputs, targets)
            correct = None if hits is None or correct is None else correct + hits
    if not examples:
        raise ValueError("evaluation needs at least one example, but the split is empty.")
    metrics = {"loss": total / examples}
    return metrics if correct is None else {**metrics, "accuracy": correct / labels}


def _hits(outputs: Any, targets: Tensor) -> int | None:
    """Returns the number of correct labels; None where accuracy has no meaning."""
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or targets.is_floating_point():
        return None
    if outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        return None
    return int((outputs.argmax(1) == targets).sum())

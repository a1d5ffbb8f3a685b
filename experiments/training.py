"""train: one training loop, for training on the spot and for fine-tuning."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from paretoprune.search.metrics import device_of, forward
from paretoprune.search.problem import Batch

Progress = Callable[[str], None]
"""Receives one line of text per step of a long job."""


def silent(_line: str) -> None:
    """Shows no progress."""


@dataclass(frozen=True, slots=True)
class Training:
    """How to train: SGD with Nesterov momentum, linear warm-up, then cosine decay to zero.

    Attributes:
        epochs: Passes over the training batches; at least 1.
        learning_rate: The peak, positive.
        warmup: Fraction of all steps before the peak, in [0, 1).
        momentum: Nesterov momentum, in (0, 1).
        weight_decay: L2 penalty of matrices and kernels; biases and norms have none.
        label_smoothing: Probability mass moved to the other classes, in [0, 1). Szegedy et al.,
            CVPR 2016, arXiv:1512.00567.
        seed: Seeds what the network itself draws, such as dropout.

    Raises:
        ValueError: If a value is outside its range.
    """

    epochs: int
    learning_rate: float
    warmup: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "epochs": (self.epochs >= 1, "be at least 1"),
            "learning_rate": (self.learning_rate > 0, "be positive"),
            "warmup": (0 <= self.warmup < 1, "lie in [0, 1)"),
            "momentum": (0 < self.momentum < 1, "lie in (0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "not be negative"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "lie in [0, 1)"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` must {rule}, but got {getattr(self, name)}.")


class Epochs(Protocol):
    """A re-iterable of a known number of batches; every iteration is an epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


def train(
    model: nn.Module,
    batches: Epochs,
    training: Training,
    *,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    progress: Progress = silent,
) -> nn.Module:
    """Returns a trained copy of a network, in eval mode; the network itself is left untouched.

    On one device and with the same number of threads, the result depends on the arguments alone.

    Args:
        model: Where training starts.
        batches: (inputs, targets) batches: a DataLoader, a list, or `splits.TrainingBatches`.
        training: How to train.
        loss: (outputs, targets) -> scalar mean loss; by default the cross entropy with the label
            smoothing of `training`.
        progress: Receives a line per epoch, with the time left.

    Raises:
        ValueError: If there are no batches, or the loss stops being finite.
    """
    steps = len(batches)
    if not steps:
        raise ValueError("training needs at least one batch, but got none.")
    model = copy.deepcopy(model).train()
    loss = loss or partial(F.cross_entropy, label_smoothing=training.label_smoothing)
    optimizer = _optimizer(model, training)
    schedule = LambdaLR(optimizer, partial(_rate, training.warmup, steps * training.epochs))
    started = time.monotonic()
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(training.seed)
        for epoch in range(1, training.epochs + 1):
            mean = _run_epoch(model, batches, loss, optimizer, schedule)
            if not math.isfinite(mean):
                raise ValueError(
                    f"training diverged: the loss is {mean} in epoch {epoch}; take a lower "
                    f"learning rate than {training.learning_rate}."
                )
            left = (time.monotonic() - started) / epoch * (training.epochs - epoch)
            progress(f"epoch {epoch}/{training.epochs}, loss {mean:.3f}, {left:.0f} s left")
    return model.eval()


def _run_epoch(
    model: nn.Module,
    batches: Epochs,
    loss: Callable[[Any, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
) -> float:
    """Trains for one epoch; returns the mean loss of its batches."""
    total = 0.0
    for inputs, targets in batches:
        value = loss(forward(model, inputs), targets.to(device_of(model)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        total += float(value.detach())
    return total / len(batches)


def _optimizer(model: nn.Module, training: Training) -> torch.optim.SGD:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        momentum=training.momentum,
        nesterov=True,
    )


def _rate(warmup: float, steps: int, step: int) -> float:
    """Returns the fraction of the peak learning rate at a step."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    device = device_of(model)
    return [device] if device.type == "cuda" else []

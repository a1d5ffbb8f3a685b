"""FineTuner: how a search trains, with the training data that it takes for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.experiments.data.splits import TrainingBatches
from paretoprune.experiments.training import Training, train
from paretoprune.search import Problem
from paretoprune.search.evaluation import on_device
from paretoprune.search.metrics import device_of, evaluating, forward
from paretoprune.search.problem import Epochs
from paretoprune.surgery.progress import Lines

FINETUNING = Training(epochs=1, learning_rate=0.02, warmup=0.05)
"""From weights that are nearly right: a lower rate than from scratch."""
FINETUNING_ADAMW = Training(
    epochs=1, learning_rate=1e-4, optimizer="adamw", warmup=0.05, weight_decay=0.05
)
"""Likewise, of networks that `finetuning_for` does not train by SGD."""
DISTILLATION = 0.7
"""Weight of the dense network's outputs against the targets, where they are distilled."""


def finetuning_for(model: nn.Module) -> Training:
    """Returns how a network is fine-tuned: by SGD where BatchNorm normalises, else by AdamW.

    Behind a BatchNorm the length of weights has no effect, which forgives the large steps of SGD
    (Arora et al., ICLR 2019, arXiv:1812.03981). Behind other norms they do harm.
    """
    kinds = {type(module) for module in model.modules()}
    batch = any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds)
    other = any(issubclass(kind, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) for kind in kinds)
    return FINETUNING if batch and not other else FINETUNING_ADAMW


@dataclass(frozen=True)
class FineTuner:
    """A `search.finetuning.Trainer`; picklable, with its data.

    Attributes:
        batches: Training data with the training augmentation; small images lie on the GPU where
            there is one.
        training: How; epochs and seed are the search's.
        loss: (outputs, targets) -> scalar mean loss; None takes the cross entropy with the label
            smoothing of `training`.
        teacher: Whose outputs are distilled; None distils nothing.
    """

    batches: Epochs
    training: Training = FINETUNING
    loss: Callable[[Any, Any], Tensor] | None = None
    teacher: nn.Module | None = None

    @staticmethod
    def of(problem: Problem, *, distil: bool, training: Training | None = None) -> FineTuner:
        """Returns the trainer of a problem.

        Args:
            problem: With `training`.
            distil: Whether the dense network's outputs are distilled.
            training: How else; None takes what suits the network, see `finetuning_for`.

        Raises:
            ValueError: If the problem has no training data, or nothing that can be distilled.
        """
        if problem.training is None:
            raise ValueError(
                f"fine-tuning needs training data, but the problem {problem.name!r} has none; "
                f"give its field `training`."
            )
        if distil:
            _check_classes(problem)
        training = training or finetuning_for(problem.model)
        return FineTuner(
            problem.training,
            replace(training, distillation=DISTILLATION) if distil else training,
            None if problem.loss is F.cross_entropy else problem.loss,
            problem.model if distil else None,
        )

    def __call__(
        self,
        network: nn.Module,
        *,
        epochs: int,
        seed: int,
        checkpoint: Path,
        progress: Lines,
    ) -> nn.Module:
        """Returns a trained copy of a network; see `Trainer`."""
        device = device_of(network)
        batches = self.batches
        if isinstance(batches, TrainingBatches):
            batches = batches.on(device)
        return train(
            network,
            batches,
            replace(self.training, epochs=epochs, seed=seed),
            loss=self.loss,
            teacher=None if self.teacher is None else on_device(self.teacher),
            checkpoint=checkpoint,
            progress=progress,
        )


def _check_classes(problem: Problem) -> None:
    """Verifies that the dense network returns what is distilled: a logit for each class."""
    inputs, targets = next(iter(problem.calibration))
    with evaluating(problem.model), torch.no_grad():
        outputs = forward(problem.model, inputs)
    tensors = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    if tensors and outputs.dim() > 1 and outputs.shape[1] > 1:
        integers = not targets.is_floating_point()
        classes = integers and outputs.shape[:1] + outputs.shape[2:] == targets.shape
        if classes or problem.loss is F.cross_entropy:  # of which a search has checked the targets
            return
    got = (
        f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
    )
    kind = f"a {type(targets).__name__}"
    if isinstance(targets, Tensor):
        numbers = "floats" if targets.is_floating_point() else "integers"
        kind = f"{numbers} of shape {tuple(targets.shape)}"
    raise ValueError(
        f"distillation compares probabilities of classes, so that a network returns a tensor of "
        f"shape (n, classes, ...) for targets that are classes, (n, ...), but {problem.name} "
        f"returns {got} for {kind}; train without it."
    )

"""train: one training loop, for training on the spot and for fine-tuning."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map_only

from paretoprune.criteria import fingerprint
from paretoprune.criteria.checkpoint import Checkpoint
from paretoprune.criteria.precision import in_mixed_precision
from paretoprune.criteria.statistics import loss_on
from paretoprune.experiments.data.sources import picked
from paretoprune.search.metrics import device_of, to_device
from paretoprune.search.problem import Batch, Epochs
from paretoprune.surgery.inputs import count_rows
from paretoprune.surgery.progress import Lines, silent

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> scalar mean loss."""


@dataclass(frozen=True, slots=True)
class Training:
    """How to train: linear warm-up, then cosine decay to zero.

    Attributes:
        epochs: Passes over the training batches; at least 1.
        learning_rate: The peak, positive.
        optimizer: `sgd`, with Nesterov momentum, or `adamw`: Loshchilov & Hutter, ICLR 2019,
            arXiv:1711.05101.
        warmup: Fraction of all steps before the peak, in [0, 1).
        momentum: Of the gradients, in (0, 1); the first beta of `adamw`.
        weight_decay: L2 penalty of matrices and kernels, of `adamw` apart from the gradient;
            biases and norms have none.
        label_smoothing: Probability mass moved to the other classes, in [0, 1). Szegedy et al.,
            CVPR 2016, arXiv:1512.00567.
        distillation: Weight of the teacher against the targets, in [0, 1]. Hinton et al., 2015,
            arXiv:1503.02531.
        temperature: That both softmaxes of the distillation are taken at, positive.
        average: Decay of the exponential moving average of weights and statistics that is
            returned in place of the last ones, in [0, 1); 0 takes none.
        draws: Epochs whose batches are drawn; later epochs take the same batches in turn, and the
            teacher, which has seen them, is not asked again: its outputs are kept on the device,
            four bytes for each example, class and draw. Shen & Xing, ECCV 2022, arXiv:2112.01528.
            0 draws every epoch anew.
        mixup: Alpha of the distribution Beta(alpha, alpha) of the weight that the examples of a
            batch have against others of it, drawn for every batch; 0 mixes none. Zhang et al.,
            ICLR 2018, arXiv:1710.09412; a teacher is asked about the mixed examples: Beyer et
            al., CVPR 2022, arXiv:2106.05237. Not where batches recur.
        seed: Seeds what the network itself draws, such as dropout.

    Raises:
        ValueError: If a value is outside its range.
    """

    epochs: int
    learning_rate: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    warmup: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    distillation: float = 0.0
    temperature: float = 4.0
    average: float = 0.0
    draws: int = 0
    mixup: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "epochs": (self.epochs >= 1, "be at least 1"),
            "learning_rate": (self.learning_rate > 0, "be positive"),
            "optimizer": (self.optimizer in ("sgd", "adamw"), "be 'sgd' or 'adamw'"),
            "warmup": (0 <= self.warmup < 1, "lie in [0, 1)"),
            "momentum": (0 < self.momentum < 1, "lie in (0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "not be negative"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "lie in [0, 1)"),
            "distillation": (0 <= self.distillation <= 1, "lie in [0, 1]"),
            "temperature": (self.temperature > 0, "be positive"),
            "average": (0 <= self.average < 1, "lie in [0, 1)"),
            "draws": (self.draws >= 0, "not be negative"),
            "mixup": (
                self.mixup >= 0 and not (self.mixup and self.draws),
                "not be negative, and be 0 where batches recur",
            ),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` must {rule}, but got {getattr(self, name)!r}.")


@runtime_checkable
class NumberedEpochs(Protocol):
    """Batches whose epochs depend on their number alone, from 0."""

    def epoch(self, number: int) -> Iterable[Batch]:
        """Returns the batches of one epoch."""
        ...


def train(
    model: nn.Module,
    batches: Epochs,
    training: Training,
    *,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    checkpoint: Path | None = None,
    progress: Lines = silent,
) -> nn.Module:
    """Returns a trained copy of a network, in eval mode; the network itself is left untouched.

    On one device and with the same number of threads, the result depends on the arguments alone;
    a training that was broken off and goes on from its checkpoint ends as it would have without a
    break. On a GPU that holds as far as its kernels add in a fixed order, which those of cuDNN are
    told to do; the gradients of some poolings and interpolations have none. Where the device
    multiplies in bfloat16 (`criteria.precision`), autocast does. Weights stay in the layout that
    they have: lay them out channels last before.

    Args:
        model: Where training starts.
        batches: (inputs, targets) batches: a DataLoader, a list, or `splits.TrainingBatches`.
        training: How to train.
        loss: (outputs, targets) -> scalar mean loss; by default the cross entropy with the label
            smoothing of `training`.
        teacher: Whose outputs are distilled, with the weight of `training`; on the same device.
        penalty: Of the network, added to the loss of every batch.
        checkpoint: File that is written after every epoch; where it is there, for the same
            network, settings, losses and data, training goes on from it; that of another training
            is not taken, and a line says so. Data are compared by their number of batches, and by
            their first batch if they are a sequence or `NumberedEpochs` or by how they show
            themselves if not. Epochs that are done are read again where they have no numbers.
        progress: Receives a line per epoch, with images per second and the time left.

    Raises:
        ValueError: If there are no batches, a teacher is missing, batches that cannot be drawn
            again are to recur, inputs cannot be mixed, or the loss stops being finite.
    """
    if not len(batches):
        raise ValueError("training needs at least one batch, but got none.")
    if training.distillation and teacher is None:
        raise ValueError("distillation needs a teacher, but got none.")
    if training.draws and not isinstance(batches, NumberedEpochs):
        raise ValueError(
            "`draws` needs batches with a method `epoch(number)`, but got a "
            f"{type(batches).__name__}."
        )
    own = None if loss is None else loss_on(loss, device_of(model))
    run = _Run(model, training, _loss(training, own, teacher), penalty, len(batches))
    kept = None
    if checkpoint is not None:
        given = (training, loss, penalty, teacher, len(batches))
        key = [fingerprint.of_model(model), *map(fingerprint.of_setting, given)]
        key.append(fingerprint.of_data(batches))
        if isinstance(batches, NumberedEpochs):  # they show which examples they take, not of what
            key.append(fingerprint.of_batches([next(iter(batches.epoch(0)))]))
        kept = Checkpoint(checkpoint, json.dumps(key))
    done = 0 if kept is None else kept.read(run.networks, run.optimizer, progress)
    started = time.monotonic()
    with _repeatable(run.device):
        for epoch in range(training.epochs):
            torch.manual_seed((training.seed << 20) + epoch)
            if epoch < done:
                run.skip(batches)
                continue
            begun = time.monotonic()
            mean, examples = run.epoch(batches, epoch)
            if not math.isfinite(mean):
                raise ValueError(
                    f"training diverged: the loss is {mean} in epoch {epoch + 1}; take a lower "
                    f"learning rate than {training.learning_rate}."
                )
            if kept is not None:
                kept.write(epoch + 1, run.networks, run.optimizer)
            now = time.monotonic()
            rate = examples / max(now - begun, 1e-9)
            left = (now - started) / (epoch + 1 - done) * (training.epochs - epoch - 1)
            progress(
                f"epoch {epoch + 1}/{training.epochs}, loss {mean:.3f}, {rate:,.0f} images/s, "
                f"{left:.0f} s left"
            )
    return run.result()


class _Run:
    """The state of one training."""

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        loss: Callable[[_Seen, Any, Tensor], Tensor],
        penalty: Callable[[nn.Module], Tensor] | None,
        steps: int,
    ) -> None:
        self.device = device_of(model)
        self._network = copy.deepcopy(model).train()
        self._training = training
        self._loss = loss
        self._penalty = penalty
        self._steps = steps
        self.networks: dict[str, nn.Module] = {"network": self._network}
        self.optimizer = _optimizer(self._network, training)
        self._average: AveragedModel | None = None
        if training.average:
            self._average = AveragedModel(
                self._network,
                multi_avg_fn=get_ema_multi_avg_fn(training.average),
                use_buffers=True,
            )
            self.networks["average"] = self._average

    def skip(self, batches: Epochs) -> None:
        """Reads an epoch that is done, so that batches drawn at random go on where they were."""
        if not isinstance(batches, NumberedEpochs):
            for _ in batches:
                pass

    def epoch(self, batches: Epochs, number: int) -> tuple[float, int]:
        """Trains for one epoch; returns the mean loss of its batches and the examples."""
        total = torch.zeros((), device=self.device)
        step, examples = number * self._steps, 0
        draw = number % self._training.draws if self._training.draws else number
        drawn = batches.epoch(draw) if isinstance(batches, NumberedEpochs) else batches
        for position, (inputs, targets) in enumerate(drawn):
            for group in self.optimizer.param_groups:
                group["lr"] = self._training.learning_rate * self._rate(step)
            count = count_rows(targets)
            inputs, targets = to_device((inputs, targets), self.device)
            seen = _seen(inputs, (draw, position), self._training.mixup, count)
            outputs = in_mixed_precision(self._network, seen.inputs, self.device)
            value = self._loss(seen, outputs, targets)
            if self._penalty is not None:
                value = value + self._penalty(self._network)
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
            if self._average is not None:
                self._average.update_parameters(self._network)
            total += value.detach()  # on the device: reading it would wait for every step
            step, examples = step + 1, examples + count
        return float(total) / self._steps, examples

    def _rate(self, step: int) -> float:
        """Returns the fraction of the peak learning rate at a step."""
        steps = self._steps * self._training.epochs
        rising = self._training.warmup * steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))

    def result(self) -> nn.Module:
        """Returns the trained network."""
        network = self._network if self._average is None else self._average.module
        network.zero_grad()
        return network.eval()


class _Seen(NamedTuple):
    """What a network saw of a batch.

    Attributes:
        inputs: Of the batch, mixed where that is asked for.
        key: The number of the draw, and of the batch in it.
        weight: That every example has against the one that it is mixed with.
        others: The positions of these, shape (n,); None without mixup.
    """

    inputs: Any
    key: tuple[int, int]
    weight: float = 1.0
    others: Tensor | None = None


def _seen(inputs: Any, key: tuple[int, int], mixup: float, count: int) -> _Seen:
    if not mixup:
        return _Seen(inputs, key)
    weight = float(torch.distributions.Beta(mixup, mixup).sample())
    others = torch.randperm(count)

    def mixed(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point() or len(leaf) != count:
            raise ValueError(
                f"mixup needs inputs that are floating-point tensors with a row per example, but "
                f"got {leaf.dtype} of shape {tuple(leaf.shape)} for {count} examples."
            )
        return weight * leaf + (1 - weight) * leaf[others.to(leaf.device)]

    return _Seen(tree_map_only(Tensor, mixed, inputs), key, weight, others)


def _loss(
    training: Training, loss: Loss | None, teacher: nn.Module | None
) -> Callable[[_Seen, Any, Tensor], Tensor]:
    """Returns (seen, outputs, targets) -> the loss that is minimised."""
    unmixed = loss or partial(F.cross_entropy, label_smoothing=training.label_smoothing)

    def own(seen: _Seen, outputs: Any, targets: Any) -> Tensor:
        value = unmixed(outputs, targets)
        if seen.others is None:
            return value
        other = unmixed(outputs, picked(targets, seen.others))
        return seen.weight * value + (1 - seen.weight) * other

    weight = training.distillation
    if teacher is None or not weight:
        return own
    wise = copy.deepcopy(teacher).eval().requires_grad_(False)
    kept: dict[tuple[int, int], Any] = {}

    def distilled(seen: _Seen, outputs: Any, targets: Any) -> Tensor:
        taught = kept.get(seen.key)
        if taught is None:
            with torch.no_grad():
                taught = in_mixed_precision(wise, seen.inputs, device_of(wise))
            if 0 < training.draws < training.epochs:  # else no batch comes again
                kept[seen.key] = taught
        value = weight * distillation_loss(outputs, taught, training.temperature)
        return value if weight == 1 else value + (1 - weight) * own(seen, outputs, targets)

    return distilled


def distillation_loss(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Returns T² KL(teacher || student) of softmaxes at temperature T, the mean over examples.

    Args:
        outputs: Logits of the student, shape (n, classes, ...).
        taught: Logits of the teacher, likewise.
        temperature: T.
    """
    student = F.log_softmax(outputs / temperature, 1)
    wise = F.log_softmax(taught / temperature, 1)
    return temperature**2 * (wise.exp() * (wise - student)).sum(1).mean()


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() <= 1]
    both = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in both if group["params"]]
    rate, momentum = training.learning_rate, training.momentum
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=(momentum, 0.999))
    return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=True)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Leaves torch's generators as they were, and takes kernels that add in a fixed order."""
    cuda = [device] if device.type == "cuda" else []
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    with torch.random.fork_rng(devices=cuda):
        cudnn.benchmark, cudnn.deterministic = False, True  # `flags` would change TF32, too
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before

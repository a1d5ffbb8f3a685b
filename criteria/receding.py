"""Receding Neuron Importances: sparsity training of bounded BatchNorm scales.

Adamczewski & Park et al., arXiv:2204.06404; equations and hyper-parameters as in the authors' code
(xapharius/receding-neuron-importances). SigBN is BatchNorm with the scale sigmoid(gamma) and no
shift; sigmoid(gamma) is the importance of a channel. Training adds lambda R to the loss,

    R = sum over all channels of  s (1 - ln s),   s = sigmoid(gamma + b)

whose gradient -s (1 - s) ln s vanishes for important channels and for dead ones, so that only weak
channels recede; the offset b, used nowhere else, makes it push ever weaker ones only. gamma learns
ten times as fast as the weights and without weight decay.

The paper trains from scratch. Here a trained network is converted: scales are divided by a little
more than the largest of their norm, and signs and shifts are dropped, which changes the network,
so that a short training must repair it. Back-conversion is exact in eval mode.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from paretoprune.criteria import fingerprint
from paretoprune.criteria.base import Calibration, CostClass
from paretoprune.criteria.bn_scale import BnScale
from paretoprune.criteria.checkpoint import Checkpoint
from paretoprune.criteria.precision import in_mixed_precision
from paretoprune.criteria.shared import SharedCalibration
from paretoprune.criteria.statistics import Loss, loss_on
from paretoprune.surgery import PruningGraph
from paretoprune.surgery.inputs import count_rows
from paretoprune.surgery.progress import Lines, silent

_ROOM = 0.95  # the largest scale of a converted norm: sigmoid(gamma) reaches 1 nowhere
_SMALLEST = 1e-4


class SigBatchNorm(nn.Module):
    """BatchNorm with a scale of sigmoid(gamma) and no shift.

    Args:
        norm: A BatchNorm, whose statistics are taken over and whose scale and shift are dropped.
        scale: Initial scales in (0, 1), shape (channels,).
    """

    def __init__(self, norm: _NormBase, scale: Tensor) -> None:
        super().__init__()
        norm.weight = norm.bias = None  # type: ignore[assignment]
        self.norm = norm
        self.gamma = nn.Parameter(scale.detach().logit())
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:
        """Returns normalised `x`, shape (n, channels, ...), times the scales."""
        scale = self.gamma.sigmoid().reshape(-1, *[1] * (x.ndim - 2))
        normalised: Tensor = self.norm(x)
        return normalised * scale


def to_sigbn(model: nn.Module) -> nn.Module:
    """Returns a copy in which every BatchNorm with a scale is a `SigBatchNorm`."""

    def bounded(module: nn.Module) -> nn.Module:
        if not isinstance(module, _NormBase) or module.weight is None:
            return module
        scale = module.weight.detach().abs()
        largest = scale.max().clamp_min(torch.finfo(scale.dtype).tiny)  # all may be 0
        return SigBatchNorm(module, (_ROOM * scale / largest).clamp_min(_SMALLEST))

    return _replaced(copy.deepcopy(model), bounded)


def to_batch_norm(model: nn.Module) -> nn.Module:
    """Returns a copy in which every `SigBatchNorm` is a BatchNorm again, with a shift of zero."""

    def plain(module: nn.Module) -> nn.Module:
        if not isinstance(module, SigBatchNorm):
            return module
        norm: Any = module.norm
        norm.weight = nn.Parameter(module.gamma.detach().sigmoid())
        norm.bias = nn.Parameter(torch.zeros_like(norm.weight))
        return norm.train(module.training)  # type: ignore[no-any-return]

    return _replaced(copy.deepcopy(model), plain)


def _replaced(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Returns `model` with every module in it that `change` changes in its place."""
    known: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        if isinstance(parent, SigBatchNorm):
            continue
        for name, child in list(parent.named_children()):
            known.setdefault(id(child), change(child))
            if known[id(child)] is not child:
                setattr(parent, name, known[id(child)])
    return change(model)


def is_receded(model: nn.Module) -> bool:
    """Whether all BatchNorms are what a back-converted SigBN is: bounded scales, no shifts."""
    return all(
        bool(((norm.weight > 0) & (norm.weight < 1)).all())
        and not bool(norm.bias is not None and norm.bias.any())
        for norm in _norms(model)
    )


def gammas(model: nn.Module) -> list[nn.Parameter]:
    """Returns the gammas of all `SigBatchNorm`s, each of shape (channels,)."""
    return [module.gamma for module in model.modules() if isinstance(module, SigBatchNorm)]


def receding_penalty(gamma: Tensor, offset: float = 0.0) -> Tensor:
    """Returns R, the sum of s (1 - ln s) with s = sigmoid(gamma + offset)."""
    logarithm = F.logsigmoid(gamma + offset)
    return (logarithm.exp() * (1 - logarithm)).sum()


def _norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.weight is not None]


@dataclass(frozen=True, slots=True)
class Receding:
    """Scale of a channel's BatchNorm after a short training that lets weak ones recede.

    The training runs on the calibration data. A network that was receded before, on more data (see
    `recede`), is scored as it is. Groups without BatchNorm and blocks are scored as by `BnScale`,
    and so is a network that has no others.

    Attributes:
        epochs: Passes over the data.
        strength: lambda; the authors take 1e-4 for a ResNet-56, 1e-3 for a VGG-16.
        offset: b; the authors take 0 for a ResNet-56, 3 for a VGG-16.
        learning_rate: Of the weights, falling to zero over a cosine; ten times that of gammas.
        weight_decay: Of weights of two dims or more.
        seed: Of what the network itself draws, such as dropout.
    """

    epochs: int = 10
    strength: float = 1e-4
    offset: float = 0.0
    learning_rate: float = 0.01
    weight_decay: float = 1e-4
    seed: int = 0
    summary: ClassVar[str] = "BatchNorm scale after sparsity training of bounded scales (SigBN)"
    paper: ClassVar[str] = "Receding Neuron Importances, arXiv:2204.06404"
    cost: ClassVar[CostClass] = CostClass.TRAINING

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch, or the training diverges.
        """
        shared = SharedCalibration.of(calibration)
        if graph.open_groups and not is_receded(model):
            model = recede(model, shared, shared.loss, self)
        elif not any(True for _ in shared):
            raise ValueError("the receding criterion needs calibration data, but got no batch.")
        return BnScale()(model, graph, calibration)


def recede(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    settings: Receding,
    *,
    checkpoint: Path | None = None,
    progress: Lines = silent,
) -> nn.Module:
    """Returns a copy of a network after sparsity training, with plain BatchNorms, in eval mode.

    SGD with Nesterov momentum 0.9, in bfloat16 where the device multiplies in it. The last epoch
    is returned, and not the best one on a test split as in the authors' code.

    Args:
        model: A trained network; left untouched.
        batches: A re-iterable of (inputs, targets) training batches, of which every iteration is
            an epoch; batches of a single example are left out.
        loss: (outputs, targets) -> scalar mean loss.
        settings: How to train.
        checkpoint: File that is written after every epoch; where it is there, for the same
            network, settings, loss and data, the training goes on from it and ends as it would
            have without a break; that of another one is not taken, and a line says so. Data are
            compared by their number of batches, where they have a length, and by their first batch
            if they are a sequence or by how they show themselves if not.
        progress: Receives a line per epoch.

    Raises:
        ValueError: If the network has no BatchNorm with scales, there is no batch, the loss stops
            being finite, or scales reach 0 or 1.
    """
    network = to_sigbn(model).train()
    if not gammas(network):
        raise ValueError(
            "sparsity training makes the scales of BatchNorms recede, but the network has none."
        )
    weights = dict(network.named_parameters())
    bounded = {id(gamma) for gamma in gammas(network)}
    for parameter in weights.values():
        parameter.requires_grad_(parameter.is_floating_point())
    optimizer = torch.optim.SGD(
        [
            {"params": [p], "lr": settings.learning_rate * (10 if id(p) in bounded else 1),
             "weight_decay": settings.weight_decay if p.ndim > 1 else 0.0}
            for p in weights.values()
        ],
        momentum=0.9,
        nesterov=True,
    )  # fmt: skip
    rates = [group["lr"] for group in optimizer.param_groups]
    kept = None
    if checkpoint is not None:
        named = [repr(settings), length_hint(batches), fingerprint.of_setting(loss)]
        key = [fingerprint.of_model(model), *named, fingerprint.of_data(batches)]
        kept = Checkpoint(checkpoint, json.dumps(key))
    done = 0 if kept is None else kept.read({"state": network}, optimizer, progress)
    devices = range(torch.cuda.device_count())
    for epoch in range(settings.epochs):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(settings.seed + epoch)
            mean = _epoch(network, _large_enough(batches), loss, settings, optimizer, epoch < done)
        if mean is not None:
            progress(f"epoch {epoch + 1}/{settings.epochs}, loss {mean:.3f}")
            if kept is not None:
                kept.write(epoch + 1, {"state": network}, optimizer)
    result = to_batch_norm(network).eval()
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(learning[name])
    return result


def _large_enough(
    batches: Iterable[tuple[Any, Any]],
) -> Iterator[tuple[Any, Any]]:
    """Yields batches of two examples or more: one has no statistics."""
    empty = True
    for inputs, targets in batches:
        empty = False
        if count_rows(targets) > 1:
            yield inputs, targets
    if empty:
        raise ValueError("the receding criterion needs calibration data, but got no batch.")


def _epoch(
    network: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    settings: Receding,
    optimizer: torch.optim.Optimizer,
    passed: bool,
) -> float | None:
    """Trains for an epoch and returns the mean loss; one that has passed is only read."""
    total, examples = 0.0, 0
    device = next(network.parameters()).device
    loss = loss_on(loss, device)
    for inputs, targets in batches:
        if passed:  # so that batches drawn at random go on where they were
            continue
        with torch.enable_grad():
            value = loss(in_mixed_precision(network, inputs, device), targets)
            penalty = torch.stack([receding_penalty(g, settings.offset) for g in gammas(network)])
            optimizer.zero_grad()
            (value + settings.strength * penalty.sum()).backward()
        optimizer.step()
        count = count_rows(targets)
        total, examples = total + float(value.detach()) * count, examples + count
    if passed:
        return None
    mean = total / max(1, examples)
    if not math.isfinite(mean):
        raise _diverged(f"the loss is {mean}", settings)
    scales = torch.cat([gamma.detach().sigmoid() for gamma in gammas(network)])
    if not bool(((scales > 0) & (scales < 1)).all()):  # they would not be known as bounded ones
        raise _diverged("scales reach 0 or 1, which bounded ones only come near", settings)
    return mean


def _diverged(why: str, settings: Receding) -> ValueError:
    return ValueError(
        f"sparsity training diverged ({why}); take a lower learning rate than "
        f"{settings.learning_rate}."
    )

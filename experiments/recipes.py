"""Recipes: from a name, or a network with data, to the Problem that is searched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paretoprune.experiments import models
from paretoprune.experiments.data.datasets import IMAGENET, Preparation
from paretoprune.experiments.data.opening import Data, load_data
from paretoprune.experiments.data.seeding import seeded
from paretoprune.experiments.data.sources import float32, lists_classes, picked
from paretoprune.experiments.data.splits import (
    Splits,
    TrainingBatches,
    split,
    training_batch_size_for,
)
from paretoprune.experiments.references import (
    LIBRARIES,
    Network,
    accepts,
    call_reference,
    close_matches,
    import_reference,
    library_network,
    library_preparation,
    load_weights,
    required,
)
from paretoprune.experiments.training import Training, train
from paretoprune.search.fit import check_problem
from paretoprune.search.metrics import evaluating, forward
from paretoprune.search.problem import Problem
from paretoprune.surgery.progress import Lines, silent

DATA_VARIABLE = "PARETOPRUNE_DATA"
"""Environment variable: a folder with data/cifar10 and checkpoints/ for the CIFAR recipes."""

DIGITS_TRAINING = Training(epochs=40, learning_rate=0.1)


class Recipe(Protocol):
    """A function from the command line's options to a problem; it may leave options out."""

    def __call__(
        self, *, data: str | None, weights: str | None, seed: int, progress: Lines
    ) -> Problem: ...


def digits(*, data: str | None, weights: str | None, seed: int, progress: Lines) -> Problem:
    """Returns a ResNet-14 for scikit-learn's digits, trained on the spot in seconds.

    The search split takes no part in the training.

    Args:
        data: A data reference in place of the digits, of 8x8 grey images of 10 classes.
        weights: A file of trained weights in place of the training.
        seed: Draws splits and batches; initial weights come from torch's global generator.
        progress: Receives lines about the training.
    """
    opened = load_data(data or "digits", seed=seed)
    model: nn.Module = models.digits_resnet().eval()
    if weights is not None:
        load_weights(model, weights)
    _check_network(model, opened)
    splits = split(opened.train, seed=seed)
    if weights is None:
        batches = TrainingBatches(opened.train, splits.training, batch_size=64, seed=seed)
        training = replace(DIGITS_TRAINING, seed=seed)
        model = train(model, batches, training, progress=progress)
    network = Network(model, f"{models.__name__}:digits_resnet", {})
    return _problem("digits", network, opened, splits, seed)


def cifar10_resnet(
    depth: int, *, data: str | None, weights: str | None, seed: int, progress: Lines
) -> Problem:
    """Returns a trained ResNet for CIFAR-10.

    The search split is part of the training set, and the weights have usually seen it, so it is
    read with the training augmentation.

    Args:
        depth: 20, 32, 44 or 56.
        data: A data reference; by default the CIFAR-10 under $PARETOPRUNE_DATA.
        weights: A file of trained weights; by default the one under $PARETOPRUNE_DATA.
        seed: Draws splits.
        progress: Receives a line about the reading.

    Raises:
        ValueError: If data or weights are neither given nor there.
    """
    name = f"resnet{depth}-cifar10"
    data = data or f"cifar10:{_provided(name, '--data cifar10:DIR', 'data/cifar10')}"
    weights = weights or str(_provided(name, "--weights FILE", f"checkpoints/{name}.safetensors"))
    model = getattr(models, f"resnet{depth}")().eval()
    load_weights(model, weights)
    progress(f"reading {data}")
    opened = load_data(data, seed=seed)
    _check_network(model, opened)
    network = Network(model, f"{models.__name__}:resnet{depth}", {})
    return _problem(name, network, opened, split(opened.train, seed=seed, seen=True), seed)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "digits": digits,
        "resnet20-cifar10": partial(cifar10_resnet, 20),
        "resnet32-cifar10": partial(cifar10_resnet, 32),
        "resnet44-cifar10": partial(cifar10_resnet, 44),
        "resnet56-cifar10": partial(cifar10_resnet, 56),
    }
)


def build_problem(
    model: str,
    *,
    data: str | None = None,
    weights: str | None = None,
    seed: int = 0,
    progress: Lines = silent,
) -> Problem:
    """Returns the problem that a recipe, or a network with data, stands for.

    The same arguments give the same problem, so that a run can be continued from them.

    Args:
        model: A recipe's name, `torchvision:NAME`, `timm:NAME`, or `package.module:function`,
            which returns a Problem or a trained network; the function receives those of `data`,
            `weights`, `seed`, `progress` and `num_classes` that it declares. That of a network
            is called with `seed` and `num_classes` alone where an export is loaded.
        data: A data reference, see `data.load_data`; a network needs it, a recipe may.
        weights: A file of weights, or pretrained weights of the library by name.
        seed: Draws splits and what a recipe trains.
        progress: Receives lines about long steps.

    Raises:
        ValueError: If a name is unknown, something needed is not given, or data and network do
            not fit each other.
    """
    with seeded(seed):  # initial weights come from the global generators
        if model in RECIPES:
            return RECIPES[model](data=data, weights=weights, seed=seed, progress=progress)
        kind, colon, _ = model.partition(":")
        if not colon:
            raise ValueError(
                f"unknown recipe {model!r}; {close_matches(model, RECIPES)} A network is given as "
                f"torchvision:NAME, timm:NAME or package.module:function."
            )
        build = _from_library if kind in LIBRARIES else _from_function
        return build(model, data, weights, seed, progress)


def _from_library(
    reference: str, data: str | None, weights: str | None, seed: int, progress: Lines
) -> Problem:
    """Returns the problem of a network of torchvision or timm."""
    preparation = library_preparation(reference, weights)
    opened = _opened(reference, data, seed, preparation)
    network = library_network(reference, classes=opened.classes, weights=weights)
    if weights is None:
        progress(f"{reference} is untrained, because no --weights are given")
    _check_network(network.model, opened, exact=lists_classes(opened.train))
    return _problem(reference, network, opened, split(opened.train, seed=seed), seed)


def _from_function(
    reference: str, data: str | None, weights: str | None, seed: int, progress: Lines
) -> Problem:
    """Returns the problem of a function that makes one, or of a function that makes a network."""
    function = import_reference(reference)
    options = {"data": data, "weights": weights}
    available: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    arguments: dict[str, Any] = {"seed": int(seed)} if accepts(function, "seed") else {}
    opened: Data | None = None
    if data is not None and accepts(function, "num_classes"):
        opened = load_data(data, seed=seed)
        if opened.classes is not None:
            arguments["num_classes"] = opened.classes
    given = available | arguments | {"seed": seed, "progress": progress}
    made = call_reference(reference, **given)
    if isinstance(made, Problem):
        if unused := [name for name in available if not accepts(function, name)]:
            unwanted = " and ".join(f"--{name}" for name in unused)
            raise ValueError(
                f"{reference} brings its own {' and '.join(unused)}; leave {unwanted} out."
            )
        check_problem(made)
        return made
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"{reference} must return a Problem or a network (torch.nn.Module), but returned a "
            f"{type(made).__name__}."
        )
    _check_rebuilt(reference, required(function) - set(arguments))
    model = made.cpu().eval()  # a search moves it where it computes
    if weights is not None and not accepts(function, "weights"):
        load_weights(model, weights)
    opened = opened or _opened(reference, data, seed)
    _check_network(model, opened)
    network = Network(model, reference, arguments)
    return _problem(reference, network, opened, split(opened.train, seed=seed), seed)


def _check_rebuilt(reference: str, unknown: set[str]) -> None:
    """Verifies that the function of a network needs nothing that an export does not record.

    Args:
        reference: Of the function.
        unknown: Its required arguments that no export records.

    Raises:
        ValueError: If there are any: the search would end in a network that cannot be loaded.
    """
    if unknown:
        raise ValueError(
            f"{reference} needs {' and '.join(map(repr, sorted(unknown)))}, but is called with "
            f"num_classes and seed alone where an exported network is loaded; give "
            f"{'it a default' if len(unknown) == 1 else 'them defaults'}."
        )


def _check_network(model: nn.Module, data: Data, *, exact: bool = False) -> None:
    """Verifies on two training examples, before anything long, that network and data fit.

    Args:
        model: The network.
        data: Its data.
        exact: Whether the network must have exactly the classes of the data, not just enough.

    Raises:
        ValueError: If they do not fit each other.
    """
    labels = data.train.labels() if data.whole else None
    if labels is not None and int(labels.min()) == int(labels.max()):
        raise ValueError(
            f"all training examples of {data.name} have the class {int(labels[0])}, so that there "
            f"is nothing to tell apart."
        )
    inputs, targets = float32(data.train.read(torch.arange(min(2, len(data.train)))))
    if data.classes is not None:  # too few classes are told below, in words of the data
        targets = torch.zeros_like(targets)
    batch = (inputs, targets)
    check_problem(Problem(model, inputs, calibration=[batch], validation=[batch]))
    with evaluating(model), torch.no_grad():
        outputs = forward(model, inputs)
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        return
    told, there = outputs.shape[1], data.classes
    if there is not None and (told < there or (exact and told != there)):
        raise ValueError(f"the network tells {told} classes apart, but {data.name} has {there}.")
    if data.test_classes is not None and told < data.test_classes:
        raise ValueError(
            f"the network tells {told} classes apart, but the test set of {data.name} has "
            f"{data.test_classes}."
        )


def _problem(name: str, network: Network, data: Data, splits: Splits, seed: int) -> Problem:
    inputs, _ = splits.calibration[0]
    batch_size = training_batch_size_for(data.train)
    return Problem(
        network.model,
        picked(inputs, torch.arange(2)),
        calibration=splits.calibration,
        recalibration=splits.recalibration,
        refit=splits.refit,
        validation=splits.validation,
        training=(
            TrainingBatches(data.train, splits.training, batch_size, seed) if data.whole else None
        ),
        test=data.test,
        name=name,
        reference=network.reference,
        arguments=network.arguments,
    )


def _opened(model: str, data: str | None, seed: int, preparation: Preparation = IMAGENET) -> Data:
    if data is None:
        raise ValueError(
            f"{model} needs data; give --data cifar10:DIR, imagefolder:DIR, digits or "
            f"package.module:function."
        )
    return load_data(data, seed=seed, preparation=preparation)


def _provided(recipe: str, option: str, below: str) -> Path:
    """Returns a path under $PARETOPRUNE_DATA, for an option that was not given."""
    root = os.environ.get(DATA_VARIABLE)
    path = Path(root or "", below)
    if not root or not path.exists():
        where = f"which has no {below}" if root else "which is not set"
        raise ValueError(f"recipe {recipe!r} needs {option} (or ${DATA_VARIABLE}, {where}).")
    return path

"""Data: opens a data reference, `cifar10:DIR`, `imagefolder:DIR`, `digits` or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from paretoprune.experiments.data.datasets import Split, cifar10, digits, image_folder
from paretoprune.experiments.data.sources import DatasetSource, ExampleArray, Source, float32
from paretoprune.experiments.data.splits import Batches, sizes_for
from paretoprune.experiments.references import call_reference
from paretoprune.search.problem import Batch

_FOLDERS: Mapping[str, Callable[[Path, Split], Source]] = MappingProxyType(
    {"cifar10": cifar10, "imagefolder": image_folder}
)


@dataclass(frozen=True, slots=True)
class Data:
    """Where training and test examples come from.

    Attributes:
        name: The reference that was opened.
        train: The training set.
        test: Called once, for the final report, returns the test batches; None where there is
            no test set. Nothing of it is read before.
    """

    name: str
    train: Source
    test: Callable[[], Iterable[Batch]] | None

    @property
    def classes(self) -> int | None:
        """Number of classes of the training set; None where targets are not classes."""
        labels = self.train.labels()
        return None if labels is None else int(labels.max()) + 1


def load_data(reference: str, *, seed: int = 0) -> Data:
    """Opens a data reference.

    Args:
        reference: `cifar10:DIR` (the torchvision download, made where DIR holds no CIFAR-10, or
            a folder of train-*.npz and test.npz), `imagefolder:DIR` (train/ and val/ or test/
            with a folder per class), `digits`, or `package.module:function`, which returns
            (train, test): each a map-style Dataset, a DataLoader or a list of (inputs, targets)
            batches; test may be None.
        seed: Seeds torch while a DataLoader is read.

    Raises:
        ValueError: If the reference is unknown or its place does not hold such data.
    """
    if reference == "digits":
        return _data(reference, digits)
    kind, colon, place = reference.partition(":")
    if kind in _FOLDERS and place:
        directory = Path(place).expanduser().resolve()  # workers may run in another folder
        return _data(reference, partial(_FOLDERS[kind], directory))
    if kind in _FOLDERS or not colon:
        raise ValueError(
            f"data is given as cifar10:DIR, imagefolder:DIR, digits or package.module:function, "
            f"but got {reference!r}."
        )
    return _from_function(reference, seed)


def _data(reference: str, opened: Callable[[Split], Source]) -> Data:
    return Data(reference, opened("train"), partial(_all_batches, opened))


def _all_batches(opened: Callable[[Split], Source]) -> Batches:
    return Batches.of(opened("test"))


def _from_function(reference: str, seed: int) -> Data:
    returned = call_reference(reference)
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise ValueError(
            f"a data function returns (train, test), but {reference} returned a "
            f"{type(returned).__name__}."
        )
    train, test = returned
    with torch.random.fork_rng(devices=[]):  # a DataLoader shuffles by the global generator
        torch.manual_seed(seed)
        source = _given_source(train, reference)
    return Data(reference, source, None if test is None else partial(_given_batches, test))


def _given_source(given: Any, reference: str) -> Source:
    """Returns a training set as a source: of ready batches, as many as the splits may take."""
    if not isinstance(given, (DataLoader, list, tuple)):
        if not (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
            raise ValueError(
                f"a training set is a map-style Dataset, a DataLoader or a list of (inputs, "
                f"targets) batches, but {reference} returned a {type(given).__name__}."
            )
        return DatasetSource(given)
    batches: list[Batch] = []
    examples, wanted = 0, 1
    for batch in given:
        batches.append(_checked(batch, reference))
        if len(batches) == 1:
            sizes = sizes_for(ExampleArray.of(batches))
            wanted = sizes.validation + sizes.recalibration
        examples += len(batches[-1][1])
        if examples >= wanted:
            break
    if not examples:
        raise ValueError(f"{reference} returned a training set without examples.")
    return ExampleArray.of(batches)


def _checked(batch: Any, reference: str) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not _is_tensor(batch[1]):
        raise ValueError(
            f"a batch is (inputs, targets) with a tensor of targets, but a batch of {reference} "
            f"is a {type(batch).__name__}."
        )
    inputs, targets = batch
    return inputs, targets


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _given_batches(given: Any) -> Iterable[Batch]:
    """Returns a given test set as batches."""
    if isinstance(given, (DataLoader, list, tuple)):
        return [(float32(inputs), targets) for inputs, targets in given]
    return Batches.of(DatasetSource(given))

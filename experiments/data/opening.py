"""Data: opens a data reference, `cifar10:DIR`, `imagefolder:DIR`, `digits` or a function."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from paretoprune.experiments.data.datasets import (
    IMAGENET,
    Preparation,
    Split,
    cifar10,
    digits,
    image_folder,
)
from paretoprune.experiments.data.seeding import seeded
from paretoprune.experiments.data.sources import (
    DatasetSource,
    ExampleArray,
    Source,
    checked,
    float32,
)
from paretoprune.experiments.data.splits import Batches, sizes_for
from paretoprune.experiments.references import call_reference
from paretoprune.search.evaluation import one_line
from paretoprune.search.problem import Batch

_FOLDERS: Mapping[str, Callable[[Path, Split], Source]] = MappingProxyType(
    {"cifar10": cifar10, "imagefolder": image_folder}
)

MEMORY = 2**30
"""Bytes up to which a loader that must be read batch by batch is held; splits may take more."""
STREAMED = 1_000_000
"""Examples after which an iterable dataset, which may have no end, is read no further."""


@dataclass(frozen=True, slots=True)
class Data:
    """Where training and test examples come from.

    Attributes:
        name: The reference that was opened.
        train: The training set.
        test: Returns the test batches for the final report; None where there is no test set. A
            search looks at no more of them than the form of an example.
        whole: Whether `train` has all training examples; a part can be searched with, but its
            classes need not be all, and nothing is trained on it.
        test_classes: Number of classes of the test set; None where that is known only as it is
            read.
    """

    name: str
    train: Source
    test: Callable[[], Iterable[Batch]] | None
    whole: bool = True
    test_classes: int | None = None

    @property
    def classes(self) -> int | None:
        """Number of classes of the training set; None if unknown, or targets are not classes."""
        labels = self.train.labels() if self.whole else None
        return None if labels is None else int(labels.max()) + 1


def load_data(reference: str, *, seed: int = 0, preparation: Preparation = IMAGENET) -> Data:
    """Opens a data reference.

    Args:
        reference: `cifar10:DIR` (the torchvision download, made where DIR holds no CIFAR-10, or
            a folder of train-*.npz and test.npz), `imagefolder:DIR` (train/ and val/ or test/
            with a folder per class), `digits`, or `package.module:function`, which returns
            (train, test): each a map-style Dataset, a DataLoader or a list of (inputs, targets)
            batches; test may be None. Of a DataLoader its dataset is taken where that gives the
            same examples; another one is read into memory, up to `MEMORY`.
        seed: Seeds torch, numpy and Python while the function runs and a DataLoader is read.
        preparation: Of the images of `imagefolder:DIR`.

    Raises:
        ValueError: If the reference is unknown or its place does not hold such data.
    """
    if reference == "digits":
        return _data(reference, digits)
    kind, colon, place = reference.partition(":")
    if kind in _FOLDERS and place:
        directory = Path(place).expanduser().resolve()  # workers may run in another folder
        more = {"preparation": preparation} if kind == "imagefolder" else {}
        return _data(reference, partial(_FOLDERS[kind], directory, **more))
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
    with seeded(seed):  # functions split and DataLoaders shuffle by the global generators
        returned = call_reference(reference)
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            raise ValueError(
                f"a data function returns (train, test), but {reference} returned a "
                f"{type(returned).__name__}."
            )
        train, test = returned
        source, whole = _given_source(train, reference)
        _check_labels(source.labels(), reference)
        labels = _checked_test(test, reference)
    batches = None if test is None else partial(_given_batches, test, reference)
    test_classes = None if labels is None else int(labels.max()) + 1
    return Data(reference, source, batches, whole, test_classes)


def _given_source(given: Any, reference: str) -> tuple[Source, bool]:
    """Returns a training set as a source, and whether that has all of its examples."""
    if isinstance(given, (list, tuple)):  # in memory already, so that all of it is taken
        return _joined([checked(batch, reference) for batch in given], reference), True
    dataset = _dataset_of(given) if isinstance(given, DataLoader) else given
    if dataset is None:
        return _read(given, reference)
    _demand_examples(dataset, given, "training", reference)
    source = DatasetSource(dataset, name=reference, workers=_workers_of(given))
    source.read(torch.tensor([0]))
    return source, True


def _demand_examples(dataset: Any, given: Any, kind: str, reference: str) -> None:
    """Raises `ValueError` if a set is of no kind that is taken, or has no examples."""
    if not _is_map_style(dataset):
        raise ValueError(
            f"a {kind} set is a map-style Dataset, a DataLoader or a list of (inputs, targets) "
            f"batches, but {reference} returned a {type(given).__name__}."
        )
    if not len(dataset):
        raise _without_examples(kind, reference)


def _check_labels(labels: Tensor | None, reference: str) -> None:
    if labels is not None and (least := int(labels.min())) < 0:
        raise ValueError(f"classes count from 0, but {reference} has the label {least}.")


def _checked_test(given: Any, reference: str) -> Tensor | None:
    """Returns the classes of a test set that was verified before long work; None if unknown.

    That is, as far as one example and what lists classes tell. A loader with batches of its own
    is left alone: a stream may not give them twice.
    """
    dataset = _dataset_of(given) if isinstance(given, DataLoader) else given
    if dataset is None:
        return None
    _demand_examples(dataset, given, "test", reference)
    name = _test_name(reference)
    if isinstance(given, (list, tuple)):
        targets = [checked(batch, name)[1] for batch in given]
        if not sum(map(len, targets)):
            raise _without_examples("test", reference)
        flat = all(one.dim() == 1 for one in targets)
        labels = ExampleArray(None, torch.cat(targets)).labels() if flat else None
    else:
        source = DatasetSource(dataset, name=name)
        source.read(torch.tensor([0]))
        labels = source.labels()
    _check_labels(labels, name)
    return labels


def _test_name(reference: str) -> str:
    return f"the test set of {reference}"


def _dataset_of(loader: DataLoader[Any]) -> Any:
    """Returns the dataset of the examples that a loader gives; None where they are its own.

    A loader's batches hold each example as it was augmented once; a dataset draws anew in every
    epoch. With a collation or sampler of its own a loader may give other examples than that, and
    a subclass may change its batches. Of a weighted sampler the weights are not used.
    """
    dataset: Any = loader.dataset
    batches = loader.batch_sampler
    if type(loader) is not DataLoader:
        return None
    if not _is_map_style(dataset) or loader.collate_fn is not default_collate:
        return None
    sampler = batches.sampler if type(batches) is BatchSampler else None
    if type(sampler) is SubsetRandomSampler:
        return Subset(dataset, [int(index) for index in sampler.indices])
    if type(sampler) is WeightedRandomSampler and len(sampler.weights) == len(dataset):
        warnings.warn(
            "the WeightedRandomSampler of a loader is not used, because it draws an example for "
            "several splits; fine-tuning takes every example once an epoch.",
            stacklevel=2,
        )
        return dataset
    if type(sampler) in (SequentialSampler, RandomSampler):
        return dataset if getattr(sampler, "data_source", None) is dataset else None
    return None


def _workers_of(given: Any) -> int:
    """Returns how many processes may read a dataset: as many as the loader that came has.

    A bare dataset may hold what processes cannot share, such as an open file; so may one whose
    loader sets its processes up.
    """
    if not isinstance(given, DataLoader) or given.worker_init_fn is not None:
        return 0
    return given.num_workers


def _is_map_style(given: Any) -> bool:
    has_both = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    return has_both and not isinstance(given, IterableDataset)


def _read(loader: DataLoader[Any], reference: str) -> tuple[Source, bool]:
    """Returns what a loader gives in one pass, and whether that is all of it.

    It ends once the splits have enough and `MEMORY` is used up, because loaders may give more
    than fits, or have no end.
    """
    batches: list[Batch] = []
    examples, wanted, used = 0, 0, 0
    most = STREAMED if isinstance(loader.dataset, IterableDataset) else math.inf
    for batch in loader:
        if examples >= wanted > 0 and (used >= MEMORY or examples >= most):
            warnings.warn(
                f"of the training loader of {reference} only the first {examples:,} examples "
                f"are read, because it must be held in memory; they do for a search, but nothing "
                f"can be fine-tuned and the number of classes is unknown: for that return a "
                f"map-style Dataset, or a DataLoader of one with torch's own collation and "
                f"sampler.",
                stacklevel=2,
            )
            return _joined(batches, reference), False
        batches.append(checked(batch, reference))
        if len(batches) == 1:
            sizes = sizes_for(ExampleArray.of(batches))
            wanted = sizes.validation + sizes.recalibration
        examples += len(batches[-1][1])
        used += sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return _joined(batches, reference), True


def _joined(batches: list[Batch], reference: str) -> ExampleArray:
    if not sum(len(targets) for _, targets in batches):
        raise _without_examples("training", reference)
    try:
        return ExampleArray.of(batches)
    except (RuntimeError, TypeError, ValueError) as error:  # sizes or structures differ
        raise ValueError(
            f"the batches of a training set have inputs of one form and size, but those of "
            f"{reference} cannot be joined ({one_line(error)}); pad all of them to the same size."
        ) from error


def _without_examples(kind: str, reference: str) -> ValueError:
    return ValueError(f"{reference} returned a {kind} set without examples.")


def _given_batches(given: Any, reference: str) -> Iterable[Batch]:
    """Returns a given test set as batches."""
    name = _test_name(reference)
    dataset = _dataset_of(given) if isinstance(given, DataLoader) else given
    if dataset is None or isinstance(dataset, (list, tuple)):
        return [float32(checked(batch, name)) for batch in given]
    batches = Batches.of(DatasetSource(dataset, name=name, workers=_workers_of(given)))
    if isinstance(given, DataLoader) and isinstance(given.batch_sampler, BatchSampler):
        return replace(batches, batch_size=given.batch_sampler.batch_size)
    return batches

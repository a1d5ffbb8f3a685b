"""Splits: the calibration, recalibration and search splits of a training set, by seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from paretoprune.criteria import fingerprint
from paretoprune.experiments.data.reading import read_batches
from paretoprune.experiments.data.sources import ImageArray, Source
from paretoprune.search.problem import Batch

LARGE_EXAMPLE = 3 * 96 * 96
"""Scalars of an example from which on splits and batches are kept small, for memory's sake."""

FEWEST_EXAMPLES = 16

MOST_HELD_OUT = 0.25
"""Share of a training set that the search split takes at most: the rest calibrates and trains."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Largest numbers of examples in each split; a small training set gives fewer.

    `validation` takes at most `MOST_HELD_OUT` of the training set, the others what is left.
    """

    calibration: int = 1000
    recalibration: int = 2000
    validation: int = 4000
    refit: int = 4000


SMALL_IMAGES = Sizes()
LARGE_IMAGES = Sizes(calibration=512, recalibration=1024, validation=2048, refit=0)


@dataclass(frozen=True)
class Batches:
    """A re-iterable of batches that are read anew, in order and plain, at every iteration.

    Attributes:
        source: Where the examples are.
        indices: Positions of the examples, shape (n,).
        batch_size: Examples per batch; the last batch may have fewer.
    """

    source: Source
    indices: Tensor
    batch_size: int

    @staticmethod
    def of(source: Source) -> Batches:
        """Returns every example of `source`."""
        return Batches(source, torch.arange(len(source)), batch_size_for(source))

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return read_batches(self.source, self.indices.split(self.batch_size))


class TrainingBatches:
    """A re-iterable of batches; every iteration is a new epoch, shuffled and augmented.

    An epoch depends on the seed and its number alone, so that a training goes on at any of them.
    The last, smaller batch of an epoch is left out, because BatchNorm cannot train on a few
    examples.

    Args:
        source: Where the examples are.
        indices: Positions of the examples, shape (n,).
        batch_size: Examples per batch; at most n are taken.
        seed: Draws the order and the augmentation.
    """

    def __init__(self, source: Source, indices: Tensor, batch_size: int, seed: int) -> None:
        self._source = source
        self._indices = indices
        self._batch_size = min(batch_size, len(indices))
        self._seed = seed
        self._next = 0

    def __repr__(self) -> str:
        """Returns what an epoch depends on, beside the examples themselves."""
        taken = fingerprint.of_setting(self._indices)
        return (
            f"<TrainingBatches: {len(self._indices)} of {len(self._source)} examples ({taken}), "
            f"batches of {self._batch_size}, seed {self._seed}>"
        )

    def __len__(self) -> int:
        return len(self._indices) // self._batch_size

    def __iter__(self) -> Iterator[Batch]:
        self._next += 1
        return self.epoch(self._next - 1)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Returns the batches of an epoch, as they are read.

        Args:
            number: From 0.
        """
        generator = torch.Generator().manual_seed((self._seed << 20) + number)
        order = torch.randperm(len(self._indices), generator=generator)
        parts = self._indices[order].split(self._batch_size)[: len(self)]
        return read_batches(self._source, parts, generator)

    def resized(self, examples: int, batch_size: int) -> TrainingBatches:
        """Returns batches of another size, of the first so many examples alone."""
        return TrainingBatches(self._source, self._indices[:examples], batch_size, self._seed)

    def on(self, device: torch.device) -> TrainingBatches:
        """Returns the same batches with small images kept on a device, and augmented there."""
        if not isinstance(self._source, ImageArray):
            return self
        source = self._source.on(device)
        return TrainingBatches(source, self._indices, self._batch_size, self._seed)


@dataclass(frozen=True)
class Splits:
    """Parts of a training set.

    Attributes:
        calibration: Plain examples for criteria and reconstruction, class-balanced.
        recalibration: Examples with the training augmentation, for BatchNorm statistics,
            class-balanced; those of `calibration` are among them.
        refit: Plain examples for the last reconstruction of a chosen network; those of
            `calibration` come first. None where memory has no room for more of them.
        validation: The search split, with the class proportions of the training set; shares no
            example with the two others.
        training: Positions of every example outside `validation`, shape (n,).
    """

    calibration: list[Batch]
    recalibration: list[Batch]
    refit: Batches | None
    validation: list[Batch]
    training: Tensor


def split(source: Source, *, seed: int, seen: bool = False, sizes: Sizes | None = None) -> Splits:
    """Returns the splits of a training set; a pure function of it and the seed.

    Args:
        source: The training set.
        seed: Draws which examples go where, and the augmentation.
        seen: Whether the network was trained on all of these examples. It may then know them by
            heart, plain, and the search split is read with the training augmentation, which
            ranks pruned networks more as unseen images do.
        sizes: Largest numbers of examples; by default those that suit the size of an example.

    Raises:
        ValueError: If there are too few examples.
    """
    total = len(source)
    if total < FEWEST_EXAMPLES:
        raise ValueError(
            f"a search needs at least {FEWEST_EXAMPLES} training examples, but the data has "
            f"{total}."
        )
    sizes = sizes or sizes_for(source)
    held_out = min(sizes.validation, int(MOST_HELD_OUT * total))
    generator = torch.Generator().manual_seed(seed)
    validation, training = _ordered(source.labels(), total, held_out, generator)
    batch_size = batch_size_for(source)
    augmented = _equal_parts(training[: sizes.recalibration], batch_size)
    return Splits(
        calibration=list(Batches(source, training[: sizes.calibration], batch_size)),
        recalibration=list(read_batches(source, augmented, generator)),
        refit=(
            Batches(source, training[: sizes.refit], batch_size)
            if min(sizes.refit, len(training)) > sizes.calibration
            else None
        ),
        validation=list(
            read_batches(source, validation.split(batch_size), generator if seen else None)
        ),
        training=training,
    )


def _equal_parts(indices: Tensor, largest: int) -> tuple[Tensor, ...]:
    """Returns indices in parts that differ by one at most.

    Recalibration averages over batches: a small one would count as much as the others, and of a
    single example BatchNorm takes no statistics.
    """
    return indices.tensor_split(-(-len(indices) // largest))


def batch_size_for(source: Source) -> int:
    """Returns the batch size that suits the size of an example."""
    return 32 if _is_large(source) else 250


def training_batch_size_for(source: Source) -> int:
    """Returns the batch size of a training that suits the size of an example."""
    return 64 if _is_large(source) else 128


def sizes_for(source: Source) -> Sizes:
    """Returns the sizes of splits that suit the size of an example."""
    return LARGE_IMAGES if _is_large(source) else SMALL_IMAGES


def _is_large(source: Source) -> bool:
    inputs, _ = source.read(torch.tensor([0]))
    return (
        sum(leaf.numel() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
        >= LARGE_EXAMPLE
    )


def _ordered(
    labels: Tensor | None, total: int, held_out: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns random orders of the held-out examples and of the others.

    The held-out ones have the class proportions of the whole. The others come in rounds of one
    example per class, so that every prefix is class-balanced while the examples last.
    """
    order = torch.randperm(total, generator=generator)
    if labels is None:
        return order[:held_out], order[held_out:]
    labels = labels.cpu()
    rank, size = _rank_within_class(labels[order])
    order = order[((rank + 0.5) / size).argsort(stable=True)]
    validation, rest = order[:held_out], order[held_out:]
    rounds, _ = _rank_within_class(labels[rest])
    return validation, rest[rounds.argsort(stable=True)]


def _rank_within_class(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns, for every example, how many of its class precede it, and how large the class is.

    Args:
        labels: Class of every example, shape (n,).
    """
    rank, size = torch.empty_like(labels), torch.empty_like(labels)
    for label in labels.unique():
        members = labels == label
        count = int(members.sum())
        rank[members] = torch.arange(count)
        size[members] = count
    return rank, size

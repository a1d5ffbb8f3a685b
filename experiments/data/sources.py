"""Sources: labelled examples read by index, plain or with the training augmentation.

Legend: n examples, c channels, h and w pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate

from paretoprune.experiments.data.seeding import seeded
from paretoprune.search.evaluation import one_line
from paretoprune.search.problem import Batch
from paretoprune.surgery.inputs import count_rows, has_rows, join_rows

_COMPARED = 4
"""Examples that are read to see whether a dataset gives the classes that it lists."""

_NARROW = (torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)


class Source(Protocol):
    """Labelled examples in a fixed order."""

    def labels(self) -> Tensor | None:
        """Returns the class of every example, shape (n,); None where there are no classes."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Tensor, augmentation: torch.Generator | None = None) -> Batch:
        """Returns the examples at `indices` as one batch.

        Args:
            indices: Positions of the examples, shape (batch,).
            augmentation: Draws the training augmentation; None reads the examples plain.
        """
        ...


@dataclass(frozen=True)
class ImageArray:
    """Small images in memory.

    Attributes:
        images: Pixels, uint8, shape (n, h, w, c).
        targets: Classes, int64, shape (n,).
        mean: Per channel, of the pixels as fractions of `scale`.
        std: Per channel, likewise.
        scale: The pixel value that counts as 1.
        shift: The augmentation moves images by up to so many pixels, zeros come in.
        flip: Whether the augmentation mirrors half of the images.
    """

    images: Tensor
    targets: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0
    shift: int = 4
    flip: bool = True

    def labels(self) -> Tensor:
        """Returns the classes, shape (n,)."""
        return self.targets

    def __len__(self) -> int:
        return len(self.targets)

    def on(self, device: torch.device) -> ImageArray:
        """Returns the same images on a device, where they are then augmented."""
        return replace(self, images=self.images.to(device), targets=self.targets.to(device))

    def read(self, indices: Tensor, augmentation: torch.Generator | None = None) -> Batch:
        """Returns normalised float32 images, shape (batch, c, h, w), and their classes.

        The augmentation is drawn on the CPU, so that it is the same on every device.
        """
        device = self.images.device
        indices = indices.to(device)
        images = self.images[indices].permute(0, 3, 1, 2).float() / self.scale
        if augmentation is not None:
            images = _shifted(images, self.shift, augmentation)
            if self.flip:
                mirrored = (torch.rand(len(images), generator=augmentation) < 0.5).to(device)
                images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        mean = torch.tensor(self.mean, device=device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=device).view(1, -1, 1, 1)
        return ((images - mean) / std).contiguous(), self.targets[indices]


def _shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Returns each image moved by its own random offset of up to `shift` pixels per axis."""
    n, channels, height, width = images.shape
    padded = F.pad(images, (shift,) * 4)

    def positions(size: int) -> Tensor:
        return torch.arange(size, device=images.device)

    drawn = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    down, right = drawn.to(images.device)
    rows = (down + positions(height))[:, None, :, None]
    columns = (right + positions(width))[:, None, None, :]
    example = positions(n)[:, None, None, None]
    channel = positions(channels)[None, :, None, None]
    return padded[example, channel, rows, columns]


@dataclass(frozen=True)
class DatasetSource:
    """A map-style dataset of (input, target) pairs.

    Attributes:
        plain: The dataset.
        augmented: The same examples in the same order with the training augmentation, drawn
            from torch's global generator; None takes `plain`, which may augment by itself.
        name: What errors call it.
        workers: Processes that read ahead where many batches are read; None leaves it to the
            place where they are read, see `read_batches`.
    """

    plain: Dataset[Any]
    augmented: Dataset[Any] | None = None
    name: str = "the dataset"
    workers: int | None = 0

    def labels(self) -> Tensor | None:
        """Returns the dataset's `targets` (or `labels`) where it lists one class per example.

        They must be those that examples come with, which a `target_transform` may have changed.
        Torch's own TensorDataset, Subset and ConcatDataset list none, but what they hold tells.
        """
        return _labels(self.plain)

    def __len__(self) -> int:
        return len(self.plain)  # type: ignore[arg-type]

    def read(self, indices: Tensor, augmentation: torch.Generator | None = None) -> Batch:
        """Returns the examples as torch's default collation stacks them.

        A `plain` dataset that augments by itself gives the same again where it is read plain.

        Raises:
            ValueError: If they cannot be stacked, or are no pairs of input and target.
        """
        seed = self.draw(indices, augmentation)
        return self.drawn(indices, seed, augmented=augmentation is not None)

    def draw(self, indices: Tensor, augmentation: torch.Generator | None = None) -> int:
        """Returns the seed that `read` takes for the examples at `indices`."""
        if augmentation is None:
            return int(indices.sum())
        return int(torch.randint(2**31, (), generator=augmentation))

    def drawn(self, indices: Tensor, seed: int, *, augmented: bool) -> Batch:
        """Returns what `read` does, by a seed that was drawn before.

        Args:
            indices: Positions of the examples, shape (batch,).
            seed: From `draw`.
            augmented: Whether with the training augmentation.

        Raises:
            ValueError: As `read`.
        """
        dataset = self.plain if self.augmented is None or not augmented else self.augmented
        with seeded(seed):  # transforms draw from the global generators
            examples = [dataset[int(index)] for index in indices]
        try:
            batch = default_collate(examples)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"the examples of a batch are tensors or numbers of one size, but those of "
                f"{self.name} cannot be stacked ({one_line(error)}); give its dataset a transform."
            ) from error
        return checked(batch, self.name)


@dataclass(frozen=True)
class ExampleArray:
    """Examples in memory, as ready batches brought them.

    Attributes:
        inputs: A tensor, tuple or dict of tensors, shape (n, ...); what has no dim for the
            examples, such as a flag, is that of the first batch.
        targets: Shape (n, ...).
    """

    inputs: Any
    targets: Tensor

    @staticmethod
    def of(batches: Sequence[Batch]) -> ExampleArray:
        """Returns the examples of `batches` in one piece."""
        inputs, targets = join_rows(*batches)
        return ExampleArray(inputs, targets)

    def labels(self) -> Tensor | None:
        """Returns the targets where they are one integer per example."""
        return _classes(self.targets, len(self))

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, indices: Tensor, augmentation: torch.Generator | None = None) -> Batch:
        """Returns the examples as they are; ready batches have no augmentation to draw."""
        return picked(self.inputs, indices), self.targets[indices]


def lists_classes(source: Source) -> bool:
    """Tells whether the classes of a source are those of a whole data set.

    Ready batches and datasets made of others are often a part, which may lack some classes.
    """
    if isinstance(source, DatasetSource):
        return _listed(source.plain) is not None
    return isinstance(source, ImageArray)


def _labels(dataset: Any) -> Tensor | None:
    listed = _listed(dataset)
    if listed is not None:
        return listed
    match dataset:
        case TensorDataset(tensors=(_, targets)):
            return _classes(targets, len(dataset))
        case Subset():
            whole = _labels(dataset.dataset)
            return None if whole is None else whole[torch.as_tensor(dataset.indices)]
        case ConcatDataset():
            parts = [_labels(part) for part in dataset.datasets]
            known = [part for part in parts if part is not None]
            return torch.cat(known) if len(known) == len(parts) else None
    return None


def _listed(dataset: Any) -> Tensor | None:
    """Returns the classes that a dataset lists itself, one per example."""
    for name in ("targets", "labels"):
        try:
            listed = _classes(torch.as_tensor(getattr(dataset, name)), len(dataset))
            return listed if listed is not None and _are_given(listed, dataset) else None
        except (AttributeError, TypeError, ValueError, RuntimeError, LookupError):
            continue  # not there, or not numbers: examples are then drawn without balance
    return None


def _are_given(listed: Tensor, dataset: Any) -> bool:
    """Tells whether examples come with the classes that their dataset lists.

    A `target_transform` may change them. It is told on a few examples, spread over the classes.
    """
    by_class = listed.argsort(stable=True)
    spread = torch.linspace(0, len(listed) - 1, min(_COMPARED, len(listed))).long()
    with seeded(0):  # examples may draw from the global generators
        return all(bool(_parted(dataset[at])[1] == listed[at]) for at in by_class[spread].tolist())


def _classes(targets: Tensor, size: int) -> Tensor | None:
    if targets.shape != (size,) or targets.is_floating_point() or targets.is_complex():
        return None
    return targets.long()


def checked(batch: Any, name: str) -> Batch:
    """Returns a batch that was verified to be (inputs, targets); whole numbers become int64.

    Torch's losses take no classes of int32, which NumPy and other libraries give; bytes stay.

    Args:
        batch: As a dataset or loader gave it.
        name: Of the data, for the error.

    Raises:
        ValueError: If it has another form.
    """
    batch = _parted(batch)
    parts = batch if isinstance(batch, (tuple, list)) else ()
    if len(parts) != 2 or not has_rows(parts[1]):
        of = f" of {', '.join(type(part).__name__ for part in parts)}" if parts else ""
        raise ValueError(
            f"a batch is (inputs, targets) with a tensor of targets, one per example, or a dict "
            f"of inputs with its targets as `labels`, but a batch of {name} is a "
            f"{type(batch).__name__}{of}."
        )
    inputs, targets = parts
    return inputs, targets.long() if targets.dtype in _NARROW else targets


def _parted(batch: Any) -> Any:
    """Returns (inputs, targets) of a mapping that names its targets, as Hugging Face does."""
    if isinstance(batch, Mapping):
        for name in ("labels", "label"):
            if name in batch:
                return {key: part for key, part in batch.items() if key != name}, batch[name]
    return batch


def picked(part: Any, indices: Tensor) -> Any:
    """Returns the examples at `indices` of inputs or targets: a tensor, tuple, list or dict."""
    return tree_map(lambda leaf: leaf[indices.to(leaf.device)] if has_rows(leaf) else leaf, part)


def first_examples(inputs: Any, number: int) -> Any:
    """Returns the first examples of a model's inputs; repeats them if there are too few."""
    return picked(inputs, torch.arange(number) % count_rows(inputs))


def float32(value: Any) -> Any:
    """Returns `value` with every float64 tensor in it as float32, as networks compute."""
    return tree_map_only(
        Tensor, lambda tensor: tensor.float() if tensor.dtype == torch.float64 else tensor, value
    )

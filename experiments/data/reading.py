"""read_batches: one batch of a source after the other; those of a dataset are read ahead."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from paretoprune.experiments.data.sources import DatasetSource, Source, float32
from paretoprune.search.problem import Batch

MOST_READERS = 16
"""Processes that read ahead at most, where a source leaves their number open."""
_SHARED = Path("/dev/shm")
_AHEAD = 2
"""Batches that a process reads ahead; torch's default."""


def read_batches(
    source: Source, parts: Sequence[Tensor], augmentation: torch.Generator | None = None
) -> Iterator[Batch]:
    """Yields a batch for every part of a source, float32.

    The `workers` of a `DatasetSource` read ahead; where it leaves their number open, as many as
    this process may have threads, if a GPU waits for them: a CPU that computes has no cores to
    spare. What a batch holds does not depend on them: all that is drawn for it is drawn here.

    Args:
        source: Where the examples are.
        parts: Positions of the examples of each batch, shape (batch,).
        augmentation: Draws the training augmentation; None reads the examples plain.
    """
    if not isinstance(source, DatasetSource) or not (readers := _readers(source, parts)):
        for part in parts:
            yield float32(source.read(part, augmentation))
        return
    drawn = tuple((part, source.draw(part, augmentation)) for part in parts)
    forks = "fork" in multiprocessing.get_all_start_methods()  # others import a script once more
    loader = DataLoader(
        _Drawn(source, drawn, augmentation is not None),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=readers,
        prefetch_factor=_AHEAD,
        multiprocessing_context="fork" if forks else None,
        generator=torch.Generator(),  # or a seed for the processes is taken from the global one
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield float32(batch)


@dataclass(frozen=True)
class _Drawn(Dataset[Any]):
    """The batches of a source by their number; what is raised on the way is returned.

    A loader would raise it with a traceback as its message, in which its own sentence is lost.
    """

    source: DatasetSource
    parts: tuple[tuple[Tensor, int], ...]
    augmented: bool

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Batch | Exception:
        part, seed = self.parts[number]
        try:
            return self.source.drawn(part, seed, augmented=self.augmented)
        except Exception as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _readers(source: DatasetSource, parts: Sequence[Tensor]) -> int:
    """Returns how many processes read the batches of a source; 0 reads them here."""
    if source.workers is not None:
        return min(source.workers, len(parts))
    if not torch.cuda.is_available():
        return 0
    readers = min(MOST_READERS, torch.get_num_threads(), len(parts))
    if readers and _SHARED.is_dir():  # small in containers
        leaves = tree_leaves(source.read(parts[0][:1]))
        example = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        room = shutil.disk_usage(_SHARED).free // 2
        readers = min(readers, room // (_AHEAD * len(parts[0]) * example))
    return readers

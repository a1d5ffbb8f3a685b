"""Batches that processes read ahead are those that would be read here."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paretoprune.experiments.data.reading import read_batches
from paretoprune.experiments.data.sources import DatasetSource
from paretoprune.experiments.data.splits import Batches, TrainingBatches, split

EXAMPLES = 48


class Drawn(Dataset[Any]):
    """Pairs of inputs: what all three generators draw for an example, and who read it."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, int], int]:
        drawn = torch.rand(()).item() + random.random() + np.random.rand()
        return (torch.tensor([index, drawn], dtype=torch.float64), os.getpid()), index % 4


def source(workers: int | None) -> DatasetSource:
    return DatasetSource(Drawn(), workers=workers)


def told(batches: Any) -> tuple[list[Tensor], set[int]]:
    """Returns what batches hold, and the processes that read them."""
    values, readers = [], set()
    for inputs, targets in batches:
        assert inputs[0].dtype == torch.float32
        assert torch.equal(targets, inputs[0][:, 0].long() % 4)
        values.append(inputs[0])
        readers |= set(inputs[1].tolist())
    return values, readers


@pytest.mark.parametrize("kind", ["training", "test"])
def test_who_reads_makes_no_difference(kind: str) -> None:
    def batches(workers: int) -> Any:
        if kind == "test":
            return Batches(source(workers), torch.arange(EXAMPLES), 8)
        return TrainingBatches(source(workers), torch.arange(EXAMPLES), 8, seed=3).epoch(2)

    state = torch.get_rng_state()
    here, (reader,) = told(batches(0))
    ahead, readers = told(batches(2))
    assert torch.equal(state, torch.get_rng_state())
    assert reader == os.getpid()
    assert len(readers) == 2
    assert os.getpid() not in readers
    assert len(here) == len(ahead) == 6
    assert all(map(torch.equal, here, ahead))
    assert not torch.equal(here[0], here[1])


def test_splits_are_read_ahead_too() -> None:
    here, ahead = (split(source(workers), seed=0, seen=True) for workers in (0, 2))
    for name in ("calibration", "recalibration", "validation"):
        values, _ = told(getattr(here, name))
        others, readers = told(getattr(ahead, name))
        assert all(map(torch.equal, values, others))
        assert os.getpid() not in readers


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 17:
            raise OSError("image 17 is damaged.")
        return torch.zeros(1 + index // 40), 0


@pytest.mark.parametrize(
    ("first", "kind", "sentence"),
    [(12, OSError, "image 17 is damaged."), (36, ValueError, "cannot be stacked")],
)
def test_what_a_dataset_raises_keeps_its_sentence(
    first: int, kind: type[Exception], sentence: str
) -> None:
    messages = set()
    for workers in (0, 2):
        parts = torch.arange(first, EXAMPLES).split(12)
        with pytest.raises(kind, match=sentence) as raised:
            list(read_batches(DatasetSource(Broken(), workers=workers), parts))
        messages.add(str(raised.value))
    assert len(messages) == 1


def test_what_is_not_read_to_its_end_leaves_no_process() -> None:
    batches = iter(Batches(source(2), torch.arange(EXAMPLES), 8))
    next(batches)
    assert multiprocessing.active_children()
    del batches
    assert not multiprocessing.active_children()


def test_processes_read_what_leaves_it_open_where_a_gpu_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def readers(workers: int | None = None) -> int:
        batches = Batches(source(workers), torch.arange(EXAMPLES), 8)
        _, found = told(batches)
        return len(found - {os.getpid()})

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert readers() == 0
    assert readers(1) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert readers() == 2
    few = shutil.disk_usage(tmp_path)._replace(free=10_000)  # a batch has 256 bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda place: few)
    assert readers() == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda place: few._replace(free=1_100))
    assert readers() == 1

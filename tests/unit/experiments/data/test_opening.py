"""Data references open named data and what functions return, and explain what is wrong."""

from __future__ import annotations

import pickle
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from paretoprune.experiments.data.opening import load_data
from paretoprune.experiments.data.sources import DatasetSource, ExampleArray

MODULE = """
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

def pairs(count):
    return TensorDataset(torch.arange(float(count)).unsqueeze(1), torch.arange(count) % 4)

def datasets():
    return pairs(40), pairs(8)

def loaders():
    return DataLoader(pairs(40), batch_size=16, shuffle=True), DataLoader(pairs(8), batch_size=5)

def batches():
    batch = (torch.zeros(6, 2, dtype=torch.float64), torch.arange(6))
    return [batch, batch, batch], None

def many():
    return [(torch.zeros(1000, 1), torch.arange(1000)) for _ in range(20)], None

def empty():
    return [], None

def one():
    return pairs(8)

class Stream(IterableDataset):
    def __iter__(self):
        return iter(())

def stream():
    return Stream(), None

def tensors():
    return [torch.zeros(2), torch.zeros(2)], None
"""


@pytest.fixture(scope="module")
def _module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_data.py").write_text(textwrap.dedent(MODULE))
    return folder


@pytest.fixture(autouse=True)
def _importable(_module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_module))


def test_digits() -> None:
    data = load_data("digits")
    assert data.classes == 10
    assert len(data.train) == 1347
    assert data.test is not None
    assert sum(len(targets) for _, targets in data.test()) == 450


def test_a_folder_is_opened_and_its_test_split_only_when_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "train-0.npz", images=images, labels=labels)
    monkeypatch.chdir(tmp_path.parent)
    data = load_data(f"cifar10:{tmp_path.name}")
    assert data.test is not None
    monkeypatch.chdir("/")  # where workers run: the relative folder must still be found
    test = pickle.loads(pickle.dumps(data.test))
    with pytest.raises(ValueError, match=r"has no test\.npz"):
        test()
    np.savez(tmp_path / "test.npz", images=images, labels=labels)
    assert [len(targets) for _, targets in test()] == [20]


@pytest.mark.parametrize("reference", ["cifar10", "cifar10:", "mnist", "imagefolder:"])
def test_other_references_are_refused(reference: str) -> None:
    with pytest.raises(ValueError, match=f"data is given as cifar10:DIR.* but got '{reference}'"):
        load_data(reference)


def test_datasets_of_a_function() -> None:
    data = load_data("user_data:datasets")
    assert isinstance(data.train, DatasetSource)
    assert data.test is not None
    ((inputs, targets),) = data.test()
    assert inputs.shape == (8, 1)
    assert targets.tolist() == [0, 1, 2, 3] * 2


def test_loaders_of_a_function_are_read_by_seed() -> None:
    first, again, other = (load_data("user_data:loaders", seed=seed) for seed in (0, 0, 1))
    assert isinstance(first.train, ExampleArray)
    assert len(first.train) == 40
    assert first.classes == 4
    orders = [data.train.read(torch.arange(40))[0].tolist() for data in (first, again, other)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert first.test is not None
    assert [len(targets) for _, targets in first.test()] == [5, 3]


def test_batches_of_a_function() -> None:
    data = load_data("user_data:batches")
    assert len(data.train) == 18
    assert data.test is None


def test_no_more_ready_batches_are_read_than_splits_can_take() -> None:
    assert len(load_data("user_data:many").train) == 6000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "without examples"),
        ("one", r"returns \(train, test\), but user_data:one returned a TensorDataset"),
        ("stream", "map-style Dataset, a DataLoader or a list .* returned a Stream"),
        ("tensors", r"a batch is \(inputs, targets\)"),
        ("nothing", "no function 'nothing'"),
    ],
)
def test_a_function_that_returns_something_else_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(f"user_data:{name}")

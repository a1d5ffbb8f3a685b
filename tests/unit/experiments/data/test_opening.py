"""Data references open named data and what functions return, and explain what is wrong."""

from __future__ import annotations

import pickle
import random
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from paretoprune.experiments.data import opening
from paretoprune.experiments.data.opening import load_data
from paretoprune.experiments.data.sources import DatasetSource, ExampleArray
from paretoprune.experiments.data.splits import Batches

MODULE = """
import random
from collections import UserDict

import numpy
import torch
from PIL import Image
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

def pairs(count):
    return TensorDataset(torch.arange(float(count)).unsqueeze(1), torch.arange(count) % 4)

def datasets():
    return pairs(40), pairs(8)

def loaders():
    return DataLoader(pairs(40), batch_size=16, shuffle=True), DataLoader(pairs(8), batch_size=5)

def read_by_processes():
    train = DataLoader(pairs(40), batch_size=16, shuffle=True, num_workers=2)
    return train, DataLoader(pairs(8), batch_size=5, num_workers=1)

def read_by_prepared_processes():
    return DataLoader(pairs(40), num_workers=2, worker_init_fn=print), None

def sampled():
    return DataLoader(pairs(40), batch_size=16, sampler=SubsetRandomSampler([4, 9, 1])), None

def drawn():
    order = torch.from_numpy(numpy.random.permutation(40))
    test = [(torch.tensor([[random.random()]]), torch.tensor([0]))]
    return [(pairs(40).tensors[0][order], pairs(40).tensors[1][order])], test

def test_of_dicts():
    return pairs(40), DataLoader([{"image": 1.0, "kind": 2}] * 4, batch_size=2)

class Noisy(Dataset):
    targets = [index % 4 for index in range(8000)]

    def __len__(self):
        return 8000

    def __getitem__(self, index):
        return torch.rand(2), self.targets[index]

def noisy():
    return DataLoader(Noisy(), batch_size=100, shuffle=True), None

def collate(examples):
    return default_collate(examples)

def own_collation():
    return DataLoader(pairs(40), batch_size=16, collate_fn=collate), None

class Drawn(Sampler):
    def __iter__(self):
        return iter(torch.randperm(40).tolist())

    def __len__(self):
        return 40

def own_sampler():
    return DataLoader(pairs(40), batch_size=16, sampler=Drawn()), None

def weighted():
    drawn = WeightedRandomSampler([1.0] * 39 + [1000.0], 40)
    return DataLoader(pairs(40), batch_size=16, sampler=drawn), None

def own_batches():
    return DataLoader(pairs(40), batch_sampler=[[0, 1], [5, 2]]), None

def some_of_them():
    return DataLoader(pairs(40), batch_size=16, sampler=range(20)), None

class Doubled(DataLoader):
    def __iter__(self):
        for inputs, targets in super().__iter__():
            yield 2 * inputs, targets

def changed_batches():
    return Doubled(pairs(40), batch_size=16), Doubled(pairs(8), batch_size=8)

class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(3), 1

def endless():
    return DataLoader(Endless(), batch_size=1000), None

class Named(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"image": torch.zeros(3), "kind": 1}

def named():
    return DataLoader(Named(), batch_size=16), None

class Tokens(Dataset):
    labels = [index % 3 for index in range(40)]

    def __len__(self):
        return 40

    def __getitem__(self, index):
        ids = torch.full((5,), index)
        return {"input_ids": ids, "attention_mask": ids > 0, "labels": self.labels[index]}

class Encoding(UserDict):
    pass  # as tokenizers of Hugging Face return

def encoded(examples):
    return Encoding(default_collate(examples))

def tokens():
    return Tokens(), DataLoader(Tokens(), batch_size=16, collate_fn=encoded)

def batches():
    batch = (torch.zeros(6, 2, dtype=torch.float64), torch.arange(6))
    return [batch, batch, batch], None

def many():
    return [(torch.zeros(1000, 1), torch.full((1000,), at)) for at in range(20)], None

def empty():
    return [], None

def no_examples():
    return DataLoader(pairs(0)), None

def one():
    return pairs(8)

class Stream(IterableDataset):
    def __iter__(self):
        return iter(())

def stream():
    return Stream(), None

def test_of_dict_batches():
    return pairs(40), [{"image": torch.zeros(2, 1)}]

def test_of_own_dicts():
    examples = [{"image": 1.0, "kind": 2}] * 4
    return pairs(40), DataLoader(examples, collate_fn=collate)

def test_of_triples():
    return pairs(40), TensorDataset(*[torch.arange(8)] * 3)

def test_of_images():
    return pairs(40), DataLoader(Images())

def test_of_nothing():
    return pairs(40), pairs(0)

def test_of_empty_batches():
    return pairs(40), [(torch.zeros(0, 1), torch.arange(0))]

def test_of_signed():
    return pairs(40), [(torch.zeros(2, 1), torch.tensor([0, -1]))]

def test_of_regression():
    return pairs(40), [(torch.zeros(2, 1), torch.rand(2)), (torch.zeros(1, 1), torch.rand(1, 1))]

def narrow():
    labels = torch.arange(40, dtype=torch.int32) % 4
    return TensorDataset(torch.zeros(40, 1), labels), [(torch.zeros(6, 1), labels[:6].short())]

def test_of_a_stream():
    return pairs(40), Stream()

def test_of_a_generator():
    return pairs(40), (batch for batch in [(torch.zeros(2, 1), torch.arange(2))])

def tensors():
    return [torch.zeros(2), torch.zeros(2)], None

class Images(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return Image.new("L", (8, 8)), 1

def untransformed():
    return Images(), None

def triples():
    return TensorDataset(*[torch.arange(40)] * 3), None

def padded():
    return [(torch.zeros(2, length), torch.arange(2)) for length in (4, 5)] * 4, None

def signed():
    return TensorDataset(torch.zeros(40, 1), torch.arange(40) % 2 * 2 - 1), None

def forms():
    batches = [torch.zeros(8, 1), (torch.zeros(8, 1), torch.zeros(8, 1))]
    return [(inputs, torch.arange(8)) for inputs in batches], None
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


def test_of_a_loader_its_dataset_is_taken() -> None:
    data = load_data("user_data:loaders")
    assert isinstance(data.train, DatasetSource)
    assert data.train.read(torch.arange(40))[0].flatten().tolist() == [*range(40)]
    assert data.whole
    assert data.classes == 4
    assert data.test is not None
    assert [len(targets) for _, targets in data.test()] == [5, 3]


def test_a_dataset_is_read_by_as_many_processes_as_its_loader_has() -> None:
    names = ("read_by_processes", "loaders", "datasets", "read_by_prepared_processes")
    opened = [load_data(f"user_data:{name}") for name in names]
    assert [getattr(data.train, "workers", None) for data in opened] == [2, 0, 0, 0]
    assert opened[0].test is not None
    tested = opened[0].test()
    assert isinstance(tested, Batches)
    assert getattr(tested.source, "workers", None) == 1
    assert [inputs.flatten().tolist() for inputs, _ in tested] == [[0, 1, 2, 3, 4], [5, 6, 7]]


def test_a_loader_of_many_examples_trains_on_all_of_them_augmented_anew() -> None:
    data = load_data("user_data:noisy")
    assert len(data.train) == 8000
    assert data.classes == 4
    generator = torch.Generator().manual_seed(0)
    first, second = (data.train.read(torch.arange(2), generator)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_a_loader_of_a_subset_keeps_to_it() -> None:
    data = load_data("user_data:sampled")
    assert data.train.read(torch.arange(len(data.train)))[0].flatten().tolist() == [4, 9, 1]
    assert data.classes == 2


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("own_collation", 40),
        ("own_sampler", 40),
        ("own_batches", 4),
        ("some_of_them", 20),
        ("changed_batches", 40),
    ],
)
def test_a_loader_with_parts_of_its_own_is_read_whole(name: str, examples: int) -> None:
    data = load_data(f"user_data:{name}")
    assert isinstance(data.train, ExampleArray)
    assert len(data.train) == examples
    assert data.whole


def test_a_dict_may_hold_the_targets_as_labels() -> None:
    data = load_data("user_data:tokens")
    assert data.classes == 3
    inputs, targets = data.train.read(torch.tensor([4, 7]))
    assert inputs["input_ids"].tolist() == [[4] * 5, [7] * 5]
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert targets.tolist() == [1, 1]
    assert data.test is not None
    tested = [*data.test()]
    assert [len(labels) for _, labels in tested] == [16, 16, 8]
    assert tested[0][0].keys() == {"input_ids", "attention_mask"}


def test_a_weighted_sampler_draws_no_example_for_several_splits() -> None:
    with pytest.warns(UserWarning, match="the WeightedRandomSampler of a loader is not used"):
        data = load_data("user_data:weighted")
    assert sorted(data.train.read(torch.arange(40))[0].flatten().tolist()) == [*range(40)]


def test_a_stream_of_small_examples_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "STREAMED", 20_000)
    with pytest.warns(UserWarning, match="only the first 20,000 examples are read"):
        assert not load_data("user_data:endless").whole


def test_a_loader_that_changes_its_batches_does_so_for_training_as_for_test() -> None:
    data = load_data("user_data:changed_batches")
    assert data.test is not None
    ((tested, _),) = data.test()
    assert torch.equal(data.train.read(torch.arange(8))[0], tested)
    assert tested.flatten().tolist() == [*range(0, 16, 2)]


def test_a_loader_with_parts_of_its_own_is_read_by_seed() -> None:
    read = [load_data("user_data:own_sampler", seed=seed).train for seed in (0, 0, 1)]
    orders = [train.read(torch.arange(40))[0].tolist() for train in read]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_a_function_that_draws_by_numpy_or_python_is_read_by_seed() -> None:
    np.random.seed(7)
    random.seed(7)
    opened = [load_data("user_data:drawn", seed=seed) for seed in (0, 0, 1)]
    orders = [data.train.read(torch.arange(40))[0].flatten().tolist() for data in opened]
    assert orders[0] == orders[1] != orders[2]
    tests = [next(iter(data.test()))[0].item() for data in opened if data.test is not None]
    assert tests[0] == tests[1] != tests[2]
    after = (np.random.rand(), random.random())
    np.random.seed(7)
    random.seed(7)
    assert after == (np.random.rand(), random.random())  # the generators were put back


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_of_dicts", "a batch of the test set of user_data:test_of_dicts is a dict"),
        ("test_of_dict_batches", "the test set of user_data:test_of_dict_batches is a dict"),
        ("test_of_triples", "is a list of Tensor, Tensor, Tensor"),
        ("test_of_images", "the test set of user_data:test_of_images cannot be stacked"),
        ("test_of_nothing", "user_data:test_of_nothing returned a test set without examples"),
        ("test_of_empty_batches", "test_of_empty_batches returned a test set without examples"),
        ("test_of_signed", "the test set of user_data:test_of_signed has the label -1"),
        ("test_of_a_stream", "a test set is a map-style Dataset, .* returned a Stream"),
        ("test_of_a_generator", "a test set is a map-style Dataset, .* returned a generator"),
    ],
)
def test_a_test_set_of_something_else_is_refused_at_once(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(f"user_data:{name}")


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("datasets", 4),
        ("loaders", 4),
        ("test_of_regression", None),
        ("test_of_own_dicts", None),  # known only as they are read
        ("batches", None),
    ],
)
def test_the_classes_of_a_test_set_are_known_where_they_are_listed(
    name: str, classes: int | None
) -> None:
    assert load_data(f"user_data:{name}").test_classes == classes


def test_whole_numbers_of_every_width_are_classes() -> None:
    data = load_data("user_data:narrow")
    assert data.test is not None
    for _, targets in (data.train.read(torch.arange(6)), *data.test()):
        assert targets.dtype is torch.int64
        assert targets.tolist() == [0, 1, 2, 3, 0, 1]


def test_a_test_loader_with_batches_of_its_own_is_checked_as_it_is_read() -> None:
    test = load_data("user_data:test_of_own_dicts").test
    assert test is not None
    with pytest.raises(ValueError, match="the test set of user_data:test_of_own_dicts is a dict"):
        test()


def test_a_loader_that_memory_does_not_hold_is_cut_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MEMORY", 100_000)
    with pytest.warns(UserWarning, match=r"only the first 6,000 .* nothing can be fine-tuned"):
        data = load_data("user_data:endless")
    assert len(data.train) == 6000
    assert not data.whole
    assert data.classes is None


def test_batches_of_a_function() -> None:
    data = load_data("user_data:batches")
    assert len(data.train) == 18
    assert data.test is None


def test_ready_batches_are_taken_all() -> None:
    data = load_data("user_data:many")
    assert len(data.train) == 20_000
    assert data.classes == 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "without examples"),
        ("no_examples", "without examples"),
        ("named", r"a batch is \(inputs, targets\) .* as `labels`, but .* is a dict"),
        ("one", r"returns \(train, test\), but user_data:one returned a TensorDataset"),
        ("stream", "map-style Dataset, a DataLoader or a list .* returned a Stream"),
        ("tensors", r"a batch is \(inputs, targets\)"),
        ("untransformed", r"of user_data:untransformed cannot be stacked .* a transform"),
        ("triples", r"of user_data:triples is a list of Tensor, Tensor, Tensor"),
        ("padded", r"of user_data:padded cannot be joined .* the same size"),
        ("signed", r"classes count from 0, but user_data:signed has the label -1"),
        ("forms", r"of user_data:forms cannot be joined"),
        ("nothing", "no function 'nothing'"),
    ],
)
def test_a_function_that_returns_something_else_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(f"user_data:{name}")

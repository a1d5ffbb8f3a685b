"""Sources read examples by index; the augmentation moves and mirrors, and is seeded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from paretoprune.experiments.data.sources import (
    DatasetSource,
    ExampleArray,
    ImageArray,
    lists_classes,
    picked,
)

IMAGES = torch.arange(5 * 6 * 6 * 3, dtype=torch.uint8).view(5, 6, 6, 3)
CLASSES = torch.tensor([0, 1, 2, 1, 0])


def array(**changes: Any) -> ImageArray:
    return ImageArray(IMAGES, CLASSES, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0), **changes)


def test_images_are_normalised_per_channel() -> None:
    inputs, targets = array().read(torch.tensor([3, 1]))
    assert inputs.shape == (2, 3, 6, 6)
    assert inputs.dtype == torch.float32
    expected = (float(IMAGES[3, 4, 5, 1]) / 255 - 0.2) / 0.25
    torch.testing.assert_close(inputs[0, 1, 4, 5], torch.tensor(expected))
    assert targets.tolist() == [1, 1]


def test_every_augmented_image_is_a_shifted_perhaps_mirrored_original() -> None:
    source = ImageArray(
        IMAGES, CLASSES, mean=(0.0,) * 3, std=(1.0,) * 3, scale=1.0, shift=2, flip=True
    )
    plain, _ = source.read(torch.arange(5))
    moved, _ = source.read(torch.arange(5), torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    seen = []
    for example in range(5):
        crops = {
            (row, column, mirrored): crop.flip(2) if mirrored else crop
            for row in range(5)
            for column in range(5)
            for mirrored in (False, True)
            for crop in [padded[example, :, row : row + 6, column : column + 6]]
        }
        seen += [at for at, crop in crops.items() if torch.equal(crop, moved[example])]
    assert len(seen) == 5
    assert len(set(seen)) > 2
    assert len({mirrored for _, _, mirrored in seen}) == 2


def test_augmentation_depends_on_the_generator_alone() -> None:
    first, second, other = (
        array().read(torch.arange(5), torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_an_image_without_shift_and_flip_stays() -> None:
    source = array(shift=0, flip=False)
    augmented, _ = source.read(torch.arange(5), torch.Generator())
    assert torch.equal(augmented, source.read(torch.arange(5))[0])


class Pairs(Dataset[Any]):
    """Dictionary inputs beside integer targets; draws noise like an augmentation."""

    def __init__(self, targets: Any = None, *, noise: float = 0.0) -> None:
        if targets is not None:
            self.targets = targets
        self.noise = noise

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        return {"x": torch.full((3,), float(index)) + self.noise * torch.rand(3)}, index % 2


def test_a_dataset_is_collated() -> None:
    inputs, targets = DatasetSource(Pairs()).read(torch.tensor([2, 3]))
    assert inputs["x"].tolist() == [[2.0] * 3, [3.0] * 3]
    assert targets.tolist() == [0, 1]


def test_a_dataset_lists_its_classes_or_has_none() -> None:
    for listed in ([0, 1, 0, 1], np.array([0, 1, 0, 1]), torch.tensor([0, 1, 0, 1])):
        labels = DatasetSource(Pairs(listed)).labels()
        assert labels is not None
        assert labels.tolist() == [0, 1, 0, 1]
    others = [0, 1, 2, 3]  # as where a target_transform joins classes
    for useless in (None, ["a", "b", "a", "b"], [0.5, 1.0, 0.5, 1.0], [0, 1], object(), others):
        assert DatasetSource(Pairs(useless)).labels() is None


def test_datasets_of_torch_tell_the_classes_of_what_they_hold() -> None:
    tensors = TensorDataset(torch.zeros(4, 1), torch.tensor([2, 0, 1, 2]))
    listing = Pairs([0, 1, 0, 1])
    joined: Dataset[Any] = ConcatDataset([Subset(tensors, [3, 1]), listing])
    labels = DatasetSource(joined).labels()
    assert labels is not None
    assert labels.tolist() == [2, 0, 0, 1, 0, 1]
    assert [lists_classes(DatasetSource(each)) for each in (listing, joined)] == [True, False]
    unknown: tuple[Dataset[Any], ...] = (
        TensorDataset(torch.zeros(4, 1)),
        TensorDataset(torch.zeros(4, 1), torch.zeros(4)),
        Subset(Pairs(), [0]),
        ConcatDataset([tensors, Pairs()]),
    )
    assert all(DatasetSource(each).labels() is None for each in unknown)


def test_a_dataset_that_augments_by_itself_is_seeded_too() -> None:
    source = DatasetSource(Pairs(noise=1.0))

    def read(*seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed[0]) if seed else None
        inputs: Tensor = source.read(torch.arange(4), generator)[0]["x"]
        return inputs

    assert torch.equal(read(5), read(5))
    assert not torch.equal(read(5), read(6))
    assert torch.equal(read(), read())


def test_a_dataset_augmentation_is_seeded_and_leaves_the_global_generator() -> None:
    source = DatasetSource(Pairs(), Pairs(noise=1.0))
    state = torch.get_rng_state()
    first, _ = source.read(torch.arange(4), torch.Generator().manual_seed(5))
    again, _ = source.read(torch.arange(4), torch.Generator().manual_seed(5))
    assert torch.equal(first["x"], again["x"])
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first["x"], source.read(torch.arange(4))[0]["x"])


def test_reading_does_not_seed_what_a_training_on_a_gpu_draws_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(seed: int) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "manual_seed_all", never)
    DatasetSource(Pairs(), Pairs(noise=1.0)).read(torch.arange(4), torch.Generator())


def test_a_dataset_without_augmentation_is_read_plain() -> None:
    inputs, _ = DatasetSource(TensorDataset(torch.eye(3), torch.arange(3))).read(
        torch.arange(3), torch.Generator()
    )
    assert torch.equal(inputs, torch.eye(3))


def test_ready_batches_are_joined() -> None:
    batches = [
        ((torch.zeros(2, 1), {"mask": torch.zeros(2)}), torch.tensor([0, 1])),
        ((torch.ones(1, 1), {"mask": torch.ones(1)}), torch.tensor([2])),
    ]
    source = ExampleArray.of(batches)
    (first, second), targets = source.read(torch.tensor([2, 0]))
    assert first.tolist() == [[1.0], [0.0]]
    assert second["mask"].tolist() == [1.0, 0.0]
    assert targets.tolist() == [2, 0]
    assert len(source) == 3


def test_what_has_no_rows_belongs_to_every_example() -> None:
    inputs = {"x": torch.arange(2.0), "flag": True, "scale": torch.tensor(3.0)}
    source = ExampleArray.of([(inputs, torch.tensor([0, 1]))] * 2)
    read, targets = source.read(torch.tensor([3]))
    assert (read["x"].tolist(), read["flag"], read["scale"].item()) == ([1.0], True, 3.0)
    assert targets.tolist() == [1]


def test_examples_of_different_sizes_are_no_batch() -> None:
    ragged: Any = [(torch.zeros(2 + index % 2), 0) for index in range(4)]
    source = DatasetSource(ragged, name="ragged")
    assert source.read(torch.tensor([0, 2]))[0].shape == (2, 2)
    with pytest.raises(ValueError, match=r"of ragged cannot be stacked \(RuntimeError: stack"):
        source.read(torch.tensor([0, 1]))


def test_regression_targets_are_no_classes() -> None:
    assert ExampleArray(torch.zeros(3, 1), torch.zeros(3)).labels() is None
    assert ExampleArray(torch.zeros(3, 1), torch.zeros(3, 2, dtype=torch.int64)).labels() is None


def test_picked_keeps_the_form_of_inputs() -> None:
    value = {"a": (torch.arange(3), torch.arange(3) * 2)}
    chosen = picked(value, torch.tensor([1]))
    assert [tensor.tolist() for tensor in chosen["a"]] == [[1], [2]]

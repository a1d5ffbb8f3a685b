"""Splits are disjoint, class-balanced, seeded and of the right size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paretoprune.criteria import fingerprint
from paretoprune.experiments.data.sources import ExampleArray, ImageArray
from paretoprune.experiments.data.splits import (
    LARGE_IMAGES,
    Batches,
    Sizes,
    TrainingBatches,
    batch_size_for,
    sizes_for,
    split,
)


def numbered(classes: Tensor) -> ExampleArray:
    """Examples whose input is their own position."""
    return ExampleArray(torch.arange(len(classes)).float().unsqueeze(1), classes)


def positions(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    return [int(value) for inputs, _ in batches for value in inputs]


BALANCED = numbered(torch.arange(4000) % 10)


def test_validation_shares_nothing_with_the_other_splits() -> None:
    splits = split(BALANCED, seed=0, sizes=Sizes(100, 200, 400, 300))
    validation = set(positions(splits.validation))
    calibration = set(positions(splits.calibration))
    recalibration = set(positions(splits.recalibration))
    assert not validation & (calibration | recalibration)
    assert calibration < recalibration
    assert validation | set(splits.training.tolist()) == set(range(4000))
    assert len(validation) + len(splits.training) == 4000
    assert splits.refit is not None
    assert positions(list(splits.refit)) == splits.training[:300].tolist()


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (40, (30, 30, 10)),
        (1347, (1000, 1011, 336)),
        (4000, (1000, 2000, 1000)),
        (5000, (1000, 2000, 1250)),
        (16_000, (1000, 2000, 4000)),
        (50_000, (1000, 2000, 4000)),
    ],
)
def test_sizes_shrink_with_the_data(total: int, expected: tuple[int, int, int]) -> None:
    splits = split(numbered(torch.arange(total) % 10), seed=0)
    parts = (splits.calibration, splits.recalibration, splits.validation)
    assert tuple(len(positions(part)) for part in parts) == expected
    assert len(splits.training) == total - expected[2] >= 0.75 * total


def test_the_search_split_of_cifar_10_is_the_one_that_results_were_measured_on() -> None:
    splits = split(numbered(torch.arange(50_000) % 10), seed=0)
    assert len(splits.training) == 46_000
    assert fingerprint.of_batches(splits.validation) == "200a1629ac0bf157c6c26d3089fc721d"


def test_each_split_has_every_class_equally_often() -> None:
    splits = split(BALANCED, seed=3)
    for part in (splits.calibration, splits.recalibration, splits.validation):
        counts = torch.cat([targets for _, targets in part]).bincount()
        assert counts.unique().numel() == 1


def test_rare_classes_are_on_both_sides() -> None:
    classes = torch.cat([torch.zeros(180), torch.ones(20)]).long()
    splits = split(numbered(classes), seed=0, sizes=Sizes(40, 40, 50))
    validation = torch.cat([targets for _, targets in splits.validation])
    calibration = torch.cat([targets for _, targets in splits.calibration])
    assert validation.bincount().tolist() == [45, 5]  # in proportion
    assert calibration.bincount().tolist() == [25, 15]  # balanced until the rare class is used up


def test_the_seed_decides() -> None:
    first, again, other = (positions(split(BALANCED, seed=s).validation) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_examples_without_classes_are_drawn_at_random() -> None:
    source = ExampleArray(torch.arange(40.0).unsqueeze(1), torch.rand(40))
    splits = split(source, seed=0)
    assert len(set(positions(splits.validation))) == 10


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 training examples, but the data has 3"):
        split(numbered(torch.arange(3)), seed=0)


def test_large_images_come_in_small_splits_and_batches() -> None:
    source = ExampleArray(torch.zeros(2, 3, 224, 224), torch.arange(2))
    assert sizes_for(source) == LARGE_IMAGES
    assert batch_size_for(source) == 32


def test_recalibration_is_augmented_and_calibration_is_not() -> None:
    images = torch.randint(1, 255, (64, 8, 8, 1), dtype=torch.uint8)
    source = ImageArray(images, torch.arange(64) % 4, (0.0,), (1.0,), shift=2)
    splits = split(source, seed=0, sizes=Sizes(16, 16, 16))
    plain = torch.cat([inputs for inputs, _ in splits.calibration])
    augmented = torch.cat([inputs for inputs, _ in splits.recalibration])
    assert (plain > 0).all()
    assert not (augmented > 0).all()


@pytest.mark.parametrize(
    ("total", "expected"),
    [(334, [126, 125]), (1347, [203, 202, 202, 202, 202]), (50_000, [250] * 8)],
)
def test_recalibration_comes_in_equal_batches(total: int, expected: list[int]) -> None:
    recalibration = split(numbered(torch.arange(total) % 10), seed=0).recalibration
    assert [len(targets) for _, targets in recalibration] == expected


def test_batches_are_read_anew_each_time_as_float32() -> None:
    source = ExampleArray(torch.arange(5, dtype=torch.float64), torch.arange(5))
    batches = Batches(source, torch.tensor([4, 2, 0]), batch_size=2)
    for _ in range(2):
        assert [inputs.tolist() for inputs, _ in batches] == [[4.0, 2.0], [0.0]]
    assert len(batches) == 2
    assert all(inputs.dtype == torch.float32 for inputs, _ in batches)


def test_training_batches_are_full_shuffled_and_seeded() -> None:
    first, again = (TrainingBatches(BALANCED, torch.arange(10), 4, seed=7) for _ in range(2))
    epochs = [positions(list(first)) for _ in range(2)]
    assert epochs == [positions(list(again)) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert len(first) == 2
    assert all(len(set(epoch)) == 8 for epoch in epochs)


def test_fewer_examples_than_a_batch_are_one_batch() -> None:
    batches = TrainingBatches(BALANCED, torch.arange(3), 64, seed=0)
    assert [len(targets) for _, targets in batches] == [3]


def test_a_search_split_that_was_seen_is_augmented() -> None:
    pixels = torch.randint(0, 256, (100, 8, 8, 1), dtype=torch.uint8)
    source = ImageArray(pixels, torch.arange(100) % 10, (0.5,), (0.5,))
    plain, seen = (split(source, seed=1, seen=seen) for seen in (False, True))
    assert torch.equal(
        torch.cat([targets for _, targets in plain.validation]),
        torch.cat([targets for _, targets in seen.validation]),
    )
    first, moved = plain.validation[0][0], seen.validation[0][0]
    assert first.shape == moved.shape
    assert not torch.equal(first, moved)

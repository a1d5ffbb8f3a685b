"""Attacks and corruptions do what they say, in pixel space, and are the same every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from paretoprune.experiments.data.opening import load_data
from paretoprune.experiments.data.sources import ImageArray
from paretoprune.experiments.data.splits import Batches, TrainingBatches
from paretoprune.experiments.exporting.export import export
from paretoprune.experiments.measuring.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from paretoprune.experiments.measuring.reports import check_reports
from paretoprune.experiments.measuring.robustness import fgsm, robustness, summary
from paretoprune.experiments.models import digits_resnet
from paretoprune.experiments.training import Training, train
from paretoprune.search import Candidate, Completed, Problem, Record, evaluate
from paretoprune.surgery import PruningPlan


def smooth(n: int = 4, channels: int = 3) -> torch.Tensor:
    """Images without noise of their own."""
    coarse = torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, (32, 32), mode="bilinear")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_changes_images_and_is_repeatable(name: str) -> None:
    images = smooth()
    before = images.clone()
    for severity in range(SEVERITIES):
        done = corrupt(images, name, severity, seed=1)
        assert done.shape == images.shape
        assert torch.isfinite(done).all()
        assert done.min() >= 0
        assert done.max() <= 1
        assert 1e-3 < float((done - images).abs().mean()) < 0.5
        assert torch.equal(done, corrupt(images, name, severity, seed=1))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "name",
    ["gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "zoom_blur", "snow", "fog",
     "brightness", "contrast", "jpeg_compression"],
)  # fmt: skip
def test_a_higher_severity_changes_more(name: str) -> None:
    images = smooth(16)
    weak, strong = (
        float((corrupt(images, name, severity, seed=0) - images).abs().mean())
        for severity in (0, 4)
    )
    assert strong > 1.3 * weak


def test_glass_of_a_higher_severity_changes_a_little_more() -> None:
    images = smooth(16)
    weak, strong = (
        float((corrupt(images, "glass_blur", severity, seed=0) - images).abs().mean())
        for severity in (0, 4)
    )
    assert strong > 1.1 * weak


@pytest.mark.parametrize("name", ["gaussian_noise", "motion_blur", "fog", "elastic_transform"])
def test_another_seed_draws_other_corruptions(name: str) -> None:
    images = smooth()
    assert not torch.equal(corrupt(images, name, 2, seed=0), corrupt(images, name, 2, seed=1))


@pytest.mark.parametrize("name", ["defocus_blur", "zoom_blur", "motion_blur", "pixelate"])
def test_blurs_leave_a_plain_image_as_it_is(name: str) -> None:
    plain = torch.full((2, 3, 32, 32), 0.4)
    torch.testing.assert_close(corrupt(plain, name, 4, seed=0), plain, rtol=1e-4, atol=1e-4)


def test_noise_has_its_spread() -> None:
    grey = torch.full((8, 3, 32, 32), 0.5)
    assert float(corrupt(grey, "gaussian_noise", 0, 0).std()) == pytest.approx(0.04, rel=0.02)
    assert float(corrupt(grey, "shot_noise", 4, 0).std()) == pytest.approx(0.1, rel=0.03)
    noisy = corrupt(grey, "impulse_noise", 4, 0)
    flipped = noisy[noisy != 0.5]
    assert len(flipped) / noisy.numel() == pytest.approx(0.07, rel=0.1)
    assert set(flipped.tolist()) == {0.0, 1.0}
    assert float(flipped.mean()) == pytest.approx(0.5, abs=0.05)


MEAN, STD = torch.tensor([0.3]).view(1, 1, 1, 1), torch.tensor([0.2]).view(1, 1, 1, 1)


def test_fgsm_moves_every_pixel_by_epsilon_against_the_network() -> None:
    torch.manual_seed(0)
    model = digits_resnet().train()
    images = torch.rand(6, 1, 8, 8)
    targets = torch.arange(6)
    attacked = fgsm(model, images, targets, 4 / 255, MEAN, STD) * STD + MEAN
    moved = (attacked - images).abs()
    inside = (images > 4 / 255) & (images < 1 - 4 / 255)
    torch.testing.assert_close(moved[inside], torch.full_like(moved[inside], 4 / 255))
    assert attacked.min() >= -1e-6
    assert attacked.max() <= 1 + 1e-6
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    before, after = (
        evaluate(model, [((each - MEAN) / STD, targets)])["loss"] for each in (images, attacked)
    )
    assert after > before


def by_hand(model: nn.Module, batches: Batches, source: ImageArray, name: str) -> float:
    """Accuracy under a corruption, averaged over its severities."""
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (source.mean, source.std))
    right = []
    for severity in range(SEVERITIES):
        for number, (inputs, targets) in enumerate(batches):
            pixels = (inputs * std + mean).clamp(0, 1)
            corrupted = corrupt(pixels, name, severity, seed=number)
            with torch.no_grad():
                outputs = model.eval()((corrupted - mean) / std)
            right += (outputs.argmax(1) == targets).tolist()
    return sum(right) / len(right)


def test_a_trained_network_suffers_more_from_stronger_attacks() -> None:
    data = load_data("digits")
    assert data.test is not None
    batches = TrainingBatches(data.train, torch.arange(600), 64, seed=0)
    torch.manual_seed(0)
    model = train(digits_resnet(), batches, Training(epochs=4, learning_rate=0.1))
    test = data.test()
    assert isinstance(test, Batches)
    assert isinstance(test.source, ImageArray)
    few = Batches(test.source, test.indices[:100], 50)
    found = robustness(model, few)
    assert set(found) == {"fgsm_2", "fgsm_4", "fgsm_8", "corrupted", *CORRUPTIONS}
    plain = evaluate(model, few)["accuracy"]
    assert plain >= found["fgsm_2"] >= found["fgsm_4"] >= found["fgsm_8"]
    assert found["corrupted"] == pytest.approx(
        sum(found[name] for name in CORRUPTIONS) / len(CORRUPTIONS)
    )
    assert found["contrast"] == pytest.approx(by_hand(model, few, test.source, "contrast"))
    assert found == robustness(model, few)
    table = summary(found, found)
    assert len(table) == 2 + 4 + len(CORRUPTIONS)
    with pytest.raises(ValueError, match="whose normalisation is known"):
        robustness(model, [(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())])


def test_a_report_that_cannot_be_measured_is_told_before_long_work(tmp_path: Path) -> None:
    batches = [(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())]
    problem = Problem(digits_resnet(), batches[0][0], batches, batches, test=lambda: batches)
    record = Record(0, Candidate("l2", 0.5), PruningPlan(), None, Completed({}, 1.0))
    told: list[str] = []
    for given, reason in (
        (problem, "whose normalisation is known"),
        (replace(problem, test=None), "there is no test split"),
    ):
        with pytest.raises(ValueError, match=reason):
            export(
                given,
                record,
                tmp_path / "small",
                reports=("robustness",),
                progress=lambda what, done, total: told.append(what),
            )
    assert told == []
    check_reports(("energy",), problem)

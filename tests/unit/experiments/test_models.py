"""The ResNets have the published sizes, and exact option-A shortcuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from paretoprune.experiments import models
from paretoprune.experiments.references import load_weights

PUBLISHED = {  # He et al. 2016, table 6 gives params in M: 0.27, 0.46, 0.66, 0.85
    models.resnet20: (40_551_040, 269_722),
    models.resnet32: (68_862_592, 464_154),
    models.resnet44: (97_174_144, 658_586),
    models.resnet56: (125_485_696, 853_018),
}


@pytest.mark.parametrize(("factory", "size"), PUBLISHED.items(), ids=lambda x: str(x)[:18])
def test_macs_and_params(factory: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    model = factory().eval()
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(1, 3, 32, 32))
    params = sum(parameter.numel() for parameter in model.parameters())
    assert (counter.get_total_flops() // 2, params) == size
    assert logits.shape == (1, 10)


def test_digits_resnet_is_small_and_takes_grey_images() -> None:
    model = models.digits_resnet(num_classes=7).eval()
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 7)
    assert 10_000 < sum(parameter.numel() for parameter in model.parameters()) < 40_000


def test_the_shortcut_subsamples_and_adds_empty_channels_on_both_sides() -> None:
    block = models.BasicBlock(4, 8, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # the branch is then zero, so the shortcut alone is seen
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_surgery_can_rewrite_the_padding() -> None:
    block = models.BasicBlock(4, 8, stride=2).eval()
    assert isinstance(block.shortcut, nn.ConstantPad3d)
    assert not block.shortcut.state_dict()
    block.shortcut.padding = (0, 0, 0, 0, 1, 2)
    assert block.shortcut(torch.zeros(1, 4, 3, 3)).shape == (1, 7, 3, 3)


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_weights_load(depth: int, data_root: Path) -> None:
    model = getattr(models, f"resnet{depth}")()
    load_weights(model, data_root / "checkpoints" / f"resnet{depth}-cifar10.safetensors")
    assert model.bn1.running_mean.abs().sum() > 0

"""Blocks are found in the families people use, and removing one is zeroing its branches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from paretoprune.surgery import PruningGraph, PruningPlan, prune, trace
from tests.unit.surgery.oracles import counted, difference, half, masked_outputs, outputs
from tests.unit.surgery.specimen import settle

small_settings: dict[str, Any] = {"num_classes": 7}


def efficientnet() -> Any:
    config = functools.partial(tv.efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    stages = [config(1, 3, 1, 8, 8, 2), config(4, 5, 2, 8, 12, 2)]
    return tv.EfficientNet(stages, 0.2, last_channel=16, **small_settings)


def efficientnet_v2() -> Any:
    stages = [
        tv.efficientnet.FusedMBConvConfig(2, 3, 1, 8, 8, 2),
        tv.efficientnet.MBConvConfig(4, 3, 2, 8, 12, 2),
    ]
    return tv.EfficientNet(stages, 0.2, last_channel=16, **small_settings)


def mobilenet_v2() -> Any:
    return tv.MobileNetV2(
        inverted_residual_setting=[[1, 8, 1, 1], [4, 8, 2, 2], [4, 16, 2, 1]], **small_settings
    )


def mobilenet_v3() -> Any:
    stages = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 1, 1, 1.0),
        InvertedResidualConfig(16, 5, 24, 16, False, "HS", 1, 1, 1.0),
    ]
    return tv.MobileNetV3(stages, 24, **small_settings)


def regnet() -> Any:
    return tv.RegNet(
        tv.regnet.BlockParams([2, 2], [8, 16], [4, 8], [1.0, 1.0], [2, 2], 0.25),
        stem_width=8,
        **small_settings,
    )


def convnext() -> Any:
    stages = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 1)]
    return tv.ConvNeXt(stages, 0.1, **small_settings)


def swin(block: Any) -> Any:
    return tv.SwinTransformer(
        [2, 2], 8, [2, 2], [2, 4], [2, 2], stochastic_depth_prob=0.1, block=block, **small_settings
    )


class Tower(nn.Module):
    """Residual MLPs written as people write them, with dropout inside."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.BatchNorm1d(8), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: torch.Tensor) -> Any:
            y = nn.functional.dropout(torch.tanh(self.up(self.norm(x))), 0.1, self.training)
            x = self.down(y).add_(x)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 16 * 16, 8)
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))
        self.head = nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.embed(x.flatten(1))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def resnet(block: Any) -> Any:
    return tv.ResNet(block, [2, 2, 1, 1], **small_settings)


def vit() -> Any:
    return tv.VisionTransformer(16, 4, 2, 2, 16, 24, **small_settings)


# What builds the network, its removable blocks, and the layers that end their branches.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[str, ...]]] = {
    "basic": (
        functools.partial(resnet, tv.resnet.BasicBlock),
        ("layer1.0", "layer1.1", "layer2.1"),
        ("bn2",),
    ),
    "bottleneck": (
        functools.partial(resnet, tv.resnet.Bottleneck),
        ("layer1.1", "layer2.1"),
        ("bn3",),
    ),
    "mobilenet_v2": (mobilenet_v2, ("features.3", "features.5"), ("conv.3",)),
    "mobilenet_v3": (mobilenet_v3, ("features.1", "features.2"), ("block.2.1", "block.3.1")),
    "efficientnet": (
        efficientnet,
        ("features.1.0", "features.1.1", "features.2.1"),
        ("block.2.1", "block.3.1"),
    ),
    "efficientnet_v2": (
        efficientnet_v2,
        ("features.1.0", "features.1.1", "features.2.1"),
        ("block.1.1", "block.3.1"),
    ),
    "regnet": (
        regnet,
        ("trunk_output.block1.block1-1", "trunk_output.block2.block2-1"),
        ("f.c.1",),
    ),
    "convnext": (
        convnext,
        ("features.1.0", "features.1.1", "features.3.0"),
        ("block.5",),
    ),
    "vit": (
        vit,
        ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"),
        ("self_attention.out_proj", "mlp.3"),
    ),
    "swin": (
        functools.partial(swin, tv.swin_transformer.SwinTransformerBlock),
        ("features.1.0", "features.1.1", "features.3.0", "features.3.1"),
        ("attn.proj", "mlp.3"),
    ),
    "swin_v2": (
        functools.partial(swin, tv.swin_transformer.SwinTransformerBlockV2),
        ("features.1.0", "features.1.1", "features.3.0", "features.3.1"),
        ("norm1", "norm2"),
    ),
    "tower": (Tower, ("layers.0", "layers.1", "layers.2"), ("down",)),
}
everything = pytest.mark.parametrize("family", FAMILIES)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@functools.cache
def traced(family: str) -> tuple[nn.Module, PruningGraph]:
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    settle(model)
    return model.eval(), trace(model, IMAGES)


@everything
def test_blocks_are_found_and_removing_them_is_zeroing_their_branches(family: str) -> None:
    model, graph = traced(family)
    _, blocks, ends = FAMILIES[family]
    assert tuple(graph.blocks) == blocks
    for removed in (blocks[:1], blocks[1:2], blocks):
        dense = copy.deepcopy(model)
        for name in removed:
            modules = dict(dense.get_submodule(name).named_modules())
            assert any(end in modules for end in ends)
            for parameter in [
                p for end in ends if end in modules for p in modules[end].parameters()
            ]:
                nn.init.zeros_(parameter)
        plan = PruningPlan(removed=removed)
        small = prune(model, graph, plan)
        assert difference(outputs(dense, IMAGES), outputs(small, IMAGES)) < 1e-5
        assert counted(small, IMAGES[:1]) == graph.cost(plan)


@everything
def test_units_and_blocks_go_together(family: str) -> None:
    model, graph = traced(family)
    for removed in ((), FAMILIES[family][1][1:]):
        plan = PruningPlan(half(graph).kept, removed)
        small = prune(model, graph, plan)
        expected = masked_outputs(model, graph, plan, IMAGES)
        assert difference(expected, outputs(small, IMAGES)) < 1e-4
        assert counted(small, IMAGES[:1]) == graph.cost(plan)
        assert graph.cost(plan).macs < 0.65 * graph.cost().macs
        small.train()(IMAGES).sum().backward()
        assert all(parameter.grad is not None for parameter in small.parameters())


@everything
def test_nothing_but_the_logits_is_frozen(family: str) -> None:
    reasons = {group.frozen for group in traced(family)[1].groups.values() if group.frozen}
    biases = {"all its channels are one unit"}
    assert reasons == {"reaches the model's output"} | (biases if family == "swin_v2" else set())

"""Networks as people use them: pruned equals masked, and costs are those torch and thop count."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import thop
import torch
import torchvision.models as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paretoprune.experiments import models as cifar
from paretoprune.surgery import PruningGraph, PruningPlan, prune, reconstruct, trace
from tests.unit.surgery.oracles import counted, difference, half, masked_outputs, outputs, plans
from tests.unit.surgery.specimen import settle

few = settings(max_examples=3, deadline=None, derandomize=True, database=None)

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits_resnet": (cifar.digits_resnet, (1, 8, 8)),
    "resnet20": (cifar.resnet20, (3, 32, 32)),
    "resnet56": (cifar.resnet56, (3, 32, 32)),
    "resnet18": (functools.partial(tv.resnet18, num_classes=10), (3, 64, 64)),
    "resnet50": (functools.partial(tv.resnet50, num_classes=10), (3, 64, 64)),
    "vgg16_bn": (functools.partial(tv.vgg16_bn, num_classes=10), (3, 32, 32)),
    "mobilenet_v2": (functools.partial(tv.mobilenet_v2, num_classes=10), (3, 64, 64)),
    "densenet121": (functools.partial(tv.densenet121, num_classes=10), (3, 64, 64)),
    "shufflenet": (functools.partial(tv.shufflenet_v2_x0_5, num_classes=10), (3, 64, 64)),
    "regnet": (functools.partial(tv.regnet_y_400mf, num_classes=10), (3, 64, 64)),
}
SLOW = ("shufflenet", "regnet")
everything = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETWORKS],
)


@functools.cache
def traced(name: str) -> tuple[nn.Module, PruningGraph]:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model = build()
    settle(model)
    return model.eval(), trace(model, torch.randn(1, *shape))


def images(name: str, batch: int) -> torch.Tensor:
    return torch.randn(batch, *NETWORKS[name][1])


@everything
@given(data=st.data())
@few
def test_pruned_equals_masked_and_costs_what_the_graph_says(name: str, data: Any) -> None:
    model, graph = traced(name)
    plan = data.draw(plans(graph))
    inputs = images(name, 2)
    small = prune(model, graph, plan)
    assert difference(masked_outputs(model, graph, plan, inputs), outputs(small, inputs)) < 1e-4
    assert counted(small, inputs) == graph.cost(plan)


@everything
def test_every_channel_but_the_logits_may_go(name: str) -> None:
    graph = traced(name)[1]
    reasons = {group.frozen for group in graph.groups.values() if group.frozen}
    coupled = {"all its channels are one unit"} if name == "shufflenet" else set()
    assert reasons == {"reaches the model's output"} | coupled


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("digits_resnet", 4),
        ("resnet20", 7),
        ("resnet56", 25),
        ("resnet18", 5),
        ("resnet50", 12),
        ("vgg16_bn", 0),
        ("mobilenet_v2", 10),
        ("densenet121", 0),
    ],
)
def test_blocks_that_keep_their_shape_are_removable(name: str, count: int) -> None:
    assert len(traced(name)[1].blocks) == count


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_macs_of_layers_are_those_of_thop(name: str) -> None:
    model, graph = traced(name)
    for plan in (PruningPlan(), half(graph)):
        small = copy.deepcopy(prune(model, graph, plan))  # thop leaves buffers behind
        layers: dict[Any, Any] = dict.fromkeys((nn.BatchNorm2d, nn.AdaptiveAvgPool2d), _nothing)
        macs, params = thop.profile(small, (images(name, 1),), custom_ops=layers, verbose=False)
        assert (macs, params) == (graph.cost(plan).macs, graph.cost(plan).params)


def _nothing(*_: Any) -> None:
    return None


def test_costs_of_published_networks() -> None:
    assert traced("resnet20")[1].cost().macs == 40_551_040
    assert traced("resnet56")[1].cost().macs == 125_485_696
    torch.manual_seed(0)
    assert trace(tv.mobilenet_v2(), torch.randn(1, 3, 224, 224)).cost().params == 3_504_872


def test_transformers_lose_heads_and_channels_and_are_reconstructed_on_any_batch() -> None:
    torch.manual_seed(0)
    model = tv.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=10).eval()
    settle(model)
    graph = trace(model, torch.randn(1, 3, 32, 32))
    assert [group.size for group in graph.open_groups] == [16, 2, 24, 2, 24]
    assert len(graph.blocks) == 2
    inputs = torch.randn(6, 3, 32, 32)
    hidden = {name: kept for name, kept in half(graph).kept.items() if name.endswith("mlp.0")}
    for plan in (half(graph), PruningPlan(hidden)):
        small = prune(model, graph, plan)
        fitted = reconstruct(small, model, graph, plan, [(inputs, torch.zeros(6).long())])
        dense = outputs(model, inputs)
        assert difference(dense, outputs(fitted, inputs)) < difference(
            dense, outputs(small, inputs)
        )

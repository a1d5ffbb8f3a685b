"""The zoo as a table: how to build each network, and what `trace` must find in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from paretoprune.surgery import PruningGraph, trace
from tests.unit.surgery import zoo, zoo_refusals, zoo_wiring

OUTPUT = "reaches the model's output"


@dataclass(frozen=True)
class Specimen:
    """One network of the zoo.

    Attributes:
        build: Returns the network with fresh weights.
        shape: Shape of the input of two examples, or an example input.
        opened: Sizes of the groups that may be pruned.
        frozen: For every other group, a part of its reason.
        blocks: The removable blocks.
    """

    build: Callable[[], nn.Module]
    shape: Any
    opened: Mapping[str, int]
    frozen: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    def network(self) -> nn.Module:
        """Returns the network in eval mode, with BatchNorm statistics as if trained."""
        torch.manual_seed(0)
        model = self.build()
        settle(model)
        return model.eval()

    def inputs(self, batch: int = 2) -> Any:
        """Returns random inputs of `batch` examples."""
        torch.manual_seed(1)
        return draw(self.shape, batch)


def settle(model: nn.Module) -> None:
    """Gives BatchNorms parameters and statistics as if trained, in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)


def draw(shape: Any, batch: int) -> Any:
    """Returns random inputs in the form of `shape`; a str shape means tokens."""
    if isinstance(shape, dict):
        return {name: draw(item, batch) for name, item in shape.items()}
    if isinstance(shape, list):
        return tuple(draw(item, batch) for item in shape)
    if isinstance(shape, str):
        return torch.randint(9, (batch, int(shape)))
    return torch.randn(batch, *shape)


@functools.cache
def traced(name: str) -> tuple[nn.Module, PruningGraph]:
    """Returns a network of the zoo and its graph, made once; tests leave them as they are."""
    model = ZOO[name].network()
    return model, trace(model, ZOO[name].inputs())


IMAGES, TOKENS = zoo.IMAGES, (6, 4)

ZOO: Mapping[str, Specimen] = {
    "chain": Specimen(zoo.chain, IMAGES, {"0.0": 8, "3.0": 6}, {"5.2": OUTPUT}),
    "residual": Specimen(
        zoo.residual,
        IMAGES,
        {"0.0": 6, "2.conv1.0": 6, "3.conv1.0": 8, "3.conv2.0": 8, "4.conv1.0": 8},
        {"5.2": OUTPUT},
        ("2", "4"),
    ),
    "pre_activation": Specimen(
        zoo.pre_activation,
        IMAGES,
        {"0": 6, "1.conv1": 7, "2.conv1": 7},
        {"4.2": OUTPUT},
        ("1", "2"),
    ),
    "signed": Specimen(
        zoo.SignedResidual, IMAGES, {"stem": 6, "block.conv1.0": 6}, {"head.2": OUTPUT}
    ),
    "dense": Specimen(
        zoo.Dense,
        IMAGES,
        {"stem": 4, "layers.0.2": 3, "layers.1.2": 3, "layers.2.2": 3},
        {"head.2": OUTPUT},
    ),
    "depthwise": Specimen(zoo.depthwise, IMAGES, {"0.0": 6, "6": 8}, {"7.2": OUTPUT}),
    "grouped": Specimen(zoo.grouped, IMAGES, {"0.0": 4}, {"4.2": OUTPUT}),
    "excitation": Specimen(zoo.Excitation, IMAGES, {"conv.0": 8, "down": 4}, {"head.2": OUTPUT}),
    "flattened": Specimen(zoo.flattened, IMAGES, {"0.0": 6, "3": 7}, {"5": OUTPUT}),
    "padded_by_module": Specimen(
        functools.partial(zoo.Padded, by_module=True),
        IMAGES,
        {"stem.0": 4, "conv1.0": 8, "conv2.0": 4, "block.conv1.0": 8},
        {"head.2": OUTPUT},
        ("block",),
    ),
    "padded_in_code": Specimen(
        functools.partial(zoo.Padded, by_module=False),
        IMAGES,
        {"stem.0": 4, "conv1.0": 8, "block.conv1.0": 8},
        {"conv2.0": "meets fixed channels in aten.add", "head.2": OUTPUT},
        ("block",),
    ),
    "called_twice": Specimen(zoo.CalledTwice, IMAGES, {"stem.0": 6, "norm.0": 9}, {"out": OUTPUT}),
    "gated": Specimen(zoo.Gated, IMAGES, {"conv.0": 5, "out": 6}, {"head.2": OUTPUT}),
    "shuffled": Specimen(zoo.Shuffled, IMAGES, {"left.0": 6, "out": 7}, {"head.2": OUTPUT}),
    "ruleless": Specimen(
        zoo.Ruleless,
        IMAGES,
        {"first.0": 6, "third.0": 6},
        {"second.0": "reaches aten.cumsum, which has no rule", "head.2": OUTPUT},
    ),
    "mlp": Specimen(zoo.mlp, (10,), {"0": 12, "2": 9}, {"6": OUTPUT}),
    "one_dimensional": Specimen(zoo.one_dimensional, (3, 24), {"0": 8, "4": 6}, {"8": OUTPUT}),
    "three_dimensional": Specimen(
        zoo.three_dimensional, (2, 4, 6, 6), {"0": 6, "4": 4}, {"6": OUTPUT}
    ),
    "transposed": Specimen(zoo.transposed, IMAGES, {"0.0": 8, "2": 3}, {"7": OUTPUT}),
    "scaled": Specimen(zoo_wiring.Scaled, IMAGES, {"conv1": 6}, {"head.2": OUTPUT}),
    "two_inputs": Specimen(
        zoo_wiring.TwoInputs, [IMAGES, (4,)], {"conv.0": 6, "linear": 7}, {"out": OUTPUT}
    ),
    "named_inputs": Specimen(
        zoo_wiring.TwoInputs,
        {"vector": (4,), "image": IMAGES},
        {"conv.0": 6, "linear": 7},
        {"out": OUTPUT},
    ),
    "two_outputs": Specimen(
        zoo_wiring.TwoOutputs,
        IMAGES,
        {"first.0": 6},
        {"second.0": OUTPUT, "classes.2": OUTPUT, "boxes": OUTPUT},
    ),
    "cut_in_code": Specimen(
        zoo_wiring.CutInCode,
        IMAGES,
        {"second.0": 7, "third.0": 6},
        {"first.0": "cut by aten.slice at fixed positions", "head.2": OUTPUT},
    ),
    "fixed_view": Specimen(
        zoo_wiring.FixedView,
        IMAGES,
        {"first.0": 6},
        {"second.0": "self-check failed: the pruned network raises", "head": OUTPUT},
    ),
    "normed": Specimen(
        zoo_wiring.Normed,
        IMAGES,
        {"hidden": 9},
        {"conv1": "aten.group_norm", "conv2": "aten.layer_norm", "out": OUTPUT},
    ),
    "attention": Specimen(
        zoo_wiring.Attention,
        TOKENS,
        {"up": 11},
        {"embed": "self-check failed", "qkv": "scaled_dot_product", "out": OUTPUT},
    ),
    "tokens": Specimen(zoo_wiring.Tokens, IMAGES, {"embed": 6, "up": 10}, {"out": OUTPUT}),
    "halves": Specimen(
        zoo_wiring.Halves,
        IMAGES,
        {"left.0": 5, "right.0": 6},
        {"conv.0": "split into unequal parts", "head.2": OUTPUT},
    ),
    "unflattened": Specimen(
        zoo_wiring.Unflattened, IMAGES, {"conv": 6, "mix": 4}, {"head.2": OUTPUT}
    ),
    "nested": Specimen(
        zoo_wiring.Nested,
        IMAGES,
        {"stem.0": 6, "stage.0.0.conv1.0": 6, "stage.1.conv1.0": 6},
        {"head.2": OUTPUT},
        ("stage.0.0", "stage.1"),
    ),
    "upsampled": Specimen(
        zoo_wiring.Upsampled, IMAGES, {"first.0": 6, "deep.0": 8}, {"out": OUTPUT}
    ),
    "torch_attention": Specimen(
        zoo_refusals.TorchAttention,
        TOKENS,
        {"up": 11},
        {"embed": "embed_dim", "attention": "scaled_dot_product", "out": OUTPUT},
    ),
    "recurrent": Specimen(
        zoo_refusals.Recurrent, TOKENS, {"hidden": 8}, {"embed": "aten.gru", "out": OUTPUT}
    ),
    "embedded": Specimen(zoo_refusals.Embedded, "4", {"hidden": 8}, {"out": OUTPUT}),
    "tied_transposed": Specimen(
        zoo_refusals.TiedTransposed,
        (4,),
        {},
        {"first": "self-check failed", "encoder": "computed in the code", "out": OUTPUT},
    ),
    "written_in_place": Specimen(
        zoo_refusals.WrittenInPlace,
        IMAGES,
        {"second.0": 7},
        {"first.0": "aten.copy_", "head.2": OUTPUT},
    ),
    "zeros_in_code": Specimen(
        zoo_refusals.ZerosInCode,
        IMAGES,
        {"stem.0": 6, "conv1.0": 7},
        {"conv2.0": "meets fixed channels", "head.2": OUTPUT},
    ),
    "standardised": Specimen(
        zoo_refusals.Standardised,
        IMAGES,
        {"hidden": 6},
        {"stem.0": "computed in the code", "head.2": OUTPUT},
    ),
    "multiplied": Specimen(
        zoo_refusals.Multiplied,
        IMAGES,
        {"hidden": 8},
        {
            "first.0": "aten.einsum",
            "second.0": "aten.einsum",
            "third.0": "aten.index",
            "out": OUTPUT,
        },
    ),
}

"""The zoo as a table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torchvision.models.convnext import LayerNorm2d

from paretoprune.surgery import PruningGraph, trace
from tests.unit.surgery import (
    zoo,
    zoo_attention,
    zoo_layout,
    zoo_norms,
    zoo_refusals,
    zoo_wiring,
)
from tests.unit.surgery.specimen import OUTPUT, UNREAD, Specimen


@functools.cache
def traced(name: str) -> tuple[nn.Module, PruningGraph]:
    """Returns a network of the zoo and its graph, made once; tests leave them as they are."""
    model = ZOO[name].network()
    return model, trace(model, ZOO[name].inputs())


IMAGES, TOKENS = zoo.IMAGES, (6, 4)


def transformer(attention: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    """Returns what builds a transformer around an attention."""
    return lambda: zoo_attention.Transformer(attention(**options))


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
        {"conv2.0": "meets fixed channels in add", "head.2": OUTPUT},
        blocks=("block",),
    ),
    "called_twice": Specimen(zoo.CalledTwice, IMAGES, {"stem.0": 6, "norm.0": 9}, {"out": OUTPUT}),
    "gated": Specimen(zoo.Gated, IMAGES, {"conv.0": 5, "out": 6}, {"head.2": OUTPUT}),
    "shuffled": Specimen(zoo.Shuffled, IMAGES, {"left.0": 6, "out": 7}, {"head.2": OUTPUT}),
    "ruleless": Specimen(
        zoo.Ruleless,
        IMAGES,
        {"first.0": 6, "third.0": 6},
        {"second.0": "is mixed by cumsum", "head.2": OUTPUT},
    ),
    "mlp": Specimen(zoo.mlp, (10,), {"0": 12, "2": 9}, {"6": OUTPUT}),
    "one_dimensional": Specimen(zoo.one_dimensional, (3, 24), {"0": 8, "4": 6}, {"8": OUTPUT}),
    "three_dimensional": Specimen(
        zoo.three_dimensional, (2, 4, 6, 6), {"0": 6, "4": 4}, {"6": OUTPUT}
    ),
    "transposed": Specimen(zoo.transposed, IMAGES, {"0.0": 8, "2": 3}, {"7": OUTPUT}),
    "scaled": Specimen(zoo_wiring.Scaled, IMAGES, {"conv1": 6}, {"head.2": OUTPUT}),
    "auxiliary": Specimen(
        zoo_wiring.Auxiliary,
        IMAGES,
        {"first.0": 6, "second.0": 8},
        {"early.0.0": UNREAD, "early.2.2": UNREAD, "head.2": OUTPUT},
    ),
    "fixed_filters": Specimen(
        zoo_wiring.FixedFilters,
        IMAGES,
        {"first.0": 6, "second": 8},
        {
            "transform": "is made by a filter that is a buffer",
            "projection": "buffer",
            "out": OUTPUT,
        },
    ),
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
    "fixed_view": Specimen(
        zoo_wiring.FixedView,
        IMAGES,
        {"first.0": 6},
        {"second.0": "wrapped, as in nn.Sequential(network), its code could", "head": OUTPUT},
    ),
    "fixed_view_wrapped": Specimen(
        lambda: nn.Sequential(zoo_wiring.FixedView()),
        IMAGES,
        {"0.first.0": 6, "0.second.0": 8},
        {"0.head": OUTPUT},
        recorded=("0",),
    ),
    "tokens": Specimen(zoo_wiring.Tokens, IMAGES, {"embed": 6, "up": 10}, {"out": OUTPUT}),
    "unflattened": Specimen(
        zoo_wiring.Unflattened, IMAGES, {"conv": 6, "mix": 4}, {"head.2": OUTPUT}
    ),
    "image_size_like_a_view": Specimen(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1),
            zoo_wiring.Squared(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 5),
        ),
        IMAGES,
        {"0": 8, "1.mix": 12},
        {"4": OUTPUT},
    ),
    "layer_made_in_forward": Specimen(
        lambda: nn.Sequential(nn.Linear(10, 8), nn.ReLU(), zoo_wiring.Partly(), nn.Linear(8, 5)),
        (10,),
        {"0": 8, "2.inner": 4, "2.outer": 8},
        {"3": OUTPUT},
        recorded=("2",),
    ),
    "generator": Specimen(
        lambda: zoo_wiring.generator(nn.Unflatten(1, (4, 4, 4)), nn.Identity()),
        (10,),
        {"0": 4, "4": 6},
        {"6": OUTPUT},
    ),
    "generator_by_view": Specimen(
        lambda: zoo_wiring.generator(zoo_wiring.Viewed(4, 4, 4), nn.BatchNorm2d(4)),
        (10,),
        {"0": 4, "4": 6},
        {"6": OUTPUT},
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
    "recurrent": Specimen(
        zoo_wiring.Recurrent, TOKENS, {"embed": 6, "gru": 7, "hidden": 8}, {"out": OUTPUT}
    ),
    "written_in_place": Specimen(
        zoo_refusals.WrittenInPlace,
        IMAGES,
        {"second.0": 7},
        {"first.0": "meets fixed channels in copy", "head.2": OUTPUT},
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
        {"conv": 7, "norm": 8, "hidden": 6},
        {"stem.0": "the self-check failed: outputs differ", "head.2": OUTPUT},
    ),
    "multiplied": Specimen(
        zoo_refusals.Multiplied,
        IMAGES,
        {"hidden": 8},
        {
            "first.0": "meets channels along another dim",
            "second.0": "meets channels along another dim",
            "third.0": "is indexed",
            "fourth.0": "is reduced by prod",
            "out": OUTPUT,
        },
    ),
    "embedded": Specimen(zoo_wiring.Embedded, "4", {"table": 6, "hidden": 8}, {"out": OUTPUT}),
    "tied_transposed": Specimen(
        zoo_wiring.TiedTransposed, (4,), {"first": 9, "encoder": 6}, {"out": OUTPUT}
    ),
    "normed": Specimen(
        zoo_norms.Normed,
        IMAGES,
        {"conv1": 2, "conv2": 6, "hidden": 9},
        {"out": OUTPUT},
        statistics={"conv2": ("norm2",)},
    ),
    "group_norm": Specimen(
        functools.partial(zoo_norms.Around, functools.partial(nn.GroupNorm, 4, 8)),
        IMAGES,
        {"first": 4, "second": 6},
        {"head.2": OUTPUT},
    ),
    "one_group_norm": Specimen(
        functools.partial(zoo_norms.Around, functools.partial(nn.GroupNorm, 1, 8)),
        IMAGES,
        {"first": 8, "second": 6},
        {"head.2": OUTPUT},
        statistics={"first": ("norm",)},
    ),
    "instance_norm": Specimen(
        functools.partial(zoo_norms.Around, functools.partial(nn.InstanceNorm2d, 8, affine=True)),
        IMAGES,
        {"first": 8, "second": 6},
        {"head.2": OUTPUT},
    ),
    "plain_instance_norm": Specimen(
        functools.partial(zoo_norms.Around, functools.partial(nn.InstanceNorm2d, 8)),
        IMAGES,
        {"first": 8, "second": 6},
        {"head.2": OUTPUT},
    ),
    "channels_first_norm": Specimen(
        functools.partial(zoo_norms.Around, functools.partial(LayerNorm2d, 8)),
        IMAGES,
        {"first": 8, "second": 6},
        {"head.2": OUTPUT},
        statistics={"first": ("norm",)},
    ),
    "layer_norm": Specimen(
        functools.partial(zoo_norms.OverTokens, functools.partial(nn.LayerNorm, 8)),
        TOKENS,
        {"embed": 8, "up": 11},
        {"out": OUTPUT},
        statistics={"embed": ("norm",)},
    ),
    "plain_layer_norm": Specimen(
        functools.partial(
            zoo_norms.OverTokens, functools.partial(nn.LayerNorm, 8, elementwise_affine=False)
        ),
        TOKENS,
        {"embed": 8, "up": 11},
        {"out": OUTPUT},
        statistics={"embed": ("norm",)},
    ),
    "rms_norm": Specimen(
        functools.partial(zoo_norms.OverTokens, functools.partial(nn.RMSNorm, 8)),
        TOKENS,
        {"embed": 8, "up": 11},
        {"out": OUTPUT},
        statistics={"embed": ("norm",)},
    ),
    "functional_norm": Specimen(
        functools.partial(zoo_norms.OverTokens, functools.partial(zoo_norms.FunctionalNorm, 8)),
        TOKENS,
        {"embed": 8, "up": 11},
        {"out": OUTPUT},
        statistics={"embed": ("norm",)},
    ),
    "written_norm": Specimen(
        functools.partial(zoo_norms.OverTokens, functools.partial(zoo_norms.WrittenNorm, 8)),
        TOKENS,
        {"embed": 8, "up": 11},
        {"out": OUTPUT},
        statistics={"embed": ("norm",)},
    ),
    "written_rms_norm": Specimen(
        functools.partial(zoo_norms.OverTokens, functools.partial(zoo_norms.WrittenRMSNorm, 8)),
        TOKENS,
        {"embed": 8, "up": 11},
        {"out": OUTPUT},
        statistics={"embed": ("norm",)},
    ),
    "response_norm": Specimen(
        functools.partial(zoo_norms.OverTokens, functools.partial(zoo_norms.ResponseNorm, 8)),
        TOKENS,
        {"embed": 8, "up": 11},
        {"out": OUTPUT},
        statistics={"embed": ("norm",)},
    ),
    "standardised_weight": Specimen(
        functools.partial(
            zoo_norms.Around, functools.partial(zoo_norms.StandardisedWeight, 8, 8, 3)
        ),
        IMAGES,
        {"second": 6},
        {"first": "feeds a convolution whose weight is computed in the code", "head.2": OUTPUT},
    ),
    "spatial_gate": Specimen(
        zoo_norms.SpatialGate,
        IMAGES,
        {"conv1": 6, "conv2": 7},
        {"head.2": OUTPUT},
        statistics={"conv1": ("",), "conv2": ("",)},
    ),
    "attention": Specimen(
        zoo_attention.InModel,
        TOKENS,
        {"up": 11},
        {
            "embed": "the self-check failed: the pruned network raises",
            "qkv": "the self-check failed: the pruned network raises",
            "out": OUTPUT,
        },
    ),
    "derived_attention": Specimen(
        transformer(zoo_attention.Derived),
        TOKENS,
        {"embed": 8, "attention.qkv": 4, "up": 11},
        {"out": OUTPUT},
        recorded=("attention",),
    ),
    "fused_attention": Specimen(
        transformer(zoo_attention.Fused),
        TOKENS,
        {"embed": 8, "attention.qkv": 4, "up": 11},
        {"out": OUTPUT},
    ),
    "separate_attention": Specimen(
        transformer(zoo_attention.Separate),
        TOKENS,
        {"embed": 8, "attention.query": 2, "up": 11},
        {"out": OUTPUT},
    ),
    "grouped_queries": Specimen(
        transformer(zoo_attention.Grouped, by_torch=False),
        TOKENS,
        {"embed": 8, "attention.wq": 3, "up": 11},
        {"out": OUTPUT},
    ),
    "grouped_queries_by_torch": Specimen(
        transformer(zoo_attention.Grouped, by_torch=True),
        TOKENS,
        {"embed": 8, "attention.wq": 3, "up": 11},
        {"out": OUTPUT},
    ),
    "repeated_keys": Specimen(
        transformer(zoo_attention.Repeated),
        TOKENS,
        {"embed": 8, "attention.wq": 3, "up": 11},
        {"out": OUTPUT},
    ),
    "einsum_attention": Specimen(
        transformer(zoo_attention.Einsum),
        TOKENS,
        {"embed": 8, "attention": 3, "up": 11},
        {"out": OUTPUT},
    ),
    "masked_attention": Specimen(
        transformer(zoo_attention.Masked),
        TOKENS,
        {"embed": 8, "attention.qkv": 2, "up": 11},
        {"out": OUTPUT},
    ),
    "windowed_attention": Specimen(
        transformer(zoo_attention.Windowed),
        TOKENS,
        {"embed": 8, "attention.qkv": 2, "up": 11},
        {"out": OUTPUT},
        recorded=("attention",),
    ),
    "torch_attention": Specimen(
        transformer(zoo_attention.Torch, batch_first=True, need_weights=False),
        TOKENS,
        {"embed": 8, "attention.inner": 2, "up": 11},
        {"out": OUTPUT},
    ),
    "torch_attention_weights": Specimen(
        transformer(zoo_attention.Torch, batch_first=True, need_weights=True),
        TOKENS,
        {"embed": 8, "attention.inner": 2, "up": 11},
        {"out": OUTPUT},
        statistics={"attention.inner": ("attention.inner",)},
    ),
    "torch_attention_sequence": Specimen(
        transformer(zoo_attention.Torch, batch_first=False, need_weights=False, bias=False),
        TOKENS,
        {"embed": 8, "attention.inner": 2, "up": 11},
        {"out": OUTPUT},
    ),
    "torch_attention_extra_keys": Specimen(
        transformer(
            zoo_attention.Torch,
            batch_first=False,
            need_weights=True,
            add_bias_kv=True,
            add_zero_attn=True,
        ),
        TOKENS,
        {"embed": 8, "up": 11},
        {"attention.inner": "is concatenated with fixed channels", "out": OUTPUT},
    ),
    "cross_attention": Specimen(
        functools.partial(zoo_attention.Crossed, widths=None),
        [TOKENS, (3, 4)],
        {"query": 8, "attention": 2},
        {"out": OUTPUT},
        statistics={"attention": ("attention",)},
    ),
    "cross_attention_widths": Specimen(
        functools.partial(zoo_attention.Crossed, widths=(6, 10)),
        [TOKENS, (3, 4)],
        {"query": 8, "key": 6, "value": 10, "attention": 2},
        {"out": OUTPUT},
        statistics={"attention": ("attention",)},
    ),
    "encoder": Specimen(
        functools.partial(zoo_attention.Encoder, norm_first=False),
        TOKENS,
        {
            "embed": 8,
            "encoder.layers.0.self_attn": 2,
            "encoder.layers.0.linear1": 12,
            "encoder.layers.1.self_attn": 2,
            "encoder.layers.1.linear1": 12,
        },
        {"out": OUTPUT},
        statistics={
            "embed": (
                "encoder.layers.0.norm1",
                "encoder.layers.0.norm2",
                "encoder.layers.1.norm1",
                "encoder.layers.1.norm2",
            )
        },
    ),
    "encoder_norm_first": Specimen(
        functools.partial(zoo_attention.Encoder, norm_first=True),
        TOKENS,
        {
            "embed": 8,
            "encoder.layers.0.self_attn": 2,
            "encoder.layers.0.linear1": 12,
            "encoder.layers.1.self_attn": 2,
            "encoder.layers.1.linear1": 12,
        },
        {"out": OUTPUT},
        blocks=("encoder.layers.1",),
        statistics={
            "embed": (
                "encoder.layers.0.norm1",
                "encoder.layers.0.norm2",
                "encoder.layers.1.norm1",
                "encoder.layers.1.norm2",
            )
        },
    ),
    "decoder": Specimen(
        zoo_attention.Decoder,
        [TOKENS, (3, 4)],
        {"embed": 8, "decoder.self_attn": 2, "decoder.multihead_attn": 2, "decoder.linear1": 12},
        {"out": OUTPUT},
        statistics={"embed": ("decoder.norm1", "decoder.norm2", "decoder.norm3")},
    ),
    "llama": Specimen(
        zoo_attention.Llama,
        "6",
        {"tokens": 8, "attention.wq": 4, "mlp.w1": 12},
        {"out": OUTPUT},
        statistics={"tokens": ("norm1", "norm2", "norm3")},
    ),
    "vision": Specimen(
        zoo_attention.Vision,
        IMAGES,
        {
            "patches": 8,
            "blocks.0.attention.qkv": 4,
            "blocks.0.mlp.0": 10,
            "blocks.1.attention.qkv": 4,
            "blocks.1.mlp.0": 10,
        },
        {"head": OUTPUT},
        blocks=("blocks.0", "blocks.1"),
        statistics={
            "patches": (
                "blocks.0.norm1",
                "blocks.0.norm2",
                "blocks.1.norm1",
                "blocks.1.norm2",
                "norm",
            )
        },
    ),
    "cut_in_code": Specimen(
        functools.partial(zoo_layout.Cut, by_attribute=False),
        IMAGES,
        {"first.0#2": 4, "second.0": 7, "third.0": 6},
        {"first.0": "the self-check failed: the pruned network raises", "head.2": OUTPUT},
    ),
    "cut_by_attribute": Specimen(
        functools.partial(zoo_layout.Cut, by_attribute=True),
        IMAGES,
        {"first.0": 4, "first.0#2": 4, "second.0": 7, "third.0": 6},
        {"head.2": OUTPUT},
    ),
    "partial_convolution": Specimen(
        zoo_layout.PartialConvolution,
        IMAGES,
        {"stem.0": 3, "stem.0#2": 5, "partial.conv": 3, "mix.0": 7},
        {"head.2": OUTPUT},
    ),
    "halves": Specimen(
        zoo_layout.Halves,
        IMAGES,
        {"left.0": 5, "right.0": 6},
        {
            "conv.0": "the self-check failed: the pruned network raises",
            "conv.0#2": "the self-check failed: the pruned network raises",
            "head.2": OUTPUT,
        },
    ),
    "parts": Specimen(
        zoo_layout.Parts,
        IMAGES,
        {"first.0": 4, "second.0": 5, "third.0": 6, "out": 7},
        {"head.2": OUTPUT},
    ),
    "pixels": Specimen(
        zoo_layout.Pixels, IMAGES, {"stem.0": 3, "deep": 6, "wide": 5}, {"out": OUTPUT}
    ),
    "shuffled_by_operator": Specimen(
        zoo_layout.ShuffledByOperator, IMAGES, {"stem.0": 2, "out": 6}, {"head.2": OUTPUT}
    ),
    "shuffled_in_code": Specimen(
        zoo_layout.ShuffledInCode,
        IMAGES,
        {"mix": 7},
        {"conv.0": "self-check failed: outputs differ", "head.2": OUTPUT},
    ),
    "shuffle_unit": Specimen(
        zoo_layout.ShuffleUnit,
        IMAGES,
        {"stem.0": 2, "units.0.branch.0.0": 4, "units.1.branch.0.0": 4},
        {"head.2": OUTPUT},
    ),
    "unet": Specimen(
        zoo_layout.UNet,
        IMAGES,
        {"down1.0": 4, "down2.0": 6, "deep.0": 8, "up2": 5, "join2.0": 6, "up1": 4, "join1.0": 5},
        {"out": OUTPUT},
    ),
    "unpooled": Specimen(zoo_layout.Unpooled, IMAGES, {"down": 6}, {"out": OUTPUT}),
    "sampled": Specimen(
        zoo_layout.Sampled,
        IMAGES,
        {"stem.0": 6, "where": 5, "wide.0": 7},
        {"grid": "is concatenated with fixed channels", "head.2": OUTPUT},
    ),
    "cell": Specimen(zoo_layout.Cell, IMAGES, {"stem.0": 6, "wide.0": 9}, {"head.2": OUTPUT}),
    "mixer": Specimen(
        zoo_layout.Mixer,
        IMAGES,
        {"patches": 8, "features.0": 10},
        {"head": OUTPUT},
        statistics={"patches": ("norm1", "norm2")},
    ),
    "detector": Specimen(
        zoo_layout.Detector,
        IMAGES,
        {"stem.0": 6, "head.0": 7},
        {"classes": OUTPUT, "boxes": OUTPUT},
    ),
    "encoded": Specimen(zoo_layout.Encoded, "4", {"tokens": 6, "up": 8}, {"tokens#2": OUTPUT}),
    "volume": Specimen(
        zoo_layout.Volume, (3, 8), {"line": 4, "longer": 2, "larger": 5}, {"out": OUTPUT}
    ),
}

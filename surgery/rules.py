"""One rule per operator: what it does to channel labels.

To teach surgery an operator: write a function (tracer, node) -> labels of its output, and add
its line to `RULES`. An operator without a rule freezes the channels that reach it; an elementwise
operator needs none (torch tags them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paretoprune.surgery.labels import Labels, reshape
from paretoprune.surgery.program import Node, Ref, Shape

if TYPE_CHECKING:
    from paretoprune.surgery.tracer import Tracer

Result = Labels | tuple[Labels, ...] | None
Rule = Callable[["Tracer", Node], Result]


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _out(node: Node) -> Shape:
    return node.shape  # type: ignore[return-value]


# -- layers with weights ---------------------------------------------------------------------


def convolution(tracer: Tracer, node: Node, *, transposed: bool = False) -> Result:
    """conv1d/2d/3d and their transposes; whole groups of a grouped convolution are one unit."""
    source = tracer.labels(node.args[0])
    weight = tracer.parameter(node.args[1])
    position = 6
    groups = int(_argument(node, position, "groups", 1))
    shape = _out(node)
    channel_dim = len(shape) - (len(tracer.shape(node.args[1])) - 1)
    channels = source.line(channel_dim)
    if weight is None or channels is None:
        _freeze_layer(tracer, node, "a convolution")
        tracer.counted(node)
        return Labels.none(shape)
    weight_shape = tracer.shape(node.args[1])
    made = tracer.unions.fresh(shape[channel_dim])
    spatial = tracer.shape(node.args[0]) if transposed else shape
    positions = math.prod(spatial) // spatial[channel_dim] * math.prod(weight_shape[2:])
    if groups == 1:
        tracer.record(weight, 0 if transposed else 1, channels)
        tracer.record(weight, 1 if transposed else 0, made, makes=True)
        tracer.macs(node, positions, made, channels)
    else:
        inside = channels.reshape(groups, -1)
        outside = made.reshape(groups, -1)
        for ids in (inside, outside):
            tracer.unions.unify(ids, outside[:, :1], "shares a convolution group with fixed ones")
        read, written = (outside, channels) if transposed else (inside, made)
        tracer.record(weight, 0, written, makes=True)
        tracer.macs(node, positions * read.shape[1], written)
    bias = tracer.parameter(_argument(node, 2, "bias"))
    if bias is not None:
        tracer.record(bias, 0, made)
    return Labels.along(channel_dim, made, shape)


def _freeze_layer(tracer: Tracer, node: Node, layer: str) -> None:
    computed = tracer.parameter(node.args[1]) is None
    how = "whose weight is computed in the code" if computed else "along another dim"
    for ref in node.args[:2]:
        tracer.freeze(tracer.labels(ref), f"feeds {layer} {how}")


def transposed_convolution(tracer: Tracer, node: Node) -> Result:
    """conv_transpose1d/2d/3d: the weight's first axis reads, its second makes channels."""
    return convolution(tracer, node, transposed=True)


def linear(tracer: Tracer, node: Node) -> Result:
    """Linear over the last dim."""
    source = tracer.labels(node.args[0])
    weight = tracer.parameter(node.args[1])
    shape = _out(node)
    channels = source.line(-1)
    if weight is None or channels is None:
        _freeze_layer(tracer, node, "a linear layer")
        tracer.counted(node)
        return Labels.none(shape)
    made = tracer.unions.fresh(shape[-1])
    tracer.record(weight, 1, channels)
    tracer.record(weight, 0, made, makes=True)
    bias = tracer.parameter(_argument(node, 2, "bias"))
    if bias is not None:
        tracer.record(bias, 0, made)
    tracer.macs(node, math.prod(shape[:-1]), made, channels)
    return Labels.along(len(shape) - 1, made, shape)


def batch_norm(tracer: Tracer, node: Node) -> Result:
    """batch_norm and instance_norm with running statistics: one of each parameter per channel."""
    source = tracer.labels(node.args[0])
    channels = source.line(1)
    if channels is None:
        return tracer.freeze(source, "feeds a batch norm along another dim")
    for ref in node.args[1:5]:
        parameter = tracer.parameter(ref)
        if parameter is not None:
            tracer.record(parameter, 0, channels)
    return source


def prelu(tracer: Tracer, node: Node) -> Result:
    """prelu: one slope for all channels, or one per channel."""
    source = tracer.labels(node.args[0])
    if math.prod(tracer.shape(node.args[1])) == 1:
        return source
    slopes, channels = tracer.parameter(node.args[1]), source.line(1)
    if slopes is None or channels is None:
        tracer.freeze(tracer.labels(node.args[1]), "are slopes of channels that stay")
        return tracer.freeze(source, "feeds a PReLU along another dim")
    tracer.record(slopes, 0, channels)
    return source


# -- elementwise -----------------------------------------------------------------------------


def pointwise(tracer: Tracer, node: Node) -> Result:
    """Elementwise with broadcasting: labels of operands that meet are equal."""
    shape = _out(node)
    arguments = torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
    values = [tracer.value(ref) for ref in arguments if isinstance(ref, Ref)]
    operands = [_aligned(value, shape) for value in values if isinstance(value, Labels)]
    if not operands:
        return Labels.none(shape)
    widest = result = max(operands, key=lambda operand: len(operand.varying))
    reason = f"meets fixed channels in {node.target.rsplit('.', 1)[0]}"
    for operand in operands:
        if operand is widest:
            continue
        if not set(operand.varying) <= set(widest.varying):
            tracer.freeze(operand, "meets channels along another dim")
            tracer.freeze(widest, "meets channels along another dim")
            widest = result = Labels.none(shape)
        elif operand.varying or any(operand.shape[dim] > 1 for dim in widest.varying):
            tracer.unions.unify(widest.ids, operand.ids, reason)
            if operand.present and len(operand.varying) < len(result.varying):
                result = operand  # equal from here on: a table per position varies by channel only
    return Labels(result.ids, shape)


def _aligned(labels: Labels, shape: Shape) -> Labels:
    missing = len(shape) - len(labels.shape)
    ids = labels.ids.reshape([1] * missing + list(labels.ids.shape))
    return Labels(ids, (1,) * missing + labels.shape)


def same(tracer: Tracer, node: Node) -> Result:
    """Labels pass unchanged: dropout, contiguous, clone, dtype changes."""
    labels = tracer.labels(node.args[0])
    return Labels(labels.ids, _out(node))


def pooling(tracer: Tracer, node: Node) -> Result:
    """Pooling and interpolation: channels pass, the spatial dims change size."""
    source = tracer.labels(node.args[0])
    shape = _out(node)
    first_spatial = len(shape) - _spatial_dims(node.target)
    if any(dim >= first_spatial for dim in source.varying):
        tracer.freeze(source, f"differs along the dims of {node.target.rsplit('.', 1)[0]}")
        return Labels.none(shape)
    return Labels(source.ids, shape)


def _spatial_dims(target: str) -> int:
    return next((int(digit) for digit in "123" if f"{digit}d" in target), 2)


def reduction(tracer: Tracer, node: Node) -> Result:
    """mean, sum, amax over dims without channels."""
    source = tracer.labels(node.args[0])
    rank = len(source.shape)
    given = _argument(node, 1, "dim")
    if given is None or given == []:
        given = range(rank)
    dims = {dim % rank for dim in ([given] if isinstance(given, int) else given)}
    if dims & set(source.varying):
        tracer.freeze(source, f"is reduced by {node.target.rsplit('.', 1)[0]}")
        return Labels.none(_out(node))
    kept = [size for dim, size in enumerate(source.ids.shape) if dim not in dims]
    sizes = list(source.ids.shape) if len(_out(node)) == rank else kept
    return Labels(source.ids.reshape(sizes), _out(node))


# -- shapes ----------------------------------------------------------------------------------


def view(tracer: Tracer, node: Node) -> Result:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze."""
    source = tracer.labels(node.args[0])
    result = reshape(source, _out(node))
    if len(result.varying) > len(source.varying):  # a channel dim was split: keep it rectangular
        first = result.varying[0]
        ids = result.ids
        tracer.unions.unify(ids, ids.narrow(first, 0, 1), "is split with fixed channels")
        result = Labels(ids.narrow(first, 0, 1), result.shape)
    return result


def permute(tracer: Tracer, node: Node) -> Result:
    """permute and transpose: the same operator on the labels."""
    source = tracer.labels(node.args[0])
    order = list(range(len(source.shape)))
    if "permute" in node.target:
        order = [int(dim) for dim in node.args[1]]
    elif len(node.args) > 1:
        a, b = (int(dim) for dim in node.args[1:3])
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    return Labels(source.ids.permute(order), _out(node))


def concatenation(tracer: Tracer, node: Node) -> Result:
    """cat: labels follow one another along the dim, and are equal across the others."""
    shape = _out(node)
    dim = int(_argument(node, 1, "dim", 0)) % len(shape)
    parts = [tracer.labels(ref) for ref in node.args[0]]
    parts = [part for part in parts if len(part.shape) == len(shape)]  # legacy empty tensors
    if not any(part.present for part in parts):
        return Labels.none(shape)
    elsewhere = {other for part in parts for other in part.varying if other != dim}
    if not elsewhere:
        return Labels(torch.cat([part.with_full(dim) for part in parts], dim), shape)
    if any(dim in part.varying for part in parts):
        for part in parts:
            tracer.freeze(part, "is concatenated along another dim")
        return Labels.none(shape)
    first = parts[0]
    for part in parts[1:]:
        tracer.unions.unify(first.ids, part.ids, "is concatenated with fixed channels")
    return Labels(torch.broadcast_tensors(*[part.ids for part in parts])[0], shape)


def slicing(tracer: Tracer, node: Node) -> Result:
    """slice and select: a slice of the channel dim itself is fixed in the code."""
    source = tracer.labels(node.args[0])
    dim = int(_argument(node, 1, "dim", 0)) % len(source.shape)
    shape = _out(node)
    if "select" in node.target:
        if dim in source.varying:
            return _fixed(tracer, source, node)
        return Labels(source.ids.squeeze(dim), shape)
    if dim in source.varying and shape != source.shape:
        return _fixed(tracer, source, node)
    return Labels(source.ids, shape)


def _fixed(tracer: Tracer, source: Labels, node: Node) -> Labels:
    tracer.freeze(source, f"is cut by {node.target.rsplit('.', 1)[0]} at fixed positions")
    return Labels.none(_out(node))


def splitting(tracer: Tracer, node: Node) -> Result:
    """chunk, split, unbind: equal parts of a channel dim lose the same channels."""
    source = tracer.labels(node.args[0])
    shapes: tuple[Shape, ...] = node.shape  # type: ignore[assignment]
    position = 1 if "unbind" in node.target else 2
    dim = int(_argument(node, position, "dim", 0)) % len(source.shape)
    if dim not in source.varying:
        ids = source.ids.squeeze(dim) if "unbind" in node.target else source.ids
        return tuple(Labels(ids, shape) for shape in shapes)
    if "unbind" in node.target or len(set(shapes)) > 1:
        tracer.freeze(source, "is split into unequal parts")
        return tuple(Labels.none(shape) for shape in shapes)
    parts = source.ids.split(shapes[0][dim], dim)
    for part in parts[1:]:
        tracer.unions.unify(parts[0], part, "is split with fixed channels")
    return tuple(Labels(parts[0], shape) for shape in shapes)


def getitem(tracer: Tracer, node: Node) -> Result:
    """One of several values."""
    value = tracer.value(node.args[0])
    return value[node.args[1]] if isinstance(value, tuple) else value


def expand(tracer: Tracer, node: Node) -> Result:
    """expand: new dims repeat the same channels."""
    return Labels(_aligned(tracer.labels(node.args[0]), _out(node)).ids, _out(node))


def padding(tracer: Tracer, node: Node) -> Result:
    """pad: channels that a padding *module* adds may go again, those added in code stay."""
    source = tracer.labels(node.args[0])
    shape = _out(node)
    widths = [int(width) for width in node.args[1]]
    result = Labels(source.ids, shape)
    module = tracer.module_of(node)
    for index in range(0, len(widths), 2):
        dim = len(shape) - 1 - index // 2
        before, after = widths[index], widths[index + 1]
        if not (before or after) or (not source.present) or dim not in source.varying:
            continue
        owned = isinstance(module, nn.modules.padding._ConstantPadNd) and (
            tuple(module.padding) == tuple(widths)
        )
        ids = result.ids
        if before < 0 or after < 0 or len(source.varying) > 1:
            return _fixed(tracer, source, node)
        sizes = [1] * len(shape)
        sizes[dim] = before + after
        made = tracer.unions.fresh(before + after) if owned else torch.zeros(before + after).long()
        first, last = made.reshape(sizes).split((before, after), dim)
        result = Labels(torch.cat([first, ids, last], dim), shape)
        if owned:
            if node.module in tracer.pads:
                tracer.freeze(result, "is padded by a module that is called twice")
            tracer.pads[node.module] = (dim, result)
    return result


def tuples(tracer: Tracer, node: Node) -> Result:
    """Shape queries and the like: no channels flow."""
    return Labels.none(_out(node)) if node.shape is not None else None


_RULES: dict[str, Rule] = {"pointwise": pointwise, "getitem": getitem}
for _names, _rule in (
    ("conv1d conv2d conv3d", convolution),
    ("conv_transpose1d conv_transpose2d conv_transpose3d", transposed_convolution),
    ("linear", linear),
    ("hardswish hardsigmoid silu gelu mish elu leaky_relu celu selu softplus", pointwise),
    ("batch_norm", batch_norm),
    ("prelu", prelu),
    (
        "dropout feature_dropout alpha_dropout contiguous clone detach alias to _to_copy "
        "lift_fresh_copy zeros_like ones_like full_like",
        same,
    ),
    (
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d "
        "upsample_bilinear2d upsample_bicubic2d",
        pooling,
    ),
    ("mean sum amax amin", reduction),
    ("view reshape _unsafe_view flatten unflatten squeeze unsqueeze", view),
    ("permute transpose t numpy_T", permute),
    ("cat concat", concatenation),
    ("slice select narrow", slicing),
    ("chunk split split_with_sizes unbind", splitting),
    ("expand expand_as", expand),
    ("pad constant_pad_nd", padding),
):
    _RULES |= dict.fromkeys((f"aten.{name}" for name in _names.split()), _rule)

RULES: Mapping[str, Rule] = MappingProxyType(_RULES)
"""Rules by operator, without overload and without the underscore of in-place forms."""

"""Rules of operators that only move elements: the same move on the labels.

Where the code writes a size or a boundary as a number, the number must follow the channels that
stay: the tracer is told what the number counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from paretoprune.surgery.labels import Labels, reshape
from paretoprune.surgery.program import BatchSize, Node
from paretoprune.surgery.rules.base import Result, argument, dims_of, out, outs, word
from paretoprune.surgery.rules.pointwise import aligned

if TYPE_CHECKING:
    from paretoprune.surgery.tracer import Tracer


def view(tracer: Tracer, node: Node) -> Result:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze.

    A channel dim that is split stays rectangular: which of its parts are the units is decided by
    what reads them.
    """
    source = tracer.labels(node.args[0])
    result = reshape(source, out(node))
    if len(result.varying) > len(source.varying):
        tracer.splits.append(result.ids)
    first = 0
    sizes = argument(node, 1, "size")
    if node.operator == "unflatten":
        first, sizes = int(node.args[1]) % len(source.shape), node.args[2]
    if isinstance(sizes, (tuple, list)) and node.operator not in ("squeeze", "unsqueeze"):
        for dim, size in enumerate(sizes, first):
            if size > 0:
                tracer.number(node, size, result, dim)
    return result


def permute(tracer: Tracer, node: Node) -> Result:
    """permute, transpose, movedim and moveaxis: the same operator on the labels."""
    source = tracer.labels(node.args[0])
    rank = len(source.shape)
    order = list(range(rank))
    if node.operator == "permute":
        order = [int(dim) for dim in argument(node, 1, "dims")]
    elif node.operator in ("movedim", "moveaxis"):
        sizes = torch.empty(tuple(range(1, rank + 1)), device="meta")
        order = [size - 1 for size in sizes.movedim(node.args[1], node.args[2]).shape]
    elif len(node.args) > 1:
        a, b = (int(dim) for dim in node.args[1:3])
        order[a], order[b] = order[b], order[a]
    elif node.operator == "mT":
        order[-2:] = [rank - 1, rank - 2]
    else:
        order.reverse()
    return Labels(source.ids.permute(order), out(node))


def concatenation(tracer: Tracer, node: Node) -> Result:
    """cat: labels follow one another along the dim, and are equal across the others."""
    shape = out(node)
    dim = int(argument(node, 1, "dim", 0)) % len(shape)
    refs = [ref for ref in node.args[0] if len(tracer.shape(ref)) == len(shape)]  # legacy empties
    flowing = [tracer.labels(ref) for ref in refs if not tracer.is_weight(ref)]
    channels = {d for part in flowing for d in part.varying}
    parts = []
    for ref in refs:
        part = tracer.labels(ref)
        if flowing and tracer.is_weight(ref):  # a class token: rows stay, columns may go
            part = tracer.narrowed(part, [d for d in part.varying if d not in channels])
        parts.append(part)
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


def stack(tracer: Tracer, node: Node) -> Result:
    """stack: the parts lie along a new dim, which stays whole, so their channels are equal."""
    shape = out(node)
    dim = int(argument(node, 1, "dim", 0)) % len(shape)
    parts = [tracer.labels(ref) for ref in node.args[0]]
    for part in parts[1:]:
        tracer.unions.unify(parts[0].ids, part.ids, "is stacked with fixed channels")
    ids = torch.broadcast_tensors(*[part.ids for part in parts])[0]
    return Labels(ids.unsqueeze(dim), shape)


def slicing(tracer: Tracer, node: Node) -> Result:
    """slice and narrow: the numbers that cut a channel dim must follow."""
    source = tracer.labels(node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % len(source.shape)
    shape = out(node)
    if dim not in source.varying or shape == source.shape:
        return Labels(source.ids, shape)
    if len(source.varying) > 1 or tracer.is_weight(node.args[0]):
        return Labels(tracer.constant(node.args[0], [dim], _cut(node)).ids, shape)
    size = source.shape[dim]
    written = int(argument(node, 2, "start") or 0)
    start = written + size if written < 0 else written
    if int(argument(node, 4, "step", 1)) != 1:
        tracer.freeze(source, _cut(node))
        return Labels.none(shape)
    stop = start + shape[dim]
    tracer.cut(node, source, dim, [start, stop])
    ends = [(written, start)]
    if node.operator == "slice":
        ends.append((int(argument(node, 3, "end") or 0), stop))
    for number, at in ends:  # a negative one counts from the end
        first, length = (at, size - at) if number < 0 else (0, at)
        part = source.ids.narrow(dim, first, length)
        if part.shape[dim] == abs(number):
            tracer.number(node, abs(number), Labels(part, tuple(part.shape)), dim)
    return Labels(source.ids.narrow(dim, start, stop - start), shape)


def selection(tracer: Tracer, node: Node) -> Result:
    """select: one position of a dim that stays whole."""
    source = tracer.labels(node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % len(source.shape)
    if dim in source.varying:
        source = tracer.constant(node.args[0], [dim], _cut(node))
    return Labels(source.ids.squeeze(dim), out(node))


def _cut(node: Node) -> str:
    return f"is cut by {word(node)} at fixed positions"


def splitting(tracer: Tracer, node: Node) -> Result:
    """chunk, split, tensor_split: equal parts of a channel dim lose the same channels."""
    source = tracer.labels(node.args[0])
    shapes = outs(node)
    dim = int(argument(node, 2, "dim", 0)) % len(source.shape)
    if dim not in source.varying:
        return tuple(Labels(source.ids, shape) for shape in shapes)
    if len(source.varying) > 1:
        source = tracer.constant(node.args[0], [dim], _cut(node))
        return tuple(Labels(source.ids, shape) for shape in shapes)
    parts = source.ids.split([shape[dim] for shape in shapes], dim)
    if len(set(shapes)) == 1:
        for part in parts[1:]:
            tracer.unions.unify(parts[0], part, "is split with fixed channels")
        parts = (parts[0],) * len(parts)
        tracer.number(node, source.shape[dim], source, dim)  # the code may say half of the whole
    elif node.operator == "chunk":  # the code gives a count, which makes other boundaries
        source = tracer.freeze(source, "is split into unequal parts")
        return tuple(Labels(source.ids, shape) for shape in shapes)
    stops = torch.tensor([0, *[shape[dim] for shape in shapes]]).cumsum(0).tolist()
    tracer.cut(node, source, dim, stops)
    return tuple(Labels(part, shape) for part, shape in zip(parts, shapes, strict=True))


def unbind(tracer: Tracer, node: Node) -> Result:
    """unbind: every position of a dim that stays whole."""
    source = tracer.labels(node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % len(source.shape)
    if dim in source.varying:
        source = tracer.constant(node.args[0], [dim], _cut(node))
    return tuple(Labels(source.ids.squeeze(dim), shape) for shape in outs(node))


def getitem(tracer: Tracer, node: Node) -> Result:
    """One of several values."""
    value = tracer.value(node.args[0])
    return value[node.args[1]] if isinstance(value, tuple) else value


def expand(tracer: Tracer, node: Node) -> Result:
    """expand: new dims repeat the same channels; what has none takes those of what it meets."""
    shape = out(node)
    source = aligned(tracer.labels(node.args[0]), shape)
    result = Labels(source.ids, shape)
    if not source.present and not tracer.is_weight(node.args[0]):
        result = _repeated(tracer, node, source)
    if node.operator == "expand":
        for dim, size in enumerate(node.args[1]):
            if size > 0:
                tracer.number(node, size, result, dim)
    return result


def _repeated(tracer: Tracer, node: Node, source: Labels) -> Labels:
    """Returns the labels of a value without channels that is repeated along some dims."""
    shape = out(node)
    dims = [dim for dim, size in enumerate(shape) if source.shape[dim] == 1 < size]
    if node.operator == "expand_as":
        other = tracer.labels(node.args[1])
        if not tracer.is_weight(node.args[1]) and set(other.varying) <= set(dims):
            return Labels(other.ids, shape)
    else:
        dims = [dim for dim in dims if not _is_batch(tracer, node.args[1][dim])]
        if len(dims) == 1:
            return Labels.along(dims[0], tracer.repeated(shape[dims[0]]), shape)
    return Labels(source.ids, shape)


def _is_batch(tracer: Tracer, size: int) -> bool:
    """Returns whether a size in the code is the number of examples, and no multiple of it."""
    return isinstance(size, BatchSize) and size == tracer.program.batch


def repeat(tracer: Tracer, node: Node) -> Result:
    """repeat and tile: the same channels several times."""
    shape = out(node)
    source = aligned(tracer.labels(node.args[0]), shape)
    times = [
        after // before if ids > 1 else 1
        for after, before, ids in zip(shape, source.shape, source.ids.shape, strict=True)
    ]
    return Labels(source.ids.repeat(times), shape)


def repeat_interleave(tracer: Tracer, node: Node) -> Result:
    """repeat_interleave by a number: every channel several times."""
    source = tracer.labels(node.args[0])
    dim = argument(node, 2, "dim")
    times = argument(node, 1, "repeats")
    if dim is None or not isinstance(times, int):
        return tracer.freeze(source, "is repeated unevenly")
    dim = int(dim) % len(source.shape)
    ids = source.ids.repeat_interleave(times, dim) if dim in source.varying else source.ids
    return Labels(ids, out(node))


def moving(tracer: Tracer, node: Node) -> Result:
    """roll, flip and rot90: any order along dims without channels."""
    source = tracer.labels(node.args[0])
    position = 1 if node.operator == "flip" else 2
    dims = dims_of(argument(node, position, "dims"), len(source.shape)) & set(source.varying)
    if dims:
        source = tracer.constant(node.args[0], sorted(dims), f"is moved by {word(node)}")
    return Labels(source.ids, out(node))


def triangle(tracer: Tracer, node: Node) -> Result:
    """triu and tril: zeros by place in the last two dims, which stay whole."""
    source = tracer.labels(node.args[0])
    dims = sorted(set(source.varying) & dims_of([-2, -1], len(source.shape)))
    if dims:
        source = tracer.constant(node.args[0], dims, f"is cut by {word(node)}")
    return Labels(source.ids, out(node))


def unfolding(tracer: Tracer, node: Node) -> Result:
    """unfold: windows along a dim become a new last dim."""
    source = tracer.labels(node.args[0])
    dim = int(node.args[1]) % len(source.shape)
    if dim in source.varying:
        source = tracer.constant(node.args[0], [dim], f"is cut by {word(node)}")
    return Labels(source.ids.unsqueeze(-1), out(node))


def indexing(tracer: Tracer, node: Node) -> Result:
    """index, index_select: entries are picked by number along dims that stay whole."""
    source = tracer.labels(node.args[0])
    if node.operator == "index_select":
        dim = int(node.args[1]) % len(source.shape)
        if dim in source.varying:
            source = tracer.constant(node.args[0], [dim], "is indexed")
        return Labels(source.ids, out(node))
    indices = list(node.args[1])
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    whole = [dim for dim in source.varying if dim in dims]
    if whole:
        source = tracer.constant(node.args[0], whole, "is indexed")
    if dims != list(range(dims[0], dims[0] + len(dims))):
        tracer.freeze(source, "is indexed along separate dims")
        return Labels.none(out(node))
    width = len(out(node)) - (len(source.shape) - len(dims))
    sizes = list(source.ids.shape)
    sizes[dims[0] : dims[0] + len(dims)] = [1] * width
    return Labels(source.ids.reshape(sizes), out(node))


def gathering(tracer: Tracer, node: Node) -> Result:
    """gather, take_along_dim: entries are picked along a dim that stays whole.

    Every channel has its own places, or all have the same, which broadcast.
    """
    if node.operator == "gather":
        along, places = node.args[1:3]
    else:
        places, along = node.args[1], argument(node, 2, "dim")
    source, index = tracer.labels(node.args[0]), tracer.labels(places)
    dim = 0 if along is None else int(along) % len(source.shape)
    if dim in source.varying:
        source = tracer.constant(node.args[0], [dim], "is indexed")
    if dim in index.varying:
        index = tracer.constant(places, [dim], "are places where another value is read")
    varying = {*source.varying, *index.varying}
    if all(index.shape[d] == 1 for d in varying) and node.operator == "take_along_dim":
        return Labels(source.ids, out(node))
    if along is None or any(source.shape[d] != index.shape[d] for d in varying):
        tracer.freeze(source, "is indexed in parts")
        tracer.freeze(index, "are places where another value is read")
        return Labels.none(out(node))
    tracer.unions.unify(source.ids, index.ids, "is indexed by fixed places")
    return Labels(source.ids if source.varying else index.ids, out(node))


def padding(tracer: Tracer, node: Node) -> Result:
    """pad: channels that a padding *module* adds may go again, those added in code stay."""
    source = tracer.labels(node.args[0])
    shape = out(node)
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
            tracer.freeze(source, _cut(node))
            return Labels.none(shape)
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


def joining(tracer: Tracer, node: Node) -> Result:
    """pixel_shuffle and col2im (F.fold): the channels of a square or window become one."""
    source = tracer.labels(node.args[0])
    dim = len(source.shape) - (2 if node.operator == "col2im" else 3)
    channels = source.line(dim)
    if channels is None:
        tracer.freeze(source, _cut(node))
        return Labels.none(out(node))
    square = channels.reshape(out(node)[dim], -1)
    tracer.unions.unify(square, square[:, :1], "becomes one channel with fixed ones")
    return Labels.along(dim, square[:, 0], out(node))


def spreading(tracer: Tracer, node: Node) -> Result:
    """pixel_unshuffle and im2col (F.unfold): every channel becomes several."""
    source = tracer.labels(node.args[0])
    dim = len(source.shape) - 3
    channels = source.line(dim)
    if channels is None:
        tracer.freeze(source, _cut(node))
        return Labels.none(out(node))
    times = out(node)[dim] // len(channels)
    return Labels.along(dim, channels.repeat_interleave(times), out(node))


def channel_shuffle(tracer: Tracer, node: Node) -> Result:
    """channel_shuffle: a view, transpose and view in one."""
    source = tracer.labels(node.args[0])
    channels = source.line(1)
    if channels is None:
        return tracer.freeze(source, "is shuffled along another dim")
    table = channels.reshape(int(node.args[1]), -1)
    tracer.splits.append(table)
    return Labels.along(1, table.t().reshape(-1), out(node))


def pooling(tracer: Tracer, node: Node) -> Result:
    """Pooling and interpolation: channels pass, the spatial dims change size."""
    source = tracer.labels(node.args[0])
    shapes = outs(node) if node.shape and isinstance(node.shape[0], tuple) else (out(node),)
    rank = len(source.shape)
    spatial = next((int(digit) for digit in "123" if f"{digit}d" in node.target), 2)
    mixed = [dim for dim in source.varying if dim >= rank - spatial]
    if mixed:
        source = tracer.constant(node.args[0], mixed, f"differs along the dims of {word(node)}")
    results = tuple(Labels(source.ids, shape) for shape in shapes)
    return results if len(shapes) > 1 else results[0]


def sampling(tracer: Tracer, node: Node) -> Result:
    """grid_sampler: channels pass from wherever the grid, which all of them share, says."""
    tracer.freeze(tracer.labels(node.args[1]), "are places where another value is sampled")
    return pooling(tracer, node)


def unpooling(tracer: Tracer, node: Node) -> Result:
    """max_unpool: every channel goes where its own positions say."""
    source, positions = tracer.labels(node.args[0]), tracer.labels(node.args[1])
    tracer.unions.unify(source.ids, positions.ids, "is unpooled to fixed positions")
    return pooling(tracer, node)


def glu(tracer: Tracer, node: Node) -> Result:
    """glu: one half gates the other."""
    source = tracer.labels(node.args[0])
    dim = int(argument(node, 1, "dim", -1)) % len(source.shape)
    if dim not in source.varying:
        return Labels(source.ids, out(node))
    first, second = source.with_full(dim).chunk(2, dim)
    tracer.unions.unify(first, second, "is gated by fixed channels")
    return Labels(first, out(node))


def unlabelled(tracer: Tracer, node: Node) -> Result:
    """Shape queries, comparisons of sizes and the like: no channels flow."""
    return Labels.none(out(node)) if node.shape is not None else None

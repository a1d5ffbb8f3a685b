"""Rules of products that sum over a dim: linear, matmul, einsum, attention.

One rule serves them all. Every dim gets a letter as in einsum, and then

- channels that are summed away are equal in all operands that have them;
- where an operand has channels both in a summed letter and in one that stays (the head dim and
  the heads of attention), whole entries of the letter that stays are the units;
- letters that several operands share (heads again) have equal channels;
- a weight has its channels recorded axis by axis, and makes new ones along a letter of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paretoprune.surgery.labels import Labels
from paretoprune.surgery.program import Node, Ref, Shape
from paretoprune.surgery.rules.base import Result, argument
from paretoprune.surgery.rules.pointwise import meet
from paretoprune.surgery.weight_axes import weight_axes

if TYPE_CHECKING:
    from paretoprune.surgery.notes import Piece
    from paretoprune.surgery.tracer import Tracer

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


Item = Ref | Labels


@dataclass
class _Operand:
    """One factor: its letters, and its labels over them."""

    letters: str
    labels: Labels

    @property
    def varying(self) -> str:
        """The letters along which labels vary."""
        return "".join(self.letters[dim] for dim in self.labels.varying)

    def over(self, letters: str) -> Tensor:
        """Returns the labels in the order of `letters`, with size 1 for those it lacks."""
        missing = [letter for letter in letters if letter not in self.letters]
        ids = self.labels.ids.reshape(list(self.labels.ids.shape) + [1] * len(missing))
        order = self.letters + "".join(missing)
        return ids.permute([order.index(letter) for letter in letters])


def contract(
    tracer: Tracer, node: Node, items: Sequence[Item], letters: Sequence[str], result: str
) -> Labels:
    """Returns the labels of an einsum.

    Args:
        tracer: Where channels and MACs are noted.
        node: The node whose MACs these are.
        items: The operands.
        letters: For each operand one letter per dim.
        result: The letters of the result.
    """
    sizes: dict[str, int] = {}
    weights: list[tuple[_Operand, str, Sequence[int], Piece | None]] = []
    flowing: list[_Operand] = []
    for item, names in zip(items, letters, strict=True):
        axes = weight_axes(tracer, item)
        if axes is not None:  # its labels lie along its axes, not one on every element
            labels = Labels.none(tracer.shape(item))
            weights.append((_Operand(names, labels), *axes))
        else:
            labels = tracer.read(item)
        for letter, size in zip(names, labels.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
        if axes is not None:
            continue
        if tracer.is_weight(item) or len(set(names)) < len(names):
            tracer.freeze(labels, f"feeds {node.operator} after other operators")
            flowing.append(_Operand(names, Labels.none(labels.shape)))
        else:
            flowing.append(_Operand(names, labels))
    for operand in flowing:
        _keep_whole(tracer, operand, result)
    summed = _summed(tracer, node, flowing, result)
    ids = _shared(tracer, node, flowing, result)
    shared = {letter for operand in flowing for letter in operand.letters}
    for operand, name, order, piece in weights:
        ids = _weight(tracer, operand, name, order, piece, summed, ids, shared, result)
    labels = Labels(ids, tuple(sizes[letter] for letter in result))
    varying = {result[dim] for dim in labels.varying}
    # What one operand alone is summed over is added up before anything is multiplied.
    contracted = set.intersection(*map(set, letters)) - set(result)
    if len(items) > 1 and contracted:
        fixed = math.prod(sizes[x] for x in {*result, *contracted} - varying - summed.keys())
        lines = [line for letter, line in summed.items() if letter in contracted]
        tracer.macs(node, fixed, *lines, *([ids.reshape(-1)] if varying else []))
    return labels


def _keep_whole(tracer: Tracer, operand: _Operand, result: str) -> None:
    """Makes labels constant along summed letters where they also vary along others."""
    summed = [dim for dim in operand.labels.varying if operand.letters[dim] not in result]
    if summed and len(operand.labels.varying) > len(summed):
        operand.labels = tracer.narrowed(operand.labels, summed)
    elif len(summed) > 1:
        operand.labels = tracer.narrowed(operand.labels, summed[1:])


def _summed(
    tracer: Tracer, node: Node, flowing: Sequence[_Operand], result: str
) -> dict[str, Tensor]:
    """Returns the labels along every summed letter in which a flowing operand has channels."""
    lines: dict[str, Tensor] = {}
    for operand in flowing:
        for dim in operand.labels.varying:
            letter = operand.letters[dim]
            if letter in result or letter in lines:
                continue
            line = lines[letter] = operand.labels.ids.reshape(-1)
            for other in flowing:
                if other is not operand and letter in other.letters:
                    theirs = other.over(letter + other.letters.replace(letter, ""))
                    tracer.unions.unify(
                        line.reshape(-1, *[1] * (theirs.ndim - 1)),
                        theirs,
                        f"is multiplied with fixed channels in {node.operator}",
                    )
    return lines


def _shared(tracer: Tracer, node: Node, flowing: Sequence[_Operand], result: str) -> Tensor:
    """Returns the labels of the product of the flowing operands over the result's letters."""
    kept = [_without_summed(operand, result) for operand in flowing]
    having = [operand for operand in kept if operand.varying]
    common = set(having[0].varying) if having else set()
    for operand in having:
        for other in kept:
            if other is operand:
                continue
            sizes = dict(zip(other.letters, other.labels.shape, strict=True))
            if any(sizes.get(letter, 1) > 1 for letter in operand.varying):
                tracer.unions.unify(
                    operand.over(result),
                    other.over(result),
                    f"is multiplied with fixed channels in {node.operator}",
                )
        common &= set(operand.varying)
    if having and not common:  # channels of one operand times channels of another
        for operand in having:
            tracer.freeze(operand.labels, "meets channels along another dim")
    if not common:
        return torch.zeros([1] * len(result), dtype=torch.int64)
    ids = having[0].over(result)
    for dim, letter in enumerate(result):
        if letter not in common and len(having) > 1:  # proven equal along it
            ids = ids.narrow(dim, 0, 1)
    return ids


def _without_summed(operand: _Operand, result: str) -> _Operand:
    """Returns an operand over the letters that stay; without labels if it had them elsewhere."""
    summed = [dim for dim, letter in enumerate(operand.letters) if letter not in result]
    shape = tuple(s for dim, s in enumerate(operand.labels.shape) if dim not in summed)
    letters = "".join(letter for letter in operand.letters if letter in result)
    if any(dim in summed for dim in operand.labels.varying):
        return _Operand(letters, Labels.none(shape))
    sizes = [s for dim, s in enumerate(operand.labels.ids.shape) if dim not in summed]
    return _Operand(letters, Labels(operand.labels.ids.reshape(sizes), shape))


def _weight(
    tracer: Tracer,
    operand: _Operand,
    parameter: str,
    axes: Sequence[int],
    piece: Piece | None,
    summed: Mapping[str, Tensor],
    ids: Tensor,
    shared: Collection[str],
    result: str,
) -> Tensor:
    """Records the channels of a weight; returns the labels of the result, new ones included.

    Args:
        tracer: Where they are recorded.
        operand: The weight's letters.
        parameter: Its name.
        axes: For each of its letters, the axis of the parameter.
        piece: The part of the parameter that it is, if not all of it.
        summed: Labels along summed letters.
        ids: Labels of the other operands over the result's letters.
        shared: Letters of the operands that are no weights.
        result: Letters of the result.
    """
    inside = [dim for dim, x in enumerate(result) if ids.shape[dim] > 1 and x in operand.letters]
    if inside and sum(size > 1 for size in ids.shape) > 1:  # one letter names the weight's units
        ids = tracer.narrowed(
            Labels(ids, tuple(ids.shape)),
            [dim for dim, size in enumerate(ids.shape) if size > 1 and dim != inside[0]],
        ).ids
    for letter, axis, size in zip(operand.letters, axes, operand.labels.shape, strict=True):
        if axis < 0:
            continue
        if letter in summed:
            tracer.record(parameter, axis, summed[letter], piece=piece)
        elif size > 1 and letter in result:
            dim = result.index(letter)
            if ids.shape[dim] > 1:
                tracer.record(parameter, axis, ids.reshape(-1), piece=piece)
            elif letter not in shared and ids.numel() == 1:
                made = tracer.unions.fresh(size)
                tracer.record(parameter, axis, made, makes=True, piece=piece)
                ids = made.reshape([-1 if d == dim else 1 for d in range(len(result))])
    return ids


def linear(tracer: Tracer, node: Node) -> Result:
    """Linear over the last dim."""
    rank = len(tracer.shape(node.args[0]))
    batch = _LETTERS[: rank - 1]
    items = [tracer.tokens(node.args[0]), node.args[1]]
    labels = contract(tracer, node, items, [f"{batch}i", "oi"], f"{batch}o")
    return _biased(tracer, labels, argument(node, 2, "bias"))


def _biased(tracer: Tracer, labels: Labels, bias: Any) -> Labels:
    name, line = tracer.parameter(bias), labels.line(-1)
    if name is not None and line is not None and len(tracer.shape(bias)) == 1:
        tracer.record(name, 0, line)
    elif isinstance(bias, Ref):
        return meet(tracer, [bias, labels], labels.shape, "meets a fixed bias")
    return labels


def matmul(tracer: Tracer, node: Node) -> Result:
    """matmul, mm, bmm and mv, with broadcasting."""
    return _product(tracer, node, node.args[0], node.args[1])


def _product(tracer: Tracer, node: Node, left: Item, right: Item) -> Labels:
    ranks = len(tracer.shape(left)), len(tracer.shape(right))
    batch = _LETTERS[: max(*ranks, 2) - 2]
    rows, columns = "m" if ranks[0] > 1 else "", "n" if ranks[1] > 1 else ""
    letters = [
        f"{batch[len(batch) - max(ranks[0] - 2, 0) :]}{rows}i",
        f"{batch[len(batch) - max(ranks[1] - 2, 0) :]}i{columns}",
    ]
    return contract(tracer, node, [left, right], letters, f"{batch}{rows}{columns}")


def added_matmul(tracer: Tracer, node: Node) -> Result:
    """addmm and baddbmm: a product and what is added to it."""
    return _biased(tracer, _product(tracer, node, *node.args[1:3]), node.args[0])


def einsum(tracer: Tracer, node: Node) -> Result:
    """einsum of any number of operands; those with a letter twice are frozen."""
    equation, refs = str(node.args[0]).replace(" ", ""), list(node.args[1])
    inputs, arrow, result = equation.partition("->")
    letters = inputs.split(",")
    ranks = [len(tracer.shape(ref)) for ref in refs]
    spare = [x for x in _LETTERS if x not in equation]
    width = max(
        (
            rank - len(names) + 3
            for rank, names in zip(ranks, letters, strict=True)
            if "." in names
        ),
        default=0,
    )
    rest = "".join(spare[:width])
    letters = [
        names.replace("...", rest[len(rest) - (rank - len(names) + 3) :])
        if "." in names
        else names
        for rank, names in zip(ranks, letters, strict=True)
    ]
    if arrow:
        result = result.replace("...", rest)
    else:  # all letters that appear once, in alphabetical order
        once = [x for x in sorted(set("".join(letters))) if "".join(letters).count(x) == 1]
        result = rest + "".join(x for x in once if x not in rest)
    return _in_pairs(tracer, node, refs, letters, result)


def _in_pairs(
    tracer: Tracer, node: Node, refs: Sequence[Item], letters: Sequence[str], result: str
) -> Labels:
    """Returns the labels of an einsum that torch computes two operands at a time."""
    items, names = list(refs), list(letters)
    path = list(node.kwargs.get("path") or [0, 1] * len(items))
    while len(items) > 2:
        first, second = sorted(path[:2])
        pair = [(items.pop(at), names.pop(at)) for at in (second, first)][::-1]
        path = path[2:]
        kept = "".join(
            x
            for x in dict.fromkeys(pair[0][1] + pair[1][1])
            if x in result or any(x in other for other in names)
        )
        items.append(contract(tracer, node, [i for i, _ in pair], [n for _, n in pair], kept))
        names.append(kept)
    return contract(tracer, node, items, names, result)


def attention(tracer: Tracer, node: Node) -> Result:
    """scaled_dot_product_attention: heads are units, their inner channels are not."""
    query, key, value = node.args[:3]
    mask = argument(node, 3, "attn_mask")
    scale = argument(node, 6, "scale")
    rank = len(tracer.shape(query))
    heads = _LETTERS[: rank - 2]
    if argument(node, 7, "enable_gqa"):
        key, value = (_repeated(tracer, ref, tracer.shape(query)) for ref in (key, value))
    labels = tracer.labels(query)
    if scale is None and labels.varying == (rank - 1,):
        for ref in (query, key):
            tracer.freeze(tracer.labels(ref), "are counted by the scale of attention")
    letters = [f"{heads}li", f"{heads}si"]
    scores = contract(tracer, node, [query, key], letters, f"{heads}ls")
    if isinstance(mask, Ref):
        scores = meet(tracer, [mask, scores], scores.shape, "meets a fixed attention mask")
    if set(scores.varying) & {rank - 1, rank - 2}:
        scores = tracer.freeze(scores, "is mixed by softmax")
    return contract(tracer, node, [scores, value], [f"{heads}ls", f"{heads}sv"], f"{heads}lv")


def _repeated(tracer: Tracer, ref: Ref, query: Shape) -> Labels:
    """Returns the labels of keys or values that several query heads share."""
    labels = tracer.labels(ref)
    times = query[-3] // labels.shape[-3]
    ids = labels.ids
    if ids.shape[-3] > 1:
        ids = ids.repeat_interleave(times, -3)
    return Labels(ids, (*labels.shape[:-3], query[-3], *labels.shape[-2:]))

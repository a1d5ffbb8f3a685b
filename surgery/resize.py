"""Nodes of a program with the sizes that they have after surgery."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.program import FILLS, Node

VIEWS = {"view", "reshape", "_unsafe_view", "expand", "unflatten"}
"""Operators whose code writes the sizes of the result."""


def resized(graph: PruningGraph, node: Node, mask: Tensor) -> Node:
    """Returns the node with every size in its arguments that counts channels set to those kept.

    Args:
        graph: From `trace`.
        node: A call of its program.
        mask: From `graph.kept_mask`.
    """
    position, value = _resized(graph, node, mask)
    if value is None or value == node.args[position : position + len(value)]:
        return node
    args = (*node.args[:position], *value, *node.args[position + len(value) :])
    return dataclasses.replace(node, args=args)


def viewed(
    graph: PruningGraph, node: Node, mask: Tensor
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the sizes that a view's code writes, and what they become; None for other nodes.

    Args:
        graph: From `trace`.
        node: A call of its program.
        mask: From `graph.kept_mask`.
    """
    if not _writes_sizes(graph, node):
        return None
    sizes = node.args[_sizes_at(node)]
    return tuple(map(int, sizes)), tuple(map(int, _sizes(graph, node, sizes, mask)))


def _writes_sizes(graph: PruningGraph, node: Node) -> bool:
    """Whether a node is a view that writes sizes, and not a type."""
    if node.operator not in VIEWS or node.name not in graph.layouts:
        return False
    return isinstance(node.args[_sizes_at(node)], (tuple, list))


def _sizes_at(node: Node) -> int:
    return 2 if node.operator == "unflatten" else 1


def _resized(graph: PruningGraph, node: Node, mask: Tensor) -> tuple[int, tuple[Any, ...] | None]:
    """Returns the arguments that change, and the position of the first."""
    operator = node.operator
    if operator in FILLS and node.name in graph.layouts:
        position = FILLS[operator]
        return position, (_sizes(graph, node, node.args[position], mask),)
    if _writes_sizes(graph, node):
        position = _sizes_at(node)
        return position, (_sizes(graph, node, node.args[position], mask),)
    if node.name in graph.cuts:
        return _cut(graph, node, mask)
    if operator in ("layer_norm", "rms_norm") and node.name in graph.statistics:
        dim, units = graph.statistics[node.name]
        shape = list(node.args[1])
        shape[dim - len(_shape(graph, node))] = int(mask[units].sum())
        return 1, (type(node.args[1])(shape),)
    if operator == "group_norm" and node.name in graph.layouts:
        kept = _kept_along(graph.layouts[node.name], 1, mask)
        if kept is not None:
            return 1, (max(1, int(node.args[1]) * kept // _shape(graph, node)[1]),)
    if operator.startswith("conv") and len(node.args) > 6 and node.args[6] > 1:
        weight: Any = graph.program.nodes[node.args[1].name].shape
        layout = graph.layouts.get(node.name)
        dim = -len(weight) + 1
        kept = None if layout is None else _kept_along(layout, dim, mask)
        if layout is not None and kept is not None:
            return 6, (int(node.args[6]) * kept // layout.shape[dim],)
    if operator in ("pad", "constant_pad_nd") and node.module in graph.pads:
        dim, units = graph.pads[node.module]
        return 1, (type(node.args[1])(padded_widths(node.args[1], dim, mask[units])),)
    return 0, None


def padded_widths(widths: Sequence[int], dim: int, kept: Tensor) -> list[int]:
    """Returns the widths of a padding that adds channels, some of which go.

    Args:
        widths: Of the dense network: before and after, for every dim from the last one on.
        dim: The dim of the channels, counted from the last one.
        kept: Whether each position of the padded value stays, bool, shape (channels,).
    """
    result = list(widths)
    before, after = result[2 * dim], result[2 * dim + 1]
    result[2 * dim] = int(kept[:before].sum())
    result[2 * dim + 1] = int(kept[len(kept) - after :].sum())
    return result


def _shape(graph: PruningGraph, node: Node) -> Any:
    return graph.program.nodes[node.args[0].name].shape


def _sizes(graph: PruningGraph, node: Node, sizes: Any, mask: Tensor) -> Any:
    """Returns the sizes of a view's result that the code would compute for the kept channels."""
    layout = graph.layouts[node.name]
    first = 0
    if node.operator == "unflatten":
        first = int(node.args[1]) % len(_shape(graph, node))
    result = []
    for dim, size in enumerate(sizes, first):
        kept = _kept_along(layout, dim, mask)
        result.append(size if kept is None or size < 0 else type(size)(kept))
    return type(sizes)(result)


def _kept_along(layout: Tensor, dim: int, mask: Tensor) -> int | None:
    """Returns how many positions along a dim stay; None if none of them ever goes."""
    if layout.shape[dim] == 1:
        return None
    return int(mask[layout].movedim(dim, 0).reshape(layout.shape[dim], -1).any(1).sum())


def _cut(graph: PruningGraph, node: Node, mask: Tensor) -> tuple[int, tuple[Any, ...] | None]:
    stops = graph.cuts[node.name].kept(mask)
    if node.operator == "slice":
        return 2, stops
    if node.operator == "narrow":
        return 2, (stops[0], stops[1] - stops[0])
    if node.operator == "split" and isinstance(node.args[1], int):
        return 1, (stops[1],)
    if node.operator in ("split", "split_with_sizes"):
        return 1, (type(node.args[1])(b - a for a, b in pairwise(stops)),)
    return 0, None  # chunk: the code gives a count

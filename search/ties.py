"""Ties: which groups share the offset by which a candidate departs from its base allocation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from paretoprune.criteria import UNBOUNDED, Bounds
from paretoprune.criteria.units import LAYERS
from paretoprune.surgery import PruningGraph, PruningPlan
from paretoprune.surgery.program import Node, Ref

Granularity = Literal["group", "stage", "uniform"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
"""Whether each group has its own offset, those of a stage share one, or there are none."""
MOST_OFFSETS = 40
"""Most offsets of one kind; more groups share theirs, more blocks have none."""
_NEGLIGIBLE = 0.001  # a group that frees less of the dense MACs gets no offset


def ties_of(
    graph: PruningGraph, granularity: Granularity = "group", bounds: Bounds = UNBOUNDED
) -> dict[str, str]:
    """Returns the name of the offset that each group takes; groups that matter little have none.

    Args:
        graph: The dense network's graph.
        granularity: With `group` the offset is the group's own, or its module's where there are
            more than `MOST_OFFSETS`; with `stage` that of all groups whose features have the same
            number of positions (pixels or tokens); with `uniform` there are none.
        bounds: A group to which they leave one count has nothing to decide.
    """
    groups = [] if granularity == "uniform" else _groups_that_matter(graph, bounds)
    if granularity == "stage":
        positions = _positions(graph)
        numbers = {of: at for at, of in enumerate(dict.fromkeys(positions.values()), 1)}
        return {group: f"stage {numbers[positions[group]]}" for group in groups}
    ties = {group: group for group in groups}
    depth = max((group.count(".") for group in groups), default=0)
    while len(set(ties.values())) > MOST_OFFSETS and depth >= 0:
        ties = {group: ".".join(group.split(".")[:-1][:depth]) for group in groups}
        depth -= 1
    return ties


def streams_of(
    graph: PruningGraph, ties: Mapping[str, str], granularity: Granularity = "group"
) -> tuple[str, ...]:
    """Returns the offsets of groups that lie in no block, none where there are no blocks.

    The offset of a stage is one only if all of its groups lie in no block.
    """
    inside = {name for block in graph.blocks.values() for name in block.groups}
    outside = {tie: None for group, tie in ties.items() if group not in inside}
    if granularity == "stage":
        mixed = {ties[group] for group in inside & ties.keys()}
        return tuple(tie for tie in outside if tie not in mixed) if inside else ()
    return tuple(outside) if inside else ()


def _groups_that_matter(graph: PruningGraph, bounds: Bounds) -> list[str]:
    """Returns the groups whose pruning frees a share of the MACs worth deciding about."""
    dense = graph.cost().macs
    return [
        group.name
        for group in graph.open_groups
        if len(bounds.counts(graph, group)) > 1
        and dense - graph.cost(PruningPlan({group.name: (0,)})).macs > _NEGLIGIBLE * dense
    ]


def _positions(graph: PruningGraph) -> dict[str, int]:
    """Returns the number of positions of every group's features, in execution order.

    That is, of what the first layer puts out that makes the group's units. In a block, whose
    input and output have equally many positions, all groups take the most that a layer in it
    has: squeezed features, of one position, belong to the stage of those that they scale.
    """
    layers = [node for node in graph.program.nodes.values() if node.operator in LAYERS]
    found: dict[str, int] = {}
    for group in graph.groups.values():
        weights = {each.parameter for each in group.slices}
        first = next((node for node in layers if _weight(graph, node) in weights), None)
        found[group.name] = 0 if first is None else _size(graph, first)
    for name, block in graph.blocks.items():
        inside = graph.extents[name].nodes
        sizes = [_size(graph, node) for node in layers if node.name in inside]
        found.update(dict.fromkeys(block.groups, max(sizes, default=0)))
    return found


def _weight(graph: PruningGraph, layer: Node) -> str:
    """Returns the name of a layer's weight; empty where it is computed."""
    ref = layer.args[1]
    source = graph.program.nodes[ref.name] if isinstance(ref, Ref) else None
    return source.target if source is not None and source.kind == "parameter" else ""


def _size(graph: PruningGraph, layer: Node) -> int:
    """Returns how many positions an example has in a layer's output."""
    shape = [size for size in layer.shape or () if isinstance(size, int)]
    channels = shape[-1 if layer.operator == "linear" else 1]
    return math.prod(shape) // channels // graph.program.batch

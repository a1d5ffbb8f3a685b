"""block_saliency: blocks on the scale of their units, so that one ranking chooses both."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from paretoprune.criteria.base import Calibration, Criterion, ScoresBlocks
from paretoprune.surgery import PruningGraph


def block_saliency(
    criterion: Criterion,
    saliency: Mapping[str, Tensor],
    model: nn.Module,
    graph: PruningGraph,
    calibration: Calibration,
) -> dict[str, float]:
    """Returns the saliency of every removable block; higher = keep.

    Removing a block removes all its inner units at once, and in a ranking of units it stands for
    all of them: its saliency is the damage per inner unit. For a criterion that adds the damages
    of units that is their mean; a criterion with a `blocks` method measures it. A block without
    inner units that a criterion does not measure goes last.

    Args:
        criterion: The criterion.
        saliency: What it returned for the units.
        model: The dense network; left untouched.
        graph: Its graph.
        calibration: As for the units.
    """
    if isinstance(criterion, ScoresBlocks):
        measured = criterion.blocks(model, graph, calibration, saliency)
        return {name: float(measured[name]) for name in graph.blocks}
    highest = max((float(values.max()) for values in saliency.values()), default=0.0)
    scores = {}
    for block in graph.blocks.values():
        inner = [saliency[name] for name in block.groups if name in saliency]
        scores[block.name] = float(torch.cat(inner).mean()) if inner else highest
    return scores


def inner_units(graph: PruningGraph, block: str) -> int:
    """Returns the number of units that lie inside a block alone, at least 1."""
    return max(1, sum(graph.groups[name].size for name in graph.blocks[block].groups))

"""What is measured once on the dense network: saliencies, and the damage of losing a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paretoprune.criteria import Criterion
from paretoprune.search.metrics import evaluate
from paretoprune.search.problem import Batch
from paretoprune.surgery import PruningGraph, PruningPlan, prune

BLOCK_IMAGES = 256
"""Examples on which the damage of losing a block is measured."""
Saliencies = Mapping[str, Mapping[str, Tensor]]
"""By criterion, by group: shape (group.size,)."""


def saliencies(
    criteria: Mapping[str, Criterion],
    model: nn.Module,
    graph: PruningGraph,
    calibration: Iterable[Batch],
    file: Path,
) -> dict[str, dict[str, Tensor]]:
    """Returns every criterion's saliencies, from `file` where they are there.

    Args:
        criteria: By name.
        model: The dense network.
        graph: Its graph.
        calibration: Training batches.
        file: Safetensors file with tensors named `criterion/group`; read, and written again
            when something was missing.
    """
    stored = _load(file)
    found: dict[str, dict[str, Tensor]] = {}
    for name, criterion in criteria.items():
        known = {g.name: stored.get(f"{name}/{g.name}") for g in graph.open_groups}
        whole = {
            group: values
            for group, values in known.items()
            if values is not None and tuple(values.shape) == (graph.groups[group].size,)
        }
        if len(whole) < len(known):
            scores = criterion(model, graph, calibration)
            whole = {group: scores[group].detach().cpu().contiguous() for group in known}
        found[name] = whole
    tensors = {f"{name}/{group}": t for name, by in found.items() for group, t in by.items()}
    if tensors.keys() - stored.keys():
        draft = file.with_suffix(".draft")
        save_file({**stored, **tensors}, draft)
        draft.replace(file)
    return found


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(file)) if file.exists() else {}
    except SafetensorError:  # half written when power was lost: measured again
        return {}


def _first(batches: Iterable[Batch], examples: int) -> list[Batch]:
    """Returns the first batches that hold `examples` examples together."""
    taken: list[Batch] = []
    for inputs, targets in batches:
        taken.append((inputs, targets))
        examples -= len(targets)
        if examples <= 0:
            break
    return taken


def blocks_by_damage(
    model: nn.Module,
    graph: PruningGraph,
    calibration: Iterable[Batch],
    loss: Callable[[Any, Tensor], Tensor],
) -> tuple[str, ...]:
    """Returns the removable blocks, the one that costs least loss per MAC saved first.

    Each is removed alone, with nothing refitted, and measured on `BLOCK_IMAGES` examples.

    Args:
        model: The dense network.
        graph: Its graph.
        calibration: Training batches.
        loss: (outputs, targets) -> scalar mean loss.
    """
    if not graph.blocks:
        return ()
    dense = graph.cost().macs
    calibration = _first(calibration, BLOCK_IMAGES)
    before = evaluate(model, calibration, loss)["loss"]
    damage = {}
    for block in graph.blocks:
        plan = PruningPlan(removed=(block,))
        saved = max(1, dense - graph.cost(plan).macs)
        after = evaluate(prune(model, graph, plan), calibration, loss)["loss"]
        damage[block] = (after - before) / saved if after == after else float("inf")
    return tuple(sorted(damage, key=lambda block: damage[block]))

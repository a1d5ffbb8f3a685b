"""What is measured once on the dense network: saliencies, and the damage of losing a block."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paretoprune.criteria import CostClass, Criterion, SharedCalibration, block_saliency
from paretoprune.criteria import fingerprint as fingerprints
from paretoprune.criteria.drafts import drafted, remove_dead_drafts
from paretoprune.search.metrics import evaluate
from paretoprune.search.problem import Batch
from paretoprune.surgery import PruningGraph, PruningPlan, prune
from paretoprune.surgery.inputs import count_rows
from paretoprune.surgery.progress import Progress, silent

BLOCK_IMAGES = 256
"""Examples on which the damage of losing a block is measured."""
Saliencies = Mapping[str, Mapping[str, Tensor]]
"""By criterion, by group: shape (group.size,)."""
BlockSaliencies = Mapping[str, Mapping[str, float]]
"""By criterion, by removable block, on the scale of the units."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Saliencies of several criteria.

    Attributes:
        units: By criterion, by group.
        blocks: By criterion, by block.
    """

    units: Saliencies
    blocks: BlockSaliencies


def saliencies(
    criteria: Mapping[str, Criterion],
    model: nn.Module,
    graph: PruningGraph,
    calibration: SharedCalibration,
    folder: Path,
    progress: Progress = silent,
) -> Scores:
    """Returns every criterion's saliencies, from `folder` where they are there.

    A file there belongs to the weights and units of one network, to the content of the calibration
    data, the loss, and the criterion with its settings and code, so that any search may share it.

    Args:
        criteria: By name.
        model: The dense network.
        graph: Its graph.
        calibration: Training batches with the problem's loss.
        folder: Holds a file per criterion; made if it is not there.
        progress: Told how far each is.
    """
    remove_dead_drafts(folder)
    calibration.progress = partial(progress, "reading calibration data")
    shared = _shared_part(model, graph, calibration)
    files = {
        name: folder / f"{name}-{_key(criterion, shared)}.safetensors"
        for name, criterion in criteria.items()
    }
    found = {}
    for name, file in files.items():
        if (known := _load(file, graph)) is not None:
            found[name] = known

    def dearest_first(name: str) -> int:  # what it measures serves cheaper ones, too
        return -int(getattr(criteria[name], "cost", CostClass.GRADIENTS))

    for name in sorted(criteria, key=dearest_first):
        if name not in found:
            calibration.progress = partial(progress, f"saliencies of {name}")
            calibration.progress(0, 0)
            found[name] = _measure(criteria[name], model, graph, calibration)
            _save(files[name], found[name])
    calibration.progress = partial(progress, "reading calibration data")
    return Scores(
        {name: found[name][0] for name in criteria},
        {name: found[name][1] for name in criteria},
    )


Found = tuple[dict[str, Tensor], dict[str, float]]


def _measure(
    criterion: Criterion, model: nn.Module, graph: PruningGraph, calibration: SharedCalibration
) -> Found:
    scores = criterion(model, graph, calibration)
    missing = [group.name for group in graph.open_groups if group.name not in scores]
    if missing:
        raise ValueError(
            f"a criterion ranks the units of every group that can be pruned, but "
            f"{type(criterion).__name__} returned nothing for {', '.join(map(repr, missing[:3]))}."
        )
    units = {g.name: scores[g.name].detach().cpu().contiguous() for g in graph.open_groups}
    return units, block_saliency(criterion, units, model, graph, calibration)


def _shared_part(model: nn.Module, graph: PruningGraph, calibration: SharedCalibration) -> str:
    """Returns the part of the key that all criteria have in common."""
    sizes = [(group.name, group.size, group.frozen is None) for group in graph.groups.values()]
    return repr(
        (
            fingerprints.of_model(model),
            fingerprints.of_batches(calibration),
            sizes,
            list(graph.blocks),
            fingerprints.of_setting(calibration.loss),
        )
    )


def _key(criterion: Criterion, shared: str) -> str:
    digest = hashlib.blake2b(f"{shared} {criterion!r}".encode(), digest_size=12)
    for file in sorted(Path(inspect.getfile(SharedCalibration)).parent.glob("*.py")):
        digest.update(file.read_bytes())
    digest.update(_source(type(criterion)))
    return digest.hexdigest()


def _source(kind: type) -> bytes:
    """Returns what tells the code of a criterion apart: its file, or its own code."""
    try:
        file = Path(inspect.getfile(kind))
    except (TypeError, OSError):  # written in a notebook or at a prompt
        file = Path()
    if file.is_file():
        return file.read_bytes()
    code = getattr(vars(kind).get("__call__"), "__code__", None)
    return repr(code and (code.co_code, code.co_consts, code.co_names)).encode()


def _load(file: Path, graph: PruningGraph) -> Found | None:
    try:
        stored = load_file(file) if file.exists() else {}
    except SafetensorError:  # half written when power was lost: measured again
        return None
    units = {g.name: stored.get(f"unit/{g.name}") for g in graph.open_groups}
    blocks = {name: stored.get(f"block/{name}") for name in graph.blocks}
    if not stored or None in units.values() or None in blocks.values():
        return None
    return (
        {name: values for name, values in units.items() if values is not None},
        {name: float(value) for name, value in blocks.items() if value is not None},
    )


def _save(file: Path, found: Found) -> None:
    units, blocks = found
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"unit/{name}": values for name, values in units.items()}
    tensors |= {f"block/{name}": torch.tensor(value).double() for name, value in blocks.items()}
    with drafted(file) as draft:  # of its own: searches that share the folder may save at once
        save_file(tensors, draft)


def _first(batches: Iterable[Batch], examples: int) -> list[Batch]:
    """Returns the first batches that hold `examples` examples together."""
    taken: list[Batch] = []
    for inputs, targets in batches:
        taken.append((inputs, targets))
        examples -= count_rows(targets)
        if examples <= 0:
            break
    return taken


def blocks_by_damage(
    model: nn.Module,
    graph: PruningGraph,
    calibration: Iterable[Batch],
    loss: Callable[[Any, Any], Tensor],
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Returns the removable blocks, the one that costs least loss per MAC saved first.

    Each is removed alone, with nothing refitted, and measured on `BLOCK_IMAGES` examples.

    Args:
        model: The dense network.
        graph: Its graph.
        calibration: Training batches.
        loss: (outputs, targets) -> scalar mean loss.
        progress: Told how far it is.
    """
    if not graph.blocks:
        return ()
    dense = graph.cost().macs
    calibration = _first(calibration, BLOCK_IMAGES)
    before = evaluate(model, calibration, loss)["loss"]
    damage = {}
    for done, block in enumerate(graph.blocks):
        progress("damage of removing each block", done, len(graph.blocks))
        plan = PruningPlan(removed=(block,))
        saved = max(1, dense - graph.cost(plan).macs)
        after = evaluate(prune(model, graph, plan), calibration, loss)["loss"]
        damage[block] = (after - before) / saved if after == after else float("inf")
    return tuple(sorted(damage, key=lambda block: damage[block]))

"""prepare: everything that is known about a problem before its first trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from paretoprune.criteria import UNBOUNDED, Bounds, Criterion, SharedCalibration, fingerprint
from paretoprune.search.candidate import Candidate
from paretoprune.search.checks import check_reachable
from paretoprune.search.damage import DamageModel
from paretoprune.search.evaluation import Moved, give_back_memory, on_device
from paretoprune.search.fit import check_trainable
from paretoprune.search.listener import SearchInfo
from paretoprune.search.metrics import device_of, evaluate
from paretoprune.search.objectives import chance_loss, measured_of, objectives_of
from paretoprune.search.problem import Problem
from paretoprune.search.saliency import Saliencies, blocks_by_damage, saliencies
from paretoprune.search.space import SearchSpace
from paretoprune.search.ties import Granularity
from paretoprune.surgery import Cost, PruningGraph, PruningPlan, trace
from paretoprune.surgery.progress import Progress, silent

if TYPE_CHECKING:  # the study imports optuna, which `import paretoprune.search` must not
    from paretoprune.search.study import Study

SALIENCIES = "saliency"
"""Folder of the saliencies in a run's folder, where the search is given no other."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a search is asked for.

    Attributes:
        flops: Share of the dense MACs (float) or MACs (int) that a plan may keep at most.
        trials: How many trials are to be finished.
        criteria: By name.
        objectives: Names of the metrics to optimise.
        saliencies: Folder of saliencies that searches share; None takes one in the run's folder.
        granularity: Which groups share an offset.
        bounds: Which unit counts groups may keep, and which blocks may go.
        trains: Whether networks are trained.
    """

    flops: float | int
    trials: int
    criteria: Mapping[str, Criterion]
    objectives: tuple[str, ...]
    saliencies: Path | None = None
    granularity: Granularity = "group"
    bounds: Bounds = UNBOUNDED
    trains: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """A problem with all that its trials need.

    Attributes:
        graph: The dense network's graph.
        saliencies: Of every criterion.
        space: What the sampler decides.
        info: What listeners are told.
    """

    graph: PruningGraph
    saliencies: Saliencies
    space: SearchSpace
    info: SearchInfo

    def decode(self, candidate: Candidate) -> tuple[PruningPlan, Cost]:
        """Returns the plan of a candidate and its cost.

        Raises:
            InfeasibleBudget: If there is none.
        """
        plan = self.space.decode(candidate, self.graph, self.saliencies)
        return plan, self.graph.cost(plan)

    def damage_model(self, seed: int) -> DamageModel:
        """Returns what proposes trials from finished ones.

        Args:
            seed: Seed of every proposal.
        """
        return DamageModel(self.space, self.graph, self.saliencies, seed)


def prepare(
    problem: Problem,
    request: Request,
    folder: Path,
    study: Study,
    progress: Progress = silent,
    dense_latency: Callable[[], float] | None = None,
) -> Prepared:
    """Traces and measures the dense network, or takes what an earlier driver measured.

    Args:
        problem: The dense network and its data.
        request: What the search is asked for.
        folder: Of the run.
        study: Notes what must stay the same over all drivers of the run.
        progress: Told what is measured, and how far it is.
        dense_latency: Measures the dense network on a worker, in milliseconds; called if that is
            an objective.

    Raises:
        InfeasibleBudget: If no plan meets the target.
        UnsupportedModel: If the network cannot be traced.
        ValueError: If the study belongs to another search, or networks that are to be trained
            cannot be.
    """
    model = on_device(problem.model)
    calibration = SharedCalibration(Moved(problem.calibration, device_of(model)), problem.loss)
    graph, target = _traced(problem, request, progress)
    kept = request.saliencies or folder / SALIENCIES
    scores = saliencies(request.criteria, model, graph, calibration, kept, progress)
    blocks = study.notes.get("blocks")
    if blocks is None:
        blocks = blocks_by_damage(model, graph, calibration, problem.loss, progress)
    space = SearchSpace.of(
        graph,
        scores.units,
        target,
        blocks,
        scores.blocks,
        granularity=request.granularity,
        bounds=request.bounds,
    )
    timed = dense_latency if "latency" in request.objectives else None
    info = _info(problem, model, graph, space.to_json(), request, study, progress, timed)
    study.note("blocks", list(blocks))
    give_back_memory()
    return Prepared(graph, scores.units, space, info)


def prepare_steps(
    problem: Problem,
    request: Request,
    study: Study,
    recovery: int,
    progress: Progress = silent,
) -> tuple[PruningGraph, SearchInfo]:
    """Returns the graph of the dense network, and what listeners are told of its steps.

    For the strategy `everything`, which measures saliencies in every step anew.

    Args:
        problem: The dense network and its data.
        request: What the search is asked for.
        study: Notes what must stay the same over all drivers of the run.
        recovery: Epochs that candidates are trained for.
        progress: Told what is measured.

    Raises:
        InfeasibleBudget: If no plan meets the target.
        UnsupportedModel: If the network cannot be traced.
        ValueError: If the study belongs to another search, or networks that are to be trained
            cannot be.
    """
    graph, target = _traced(problem, request, progress)
    space = {
        "strategy": "everything",
        "target": target,
        "criteria": list(request.criteria),
        "recovery": recovery,
        "bounds": request.bounds.to_json(),
    }
    info = _info(problem, on_device(problem.model), graph, space, request, study, progress)
    give_back_memory()
    return graph, info


def _traced(problem: Problem, request: Request, progress: Progress) -> tuple[PruningGraph, int]:
    """Returns the graph of the dense network, and the target in MACs."""
    progress("tracing the network", 0, 0)
    graph = trace(problem.model, problem.example_inputs)
    target = check_reachable(graph, request.flops, request.bounds)
    if request.trains:
        check_trainable(problem, graph)
    return graph, target


def _info(
    problem: Problem,
    model: nn.Module,
    graph: PruningGraph,
    space: Mapping[str, Any],
    request: Request,
    study: Study,
    progress: Progress,
    dense_latency: Callable[[], float] | None = None,
) -> SearchInfo:
    """Returns what the study notes of the search, or notes what is measured now."""
    noted = study.notes.get("search")
    seen = {
        "weights": fingerprint.of_model(problem.model),
        "data": fingerprint.of_batches(problem.validation),
        "loss": fingerprint.of_setting(problem.loss),
    }
    if noted is None:
        progress("loss and accuracy of the dense network", 0, 0)
        metrics = evaluate(model, problem.validation, problem.loss, problem.metrics)
        if dense_latency is not None:
            progress("latency of the dense network", 0, 0)
            metrics["latency"] = dense_latency()
        info = _measured(problem, model, graph, space, request, metrics)
    else:
        _check_same(space, request, study, seen)
        info = SearchInfo.from_json(noted, tuple(study.records()))
    info = replace(info, trials=request.trials)
    for name, value in seen.items():
        study.note(name, value)
    study.note("space", dict(space))
    study.note("search", info.to_json())
    return info


def _measured(
    problem: Problem,
    model: nn.Module,
    graph: PruningGraph,
    space: Mapping[str, Any],
    request: Request,
    metrics: Mapping[str, float],
) -> SearchInfo:
    chance = chance_loss(model, next(iter(problem.validation)), problem.loss)
    objectives = objectives_of(
        request.objectives, graph.cost(), metrics, chance, measured_of(problem.metrics)
    )
    return SearchInfo(
        problem=problem.name,
        dense=graph.cost(),
        metrics=metrics,
        target=space["target"],
        trials=request.trials,
        objectives=objectives,
        criteria=tuple(space["criteria"]),
        sizes={group.name: group.size for group in graph.open_groups},
        blocks={block.name: block.groups for block in graph.blocks.values()},
    )


def _check_same(
    space: Mapping[str, Any], request: Request, study: Study, seen: Mapping[str, str]
) -> None:
    """Verifies that a resumed run searches what it searched before."""
    before = study.notes["space"]
    names = [item["name"] for item in study.notes["search"]["objectives"]]
    changed = [key for key, value in space.items() if value != before.get(key)]
    if names != list(request.objectives):
        changed.append("objectives")
    changed += [name for name, value in seen.items() if study.notes[name] != value]
    if changed:
        raise ValueError(
            f"this run holds a search with other settings ({', '.join(changed)} differ); start a "
            f"new run, or resume it with the same network, weights, data and loss, target, "
            f"criteria, objectives, granularity and bounds."
        )

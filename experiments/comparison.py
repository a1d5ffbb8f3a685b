"""Compares criteria at equal FLOPs, one-shot: no training, three ways of recovery."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from paretoprune.criteria import UNBOUNDED, Bounds, Criterion, SharedCalibration, select
from paretoprune.search import Problem, evaluate
from paretoprune.search.evaluation import Moved, on_device
from paretoprune.search.latency import wait
from paretoprune.search.layout import channels_last
from paretoprune.search.metrics import device_of
from paretoprune.search.problem import Batch
from paretoprune.search.saliency import Scores, saliencies
from paretoprune.surgery import (
    InfeasibleBudget,
    PruningGraph,
    PruningPlan,
    Reconstructor,
    prune,
    recalibrate,
)
from paretoprune.surgery.progress import Progress, silent

Recovery = Literal["plain", "recalibrated", "reconstructed"]
RECOVERIES: tuple[Recovery, ...] = ("plain", "recalibrated", "reconstructed")
Ranking = Literal["units", "units and blocks"]


@dataclass(frozen=True, slots=True)
class Shot:
    """One criterion at one target with one recovery.

    Attributes:
        criterion: Its name.
        ranking: Whether units alone were ranked, or units and blocks together.
        target: The FLOPs target as it was given.
        macs_ratio: Share of the dense network's MACs that is left.
        params_ratio: Share of its parameters that is left.
        removed_blocks: Number of blocks removed whole.
        recovery: `plain` as surgery left it, `recalibrated` with new BatchNorm statistics, or
            `reconstructed` by least squares.
        loss: Mean loss.
        accuracy: Share classified rightly; None where it has no meaning.
        seconds: What pruning and recovery took.
    """

    criterion: str
    ranking: Ranking
    target: float | int
    macs_ratio: float
    params_ratio: float
    removed_blocks: int
    recovery: Recovery
    loss: float
    accuracy: float | None
    seconds: float


class Comparison:
    """One dense network on which criteria are compared.

    Args:
        problem: The network and its data.
        graph: The network's graph.
        criteria: By name.
        saliency_dir: Folder in which saliencies are kept.
        progress: Told how far the saliencies are.
        bounds: What plans keep to.
    """

    def __init__(
        self,
        problem: Problem,
        graph: PruningGraph,
        criteria: Mapping[str, Criterion],
        saliency_dir: Path,
        progress: Progress = silent,
        bounds: Bounds = UNBOUNDED,
    ) -> None:
        self.problem = problem
        self.bounds = bounds
        self.graph = graph
        self.model = on_device(problem.model)
        self._calibration = Moved(problem.calibration, device_of(self.model))
        self._reconstruct: Reconstructor | None = None
        shared = SharedCalibration(self._calibration, problem.loss)
        self.scores: Scores = saliencies(
            criteria, self.model, self.graph, shared, saliency_dir, progress
        )

    def plan(self, criterion: str, target: float | int, ranking: Ranking) -> PruningPlan:
        """Returns the criterion's global ranking cut at the target.

        Raises:
            InfeasibleBudget: If there is no such plan.
        """
        blocks = self.scores.blocks[criterion] if ranking == "units and blocks" else None
        units = self.scores.units[criterion]
        return select(self.graph, units, budget=target, blocks=blocks, bounds=self.bounds)

    def network(self, plan: PruningPlan, recovery: Recovery) -> nn.Module:
        """Returns the pruned network of a plan, recovered."""
        small = prune(self.model, self.graph, plan)
        if recovery == "recalibrated":
            data = self.problem.recalibration
            batches = self._calibration if data is None else Moved(data, device_of(self.model))
            return recalibrate(small, batches)
        if recovery == "reconstructed":
            if self._reconstruct is None:  # the dense side is computed once
                self._reconstruct = Reconstructor(self.model, self.graph, self._calibration)
            return self._reconstruct(small, plan)
        return small

    def shots(
        self,
        targets: Sequence[float | int],
        *,
        criteria: Sequence[str] | None = None,
        recoveries: Sequence[Recovery] = RECOVERIES,
        rankings: Sequence[Ranking] = ("units",),
        split: Iterable[Batch] | None = None,
        progress: Progress = silent,
    ) -> Iterator[Shot]:
        """Yields a shot per criterion, target, ranking and recovery; infeasible ones are left out.

        Args:
            targets: FLOPs targets.
            criteria: Names of some of the criteria; None takes all.
            recoveries: Ways of recovery.
            rankings: What is ranked.
            split: What is measured on; None takes the search split.
            progress: Told what is measured next, and how far it is.
        """
        split = self.problem.validation if split is None else split
        dense = self.graph.cost()
        names = list(self.scores.units if criteria is None else criteria)
        total, done = len(names) * len(targets) * len(rankings), 0
        for criterion in names:
            for target in targets:
                for ranking in rankings:
                    progress("criteria at targets", done, total)
                    done += 1
                    try:
                        plan = self.plan(criterion, target, ranking)
                    except InfeasibleBudget:
                        continue
                    cost = self.graph.cost(plan)
                    for recovery in recoveries:
                        start = time.perf_counter()
                        network = self.network(plan, recovery)
                        wait()
                        seconds = time.perf_counter() - start
                        network = channels_last(network, self.graph)
                        measured = evaluate(network, split, self.problem.loss)
                        yield Shot(
                            criterion=criterion,
                            ranking=ranking,
                            target=target,
                            macs_ratio=cost.macs / dense.macs,
                            params_ratio=cost.params / dense.params,
                            removed_blocks=len(plan.removed),
                            recovery=recovery,
                            loss=measured["loss"],
                            accuracy=measured.get("accuracy"),
                            seconds=seconds,
                        )

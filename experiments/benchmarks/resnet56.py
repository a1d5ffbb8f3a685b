"""ResNet-56 on CIFAR-10 without fine-tuning: what the search adds to one-shot pruning.

    python -m paretoprune.experiments.benchmarks.resnet56 --data cifar10:DIR --weights FILE

For every FLOPs target three networks are chosen by their loss on the search split, and each is
tested once:

- `search`: the best of a search;
- `one-shot`: the best of all criteria, ranked globally and uniformly, with the same recovery;
- `recalibrated`: likewise, with BatchNorm recalibration as the only recovery.

Writes one row per target and method to experiments/results/.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from paretoprune.criteria import CRITERIA, select
from paretoprune.experiments.benchmarks.device import described
from paretoprune.experiments.recipes import build_problem
from paretoprune.search import Problem, evaluate, search
from paretoprune.search.evaluation import Evaluator
from paretoprune.surgery import (
    InfeasibleBudget,
    PruningGraph,
    PruningPlan,
    prune,
    recalibrate,
    trace,
)

RESULTS = Path(__file__).parents[1] / "results" / "resnet56-cifar10.csv"
Row = dict[str, Any]


def main() -> None:
    """Runs the benchmark with the arguments of this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--weights", required=True, help="trained weights, .safetensors")
    parser.add_argument("--flops", default="0.5,0.3", help="targets as fractions")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    problem = build_problem(
        "resnet56-cifar10", data=options.data, weights=options.weights, seed=options.seed
    )
    rows: list[Row] = []
    for flops in (float(text) for text in options.flops.split(",")):
        for row in measure(problem, flops, options.trials, options.seed):
            rows.append({**row, "seed": options.seed, **described()})
            print(rows[-1], flush=True)
            write(rows, options.out)


def write(rows: list[Row], file: Path) -> None:
    """Writes rows as CSV; all have the same fields."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def measure(problem: Problem, flops: float, trials: int, seed: int) -> Iterator[Row]:
    """Yields one row per method for a FLOPs target (a fraction of the dense MACs)."""
    graph = trace(problem.model, problem.example_inputs)
    evaluator = Evaluator(problem, graph)

    def recovered(plan: PruningPlan) -> nn.Module:
        return evaluator.network(plan, seed)

    def final(plan: PruningPlan) -> nn.Module:
        return evaluator.final(plan, seed)

    def recalibrated(plan: PruningPlan) -> nn.Module:
        small = prune(problem.model, graph, plan)
        return recalibrate(small, problem.recalibration or problem.calibration)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        front = search(problem, flops, trials, seed=seed, run_dir=Path(folder))
    best = front.best()
    assert best.plan is not None, "a record of the front has a plan"
    seconds = time.perf_counter() - start
    label = f"{best.candidate.criterion}, {best.candidate.allocation}, {best.origin}"
    yield row(problem, graph, flops, "search", label, best.plan, final, trials, seconds)

    start = time.perf_counter()
    plans = dict(one_shot_plans(problem, graph, flops))
    ranking = time.perf_counter() - start
    for method, build, handed_out in (
        ("one-shot", recovered, final),
        ("recalibrated", recalibrated, recalibrated),
    ):
        start = time.perf_counter()
        losses = {
            name: evaluate(build(plan), problem.validation, problem.loss)["loss"]
            for name, plan in plans.items()
        }
        name = min(losses, key=lambda name: losses[name])
        seconds = ranking + time.perf_counter() - start
        yield row(
            problem, graph, flops, method, name, plans[name], handed_out, len(plans), seconds
        )


def one_shot_plans(
    problem: Problem, graph: PruningGraph, flops: float
) -> Iterator[tuple[str, PruningPlan]]:
    """Yields a plan for every criterion and allocation that reaches the target."""
    for name, criterion in CRITERIA.items():
        saliency = criterion()(problem.model, graph, problem.calibration)
        for allocation in ("global", "uniform"):
            try:
                plan = select(graph, saliency, budget=flops, allocation=allocation)
            except InfeasibleBudget:
                continue
            yield f"{name}, {allocation}", plan


def row(
    problem: Problem,
    graph: PruningGraph,
    flops: float,
    method: str,
    chosen: str,
    plan: PruningPlan,
    build: Callable[[PruningPlan], nn.Module],
    candidates: int,
    seconds: float,
) -> Row:
    """Returns the row of a chosen plan; reads the test split."""
    network = build(plan)
    assert problem.test is not None, "CIFAR-10 has a test split"
    split = evaluate(network, problem.validation, problem.loss)
    return {
        "flops": flops,
        "method": method,
        "chosen": chosen,
        "macs_ratio": round(graph.cost(plan).macs / graph.cost().macs, 4),
        "params_ratio": round(graph.cost(plan).params / graph.cost().params, 4),
        "removed_blocks": len(plan.removed),
        "search_loss": round(split["loss"], 4),
        "search_accuracy": round(split["accuracy"], 4),
        "test_accuracy": round(evaluate(network, problem.test(), problem.loss)["accuracy"], 4),
        "candidates": candidates,
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    main()

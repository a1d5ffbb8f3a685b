"""PROscore (IPPRO, arXiv:2507.14171) and magnitude at equal FLOPs, before and after fine-tuning.

    python -m paretoprune.experiments.reproduce.proscore --networks resnet56

Units are ranked globally and cut without any refitting (`accuracy_before`), then fine-tuned. Does
size matter? `large_removed` is the share of the units with an L2 norm above the median that a
method removes: where a ranking is by size it is small, and grows with what the ranking ignores.

Minutes on two cores: `--networks resnet20 --epochs 1 --images 2000 --test-images 1000`.
"""

from __future__ import annotations

from functools import partial

import torch

from paretoprune.criteria import CRITERIA, SharedCalibration, select
from paretoprune.experiments.benchmarks.rows import RESULTS
from paretoprune.experiments.reproduce.common import (
    Bench,
    Results,
    Row,
    benches,
    numbers,
)
from paretoprune.experiments.reproduce.common import parser as base_parser
from paretoprune.experiments.units import names
from paretoprune.surgery import PruningPlan, prune

EPOCHS = 100
METHODS = ("proscore", "l1", "l2", "random")


def main(arguments: list[str] | None = None) -> None:
    """Measures the rows that the arguments ask for."""
    made = base_parser(__doc__, networks="resnet56", reductions="30,50,70,85", epochs=EPOCHS)
    made.add_argument("--methods", default=",".join(METHODS))
    options = made.parse_args(arguments)
    results = Results(
        options.out or RESULTS / "proscore.csv",
        ("network", "method", "reduction", "seed"),
        options.report,
    )
    for bench in benches(options):
        for method in names(options.methods):
            for reduction in numbers(options.reductions):
                row = {**bench.keys, "method": method, "reduction": reduction}
                measured = partial(_measure, bench, method, reduction)
                results.measure(row, measured, bench.reused)


def _measure(bench: Bench, method: str, reduction: float) -> Row:
    problem, graph = bench.problem, bench.graph
    calibration = SharedCalibration(problem.calibration, problem.loss)
    saliency = CRITERIA[method]()(problem.model, graph, calibration)
    plan = select(graph, saliency, budget=1 - reduction / 100)
    small = prune(problem.model, graph, plan)
    before = bench.accuracy(small)
    after = bench.train(small, f"proscore-{method}-{reduction}")
    return {
        **bench.costs(plan),
        "large_removed": _large_removed(bench, plan),
        "dense_accuracy": bench.accuracy(problem.model),
        "accuracy_before": before,
        "accuracy": bench.accuracy(after),
        **bench.reported(after),
    }


def _large_removed(bench: Bench, plan: PruningPlan) -> float:
    """Returns the percent of the units of large norm that a plan removes."""
    graph = bench.graph
    norms = CRITERIA["l2"]()(bench.problem.model, graph, [])
    median = torch.cat([norms[group.name] for group in graph.open_groups]).median()
    large = removed = 0
    for group in graph.open_groups:
        is_large = norms[group.name] > median
        stays = torch.zeros(group.size, dtype=torch.bool)
        stays[list(plan.kept.get(group.name, range(group.size)))] = True
        large += int(is_large.sum())
        removed += int((is_large & ~stays).sum())
    return round(100 * removed / max(1, large), 2)


if __name__ == "__main__":
    main()

"""SOSP (arXiv:2110.11395): SOSP-H against SOSP-I and magnitude; their time; bottlenecks.

    python -m paretoprune.experiments.reproduce.sosp --networks resnet56 --parts ratios,time

- `ratios`: the reduction is that of structures, ranked globally, cut without refitting
  (`accuracy_before`), then fine-tuned;
- `time`: seconds of the criterion on networks of more and more structures, with random weights;
- `bottlenecks`: layers that SOSP-H hardly prunes at half of the FLOPs are made twice as wide, or
  all layers 1.1 times; both, and the network as it is, are trained from scratch, pruned back by
  SOSP-H to the same number of parameters and fine-tuned.

Minutes on two cores: `--networks resnet20 --epochs 1 --images 2000 --test-images 1000`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import nn

from paretoprune.criteria import CRITERIA, SharedCalibration, select
from paretoprune.criteria.bottlenecks import pressures, reset, widen
from paretoprune.experiments.benchmarks.rows import RESULTS
from paretoprune.experiments.models import ResNet
from paretoprune.experiments.reproduce.common import (
    Bench,
    Results,
    Row,
    benches,
    numbers,
    without_lowest,
)
from paretoprune.experiments.reproduce.common import parser as base_parser
from paretoprune.experiments.units import names
from paretoprune.search import Problem
from paretoprune.search.evaluation import Moved, on_device
from paretoprune.search.metrics import device_of
from paretoprune.surgery import PruningGraph, PruningPlan, prune, trace

EPOCHS = 100
METHODS = ("sosp_h", "sosp_i", "l1")
LEAST = 2
WIDENINGS = ("original", "bottlenecks x2", "uniform x1.1")
SIZES = ((1, 1), (3, 1), (5, 1), (9, 1), (9, 2), (9, 4))
"""Blocks per stage and width of the networks that are timed."""


def main(arguments: list[str] | None = None) -> None:
    """Measures the rows that the arguments ask for."""
    made = base_parser(__doc__, networks="resnet56", reductions="30,50,70,85", epochs=EPOCHS)
    made.add_argument("--parts", default="ratios,time,bottlenecks")
    made.add_argument("--methods", default=",".join(METHODS))
    options = made.parse_args(arguments)
    parts = names(options.parts)
    file = options.out or RESULTS / "sosp.csv"
    keys = ("network", "method", "reduction", "seed")
    ratios = Results(file, keys, options.report)
    widened = Results(file.with_name(f"{file.stem}-bottlenecks.csv"), keys, options.report)
    timed = file.with_name(f"{file.stem}-time.csv")
    times = Results(timed, ("network", "method", "seed"))
    for bench in benches(options) if {"ratios", "bottlenecks"} & {*parts} else ():
        for reduction in numbers(options.reductions):
            row: Row = {**bench.keys, "reduction": reduction}
            for method in names(options.methods) if "ratios" in parts else ():
                measured = partial(_ratio, bench, method, reduction)
                ratios.measure({**row, "method": method}, measured, bench.reused)
            for method in WIDENINGS if "bottlenecks" in parts else ():
                measured = partial(_widened, bench, method, reduction)
                widened.measure({**row, "method": method}, measured, bench.reused)
    for seed, (blocks, width) in product(numbers(options.seeds), SIZES if "time" in parts else ()):
        for method in names(options.methods):
            row = {
                "network": f"resnet{6 * blocks + 2} x{width}",
                "method": method,
                "seed": int(seed),
                "epochs": 0,
                "images": 256,
                "test_images": 0,
                "batch_size": 64,
                "learning_rate": 0,
                "full": True,
            }
            times.measure(row, partial(_time, blocks, width, method))


def _saliency(problem: Problem, graph: PruningGraph, method: str) -> dict[str, torch.Tensor]:
    model = on_device(problem.model)
    calibration = SharedCalibration(Moved(problem.calibration, device_of(model)), problem.loss)
    found = CRITERIA[method]()(model, graph, calibration)
    return {name: scores.cpu() for name, scores in found.items()}


def _ratio(bench: Bench, method: str, reduction: float) -> Row:
    problem, graph = bench.problem, bench.graph
    start = time.perf_counter()
    saliency = _saliency(problem, graph, method)
    seconds = time.perf_counter() - start
    plan = without_lowest(graph.open_groups, saliency, reduction / 100, least=LEAST)
    small = prune(problem.model, graph, plan)
    before = bench.accuracy(small)
    after = bench.train(small, f"sosp-{method}-{reduction}")
    return {
        **bench.costs(plan),
        "criterion_seconds": round(seconds, 2),
        "dense_accuracy": bench.accuracy(problem.model),
        "accuracy_before": before,
        "accuracy": bench.accuracy(after),
        **bench.reported(after),
    }


def _time(blocks: int, width: int, method: str) -> Row:
    """Returns the seconds of a criterion on 256 random images."""
    torch.manual_seed(0)
    widths = (16 * width, 32 * width, 64 * width)
    model = ResNet(blocks, widths, 3, 10).eval()
    graph = trace(model, torch.randn(2, 3, 32, 32))
    batches = [(torch.randn(64, 3, 32, 32), torch.randint(10, (64,))) for _ in range(4)]
    problem = Problem(model, batches[0][0], batches, batches)
    start = time.perf_counter()
    _saliency(problem, graph, method)
    return {
        "structures": sum(group.size for group in graph.open_groups),
        "params": graph.cost().params,
        "criterion_seconds": round(time.perf_counter() - start, 2),
    }


def _widened(bench: Bench, method: str, reduction: float) -> Row:
    """Returns the row of a widened network, pruned to a share of the original's parameters."""
    problem, graph = bench.problem, bench.graph
    target = round((1 - reduction / 100) * graph.cost().params)
    wide = _widenings(bench)[method]()
    trained = bench.train(wide, f"wide-{method.replace(' ', '-')}", rate=0.1).cpu()
    own = trace(trained, problem.example_inputs)
    saliency = _saliency(replace(problem, model=trained), own, "sosp_h")
    plan = _to_params(own, saliency, target)
    small = prune(trained, own, plan)
    before = bench.accuracy(small)
    after = bench.train(small, f"wide-{method.replace(' ', '-')}-{reduction}")
    return {
        "params": own.cost(plan).params,
        "macs": own.cost(plan).macs,
        "wide_params": own.cost().params,
        "wide_accuracy": bench.accuracy(trained),
        "accuracy_before": before,
        "accuracy": bench.accuracy(after),
        **bench.reported(after, trained),
    }


def _widenings(bench: Bench) -> dict[str, Callable[[], nn.Module]]:
    """Returns, by name, what makes the untrained networks."""
    model, graph, seed = bench.problem.model, bench.graph, bench.seed

    def bottlenecks() -> nn.Module:
        saliency = _saliency(bench.problem, graph, "sosp_h")
        found = pressures(graph, select(graph, saliency, budget=0.5))
        tight = [each.group for each in found if each.bottleneck]
        return reset(widen(model, graph, tight, 2.0), seed)

    everywhere = [group.name for group in graph.open_groups]
    return {
        "original": lambda: reset(model, seed),
        "bottlenecks x2": bottlenecks,
        "uniform x1.1": lambda: reset(widen(model, graph, everywhere, 1.1), seed),
    }


def _to_params(graph: PruningGraph, saliency: dict[str, torch.Tensor], target: int) -> PruningPlan:
    """Returns the plan that removes the fewest structures for at most so many parameters."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        plan = without_lowest(graph.open_groups, saliency, middle, least=LEAST)
        low, high = (low, middle) if graph.cost(plan).params <= target else (middle, high)
    return without_lowest(graph.open_groups, saliency, high, least=LEAST)


if __name__ == "__main__":
    main()

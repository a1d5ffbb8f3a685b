"""The search beside one-shot pruning and beside itself without each of its parts.

    python -m paretoprune.experiments.benchmarks.search figures --data cifar10:DIR --weights FILE
    python -m paretoprune.experiments.benchmarks.search parts --data cifar10:DIR --weights FILE

`figures` searches for every FLOPs target with every seed (of the data splits and of the search)
and tests four networks, each chosen by its loss on the search split, once:

- `search`: the best of the search;
- `one-shot`: the best of all criteria, ranked globally and uniformly, with the same recovery;
- `recalibrated`: likewise, with BatchNorm recalibration as the only recovery;
- `fastnas`: ModelOpt's search, see `benchmarks.fastnas`, recalibrated on the same images.

The networks that a method finds for the targets are its front: a plot shows how its hypervolume
(of loss and MACs) grows with the wall time of one target after the other.

`parts` gives the whole search and searches that lack one part, or have another sampler, equally
many trials at one target, and writes how the best loss and the hypervolume (of loss and MACs)
grow with trials and time; `one-shot` are the plans that a search begins with, and no others.
One plan is evaluated at a time, so that the same command finds the same. Nothing is tested there.

Both go on where they were stopped: rows that are in the CSV are not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from paretoprune.criteria import CRITERIA, select
from paretoprune.experiments.benchmarks.device import described
from paretoprune.experiments.benchmarks.fastnas import fastnas
from paretoprune.experiments.benchmarks.rows import RESULTS, append, has, read
from paretoprune.experiments.benchmarks.search_plot import draw_fronts, draw_parts
from paretoprune.experiments.recipes import build_problem
from paretoprune.search import (
    Completed,
    ParetoFront,
    Problem,
    Record,
    SearchSpace,
    evaluate,
    search,
)
from paretoprune.search.damage import MUTATED, DamageModel
from paretoprune.search.evaluation import Evaluator
from paretoprune.search.ledger import Ledger
from paretoprune.search.loop import DEFAULTS, JOURNAL
from paretoprune.search.objectives import directions_of
from paretoprune.search.prepare import Prepared, Request, prepare
from paretoprune.search.searcher import Decisions, Searcher, run_inline
from paretoprune.search.study import Study
from paretoprune.surgery import (
    InfeasibleBudget,
    PruningGraph,
    PruningPlan,
    prune,
    recalibrate,
    trace,
)

SHOWN = (10, 20, 40, 60, 100, 200)
"""After so many trials `parts` writes a row."""
Row = dict[str, Any]
Change = Callable[[SearchSpace], SearchSpace]


def _whole(space: SearchSpace) -> SearchSpace:
    return space


@dataclass(frozen=True)
class Variant:
    """A search without one of its parts, or with another sampler.

    Attributes:
        sampler: By name.
        change: Of the space.
        seeds: Whether it begins with one-shot plans.
        only: Whether it ends with them.
        racing: Whether dominated candidates stop early.
        mutated: Chance that the damage model mutates a plan instead of drawing one.
    """

    sampler: str = "damage"
    change: Change = _whole
    seeds: bool = True
    only: bool = False
    racing: bool = False
    mutated: float = MUTATED


PARTS: Mapping[str, Variant] = MappingProxyType(
    {
        "search": Variant(),
        "with racing": Variant(racing=True),
        "without seeds": Variant(seeds=False),
        "without sparing streams": Variant(change=lambda space: replace(space, streams=())),
        "without offsets": Variant("random", lambda space: replace(space, ties={})),
        "without blocks": Variant(
            change=lambda space: replace(space, most_removed=0, block_saliencies={})
        ),
        "without mutations": Variant(mutated=0.0),
        "mutations alone": Variant(mutated=1.0),
        "tpe": Variant("tpe"),
        "nsga2": Variant("nsga2"),
        "gp": Variant("gp"),
        "random": Variant("random"),
        "random without seeds": Variant("random", seeds=False),
        "one-shot": Variant(only=True),
    }
)
"""What `parts` compares."""


def main() -> None:
    """Runs the benchmark with the arguments of this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("figures", "parts"))
    parser.add_argument("--recipe", default="resnet56-cifar10")
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--weights", required=True, help="trained weights, .safetensors")
    parser.add_argument("--flops", default="0.5,0.3,0.15", help="targets as fractions")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--methods", default=",".join(METHODS), help="of figures")
    parser.add_argument("--variants", default=",".join(PARTS), help="of parts")
    parser.add_argument("--cache", type=Path, default=Path("runs/.saliency"))
    parser.add_argument("--out", type=Path, help="default: experiments/results/search-WHAT.csv")
    options = parser.parse_args()
    out = options.out or RESULTS / f"search-{options.what}.csv"
    for seed in map(int, options.seeds.split(",")):
        problem = build_problem(
            options.recipe, data=options.data, weights=options.weights, seed=seed
        )
        for flops in map(float, options.flops.split(",")):
            same = {"network": options.recipe, "flops": flops, "seed": seed}
            if options.what == "figures":
                for method in options.methods.split(","):
                    if not has(out, {**same, "method": method}):
                        row = METHODS[method](problem, flops, options.trials, seed, options.cache)
                        append(out, [{**same, "method": method, **row, **described()}])
                continue
            for variant in options.variants.split(","):
                this = {**same, "variant": variant}
                if not has(out, this):
                    found = parts(problem, flops, options.trials, seed, options.cache, variant)
                    append(out, [{**this, **row, **described()} for row in found])
    draw = draw_parts if options.what == "parts" else draw_fronts
    draw(read(out), out.with_suffix(".png"))


def searched(problem: Problem, flops: float, trials: int, seed: int, cache: Path) -> Row:
    """Returns the row of the best of a search for a FLOPs target (a fraction)."""
    start = time.perf_counter()
    front = search(problem, flops, trials, seed=seed, saliency_dir=cache)
    best = front.best()
    assert best.plan is not None, "a record of the front has a plan"
    seconds = time.perf_counter() - start
    label = f"{best.candidate.criterion}, {best.candidate.allocation}, {best.origin}"
    graph = trace(problem.model, problem.example_inputs)
    network = Evaluator(problem, graph).final(best.plan, seed)
    return tested(problem, graph, label, best.plan, network, trials, seconds)


def one_shot(problem: Problem, flops: float, trials: int, seed: int, cache: Path) -> Row:
    """Returns the row of the best one-shot plan, reconstructed."""
    graph = trace(problem.model, problem.example_inputs)
    evaluator = Evaluator(problem, graph)
    return best_plan(
        problem,
        graph,
        flops,
        lambda plan: evaluator.network(plan, seed),
        lambda plan: evaluator.final(plan, seed),
    )


def recalibrated(problem: Problem, flops: float, trials: int, seed: int, cache: Path) -> Row:
    """Returns the row of the best one-shot plan with BatchNorm recalibration alone."""
    graph = trace(problem.model, problem.example_inputs)

    def build(plan: PruningPlan) -> nn.Module:
        small = prune(problem.model, graph, plan)
        return recalibrate(small, problem.recalibration or problem.calibration)

    return best_plan(problem, graph, flops, build, build)


def by_fastnas(problem: Problem, flops: float, trials: int, seed: int, cache: Path) -> Row:
    """Returns the row of the network of ModelOpt's FastNAS, recalibrated."""
    assert problem.test is not None, "CIFAR-10 has a test split"
    found, seconds = fastnas(problem, flops, cache.parent / f"fastnas-{problem.name}-{seed}.pth")
    network = recalibrate(found, problem.recalibration or problem.calibration)
    dense = trace(problem.model, problem.example_inputs).cost()
    small = trace(network, problem.example_inputs).cost()
    split = evaluate(network, problem.validation, problem.loss)
    return {
        "chosen": "FastNAS",
        "macs_ratio": round(small.macs / dense.macs, 4),
        "params_ratio": round(small.params / dense.params, 4),
        "removed_blocks": 0,
        "search_loss": round(split["loss"], 4),
        "search_accuracy": round(split["accuracy"], 4),
        "test_accuracy": round(evaluate(network, problem.test(), problem.loss)["accuracy"], 4),
        "candidates": "",
        "seconds": round(seconds),
    }


METHODS: Mapping[str, Callable[[Problem, float, int, int, Path], Row]] = MappingProxyType(
    {
        "search": searched,
        "one-shot": one_shot,
        "recalibrated": recalibrated,
        "fastnas": by_fastnas,
    }
)


def best_plan(
    problem: Problem,
    graph: PruningGraph,
    flops: float,
    build: Callable[[PruningPlan], nn.Module],
    final: Callable[[PruningPlan], nn.Module],
) -> Row:
    """Returns the row of the one-shot plan of the lowest loss on the search split."""
    start = time.perf_counter()
    plans = dict(one_shot_plans(problem, graph, flops))
    losses = {
        name: evaluate(build(plan), problem.validation, problem.loss)["loss"]
        for name, plan in plans.items()
    }
    name = min(losses, key=lambda name: losses[name])
    seconds = time.perf_counter() - start
    return tested(problem, graph, name, plans[name], final(plans[name]), len(plans), seconds)


def one_shot_plans(
    problem: Problem, graph: PruningGraph, flops: float
) -> Iterator[tuple[str, PruningPlan]]:
    """Yields a plan for every quick criterion and allocation that reaches the target."""
    for name in ("l1", "l2", "bn_scale", "taylor", "obs", "obs_per_mac"):
        saliency = CRITERIA[name]()(problem.model, graph, problem.calibration)
        for allocation in ("global", "uniform"):
            try:
                plan = select(graph, saliency, budget=flops, allocation=allocation)
            except InfeasibleBudget:
                continue
            yield f"{name}, {allocation}", plan


def tested(
    problem: Problem,
    graph: PruningGraph,
    chosen: str,
    plan: PruningPlan,
    network: nn.Module,
    candidates: int,
    seconds: float,
) -> Row:
    """Returns the row of a chosen plan; reads the test split."""
    assert problem.test is not None, "CIFAR-10 has a test split"
    split = evaluate(network, problem.validation, problem.loss)
    return {
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


def parts(
    problem: Problem, flops: float, trials: int, seed: int, saliency_dir: Path, variant: str
) -> Iterator[Row]:
    """Yields, for growing numbers of trials, what a variant of the search has found."""
    part = PARTS[variant]
    criteria = {name: CRITERIA[name]() for name in DEFAULTS["optuna"]}
    request = Request(flops, trials, criteria, ("loss", "macs"), saliency_dir)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(
            Path(folder) / JOURNAL,
            directions_of(request.objectives),
            sampler=part.sampler,
            seed=seed,
            trials=trials,
        )
        try:
            prepared = prepare(problem, request, Path(folder), study)
            prepared = replace(prepared, space=part.change(prepared.space))
            timed = run(problem, prepared, study, part, trials, seed, Path(folder))
        finally:
            study.close()
    dense = prepared.graph.cost().macs
    records = [record for record, _ in timed]
    shown = [count for count in SHOWN if count < len(timed)]
    for count in [*shown, len(timed)]:
        front = ParetoFront.of(records[:count], prepared.info.objectives)
        losses = [
            record.outcome.metrics["loss"]
            for record in records[:count]
            if isinstance(record.outcome, Completed)
            and record.candidate.budget > 0.99 * prepared.info.target / dense
        ]
        yield {
            "trials": count,
            "seconds": round(timed[count - 1][1], 1),
            "best_loss": round(min(losses), 4),
            "hypervolume": round(front.hypervolume, 5),
        }


def run(
    problem: Problem,
    prepared: Prepared,
    study: Study,
    part: Variant,
    trials: int,
    seed: int,
    folder: Path,
) -> list[tuple[Record, float]]:
    """Returns the records of a search as they came, each with the seconds since its start."""
    start = time.perf_counter()
    timed: list[tuple[Record, float]] = []
    history: list[Record] = []

    def finished(record: Record) -> None:
        timed.append((record, time.perf_counter() - start))
        history.append(record)

    space = prepared.space
    decide = space.fixed
    if part.sampler == "damage":
        model = DamageModel(space, prepared.graph, prepared.saliencies, seed, mutated=part.mutated)
        decide = partial(model, history)
    seeds = space.seeds(3 * trials if part.only else trials)[:trials] if part.seeds else []
    study.begin(seeds, prepared.info.target, decide)
    searcher = Searcher(
        study,
        Decisions(space.suggest, prepared.decode),
        len(seeds) if part.only else trials,
        seed,
        finished,
        racing=part.racing,
    )
    run_inline(searcher, Evaluator(problem, prepared.graph), Ledger(folder / "evals"))
    return timed


if __name__ == "__main__":
    main()

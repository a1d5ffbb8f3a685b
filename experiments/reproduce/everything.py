"""Pruning Everything (arXiv:2506.04513): its loop beside the search, layers only, neurons only.

    python -m paretoprune.experiments.reproduce.everything --networks resnet56

Every method ends with a network of at most the FLOPs that the reduction leaves, and all of them
train on as many batches: what `greedy` spends on the recovery of its candidates, the others add to
the epochs of their fine-tuning, which distils from the dense network where the method says so.

- `greedy`: the loop, `--recovery` epochs for each candidate, then fine-tuning;
- `search`: the best of `--trials` trials, fine-tuned; `search distilled`: with distillation;
- `layers`: as many blocks as it takes, lowest KL divergence first; `neurons`: units alone;
  `half the layers distilled`: half of the blocks, lowest first, then units; such a network trains
  faster than one of as many MACs in twice as many blocks.

With `--draws`, later epochs take the batches of the first ones again, in turn, so that the dense
network is asked once about each: an epoch that is distilled costs little more than a plain one.

Minutes on two cores: `--networks resnet20 --reductions 50 --epochs 1 --images 2000
--test-images 1000 --recovery 0 --trials 12 --criterion l2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from paretoprune.criteria import CRITERIA, SharedCalibration, block_saliency, select
from paretoprune.criteria.blocks import inner_units
from paretoprune.experiments.finetuning import FineTuner
from paretoprune.experiments.reproduce.common import (
    RESULTS,
    Bench,
    Results,
    Row,
    benches,
    names,
    numbers,
)
from paretoprune.experiments.reproduce.common import parser as base_parser
from paretoprune.experiments.reproduce.reported import COLUMNS
from paretoprune.experiments.training import Training
from paretoprune.search import Completed, Finetuning, ParetoFront, Record, read_run, search
from paretoprune.search.evaluation import Evaluator, Moved, on_device
from paretoprune.search.metrics import device_of
from paretoprune.search.weights import FINETUNED, Weights, trained_weights
from paretoprune.surgery import InfeasibleBudget, PruningGraph, PruningPlan

EPOCHS = 200
RECOVERY = 10


def main(arguments: list[str] | None = None) -> None:
    """Measures the rows that the arguments ask for."""
    made = base_parser(
        __doc__,
        networks="resnet56",
        reductions="53.70,62.79,72.67,79.88,86.37",
        epochs=EPOCHS,
    )
    made.add_argument("--recovery", type=int, default=RECOVERY, help="epochs per candidate")
    made.add_argument("--trials", type=int, default=300)
    made.add_argument("--criterion", default="kl", help="ranks layers and neurons")
    made.add_argument("--workers", type=int, help="evaluations at a time; 0 without Ray")
    made.add_argument("--draws", type=int, default=0, help="epochs after which batches recur")
    made.add_argument("--methods", default=",".join(METHODS))
    options = made.parse_args(arguments)
    keys = ("network", "method", "reduction", "seed", "recovery", "trials", "criterion", "draws")
    out = options.out or RESULTS / "everything.csv"
    results = Results(out, keys, options.report)
    for bench in benches(options):
        for reduction in numbers(options.reductions):
            for row, method in _rows(bench, reduction, results):
                results.measure(row, method, bench.reused)


def _rows(
    bench: Bench, reduction: float, results: Results
) -> Iterator[tuple[Row, Callable[[], Row]]]:
    options = bench.options
    for method in names(options.methods):
        row: Row = {
            **bench.keys,
            "method": method,
            "reduction": reduction,
            "recovery": options.recovery,
            "trials": options.trials,
            "criterion": options.criterion,
            "draws": options.draws,
        }
        row["full"] = row["full"] and options.recovery >= RECOVERY
        epochs = options.epochs
        if method != "greedy":
            done = results.find({**row, "method": "greedy"})
            epochs = int(done["epochs_total"]) if done else epochs + _recovery(bench, reduction)
        yield row, partial(METHODS[method], bench, reduction, epochs)


def _recovery(bench: Bench, reduction: float) -> int:
    """Returns about how many epochs the loop spends on recovery: a block leaves per step."""
    share = 1 / max(1, len(bench.graph.blocks))
    return 2 * int(bench.options.recovery) * math.ceil(reduction / 100 / share)


def _folder(bench: Bench, name: str) -> Path:
    options = bench.options
    scale = f"{options.recovery}-{options.trials}-{options.criterion}-{options.draws}"
    return bench.file(f"{name}-{scale}").with_suffix("")


def _searched(
    bench: Bench, reduction: float, strategy: str, name: str, epochs: int, distil: bool
) -> Row:
    """Returns the row of a search with its fine-tuning."""
    options, problem = bench.options, bench.problem
    greedy = strategy == "everything"
    training = Training(
        epochs=1, learning_rate=options.learning_rate, warmup=0.05, draws=options.draws
    )
    finetuning = Finetuning(
        FineTuner.of(problem, distil=distil, training=training),
        epochs=epochs,
        top=1,
        recovery=options.recovery if greedy else 0,
    )
    folder = _folder(bench, f"{name}-{reduction}-{epochs}")
    front = search(
        problem,
        1 - reduction / 100,
        10_000 if greedy else options.trials,
        strategy=strategy,
        criteria=(options.criterion,) if greedy else None,
        finetuning=finetuning,
        seed=bench.seed,
        workers=options.workers,
        run_dir=folder,
        saliency_dir=options.work / ".saliency",
    )
    best = _finetuned(front)
    spent = int(best.finetuned_metrics["epochs"])
    if greedy:
        spent += options.recovery * len(read_run(folder).records)
    return _found(bench, best, Weights.of_run(folder), spent)


def _finetuned(front: ParetoFront) -> Record:
    """Returns the record that was fine-tuned; the rows have its network even if it got worse."""
    for record in front.records:
        if isinstance(record.finetuned, Completed):
            return record
    raise RuntimeError("no record was fine-tuned: see why in the log of the search.")


def _found(bench: Bench, best: Record, weights: Weights, epochs: int) -> Row:
    assert best.plan is not None
    problem, graph = bench.problem, bench.graph
    kind = trained_weights(replace(best, finetuned=None))
    if kind is None:
        before = Evaluator(problem, graph).final(best.plan, bench.seed)
    else:
        before = weights.network(problem.model, graph, best.plan, kind)
    after = weights.network(problem.model, graph, best.plan, FINETUNED)
    return _measured(bench, best.plan, before, after, epochs)


def _measured(
    bench: Bench, plan: PruningPlan, before: nn.Module, after: nn.Module, epochs: int
) -> Row:
    return {
        **bench.costs(plan),
        "epochs_total": epochs,
        "dense_accuracy": bench.accuracy(bench.problem.model),
        "accuracy_before": bench.accuracy(before),
        "accuracy": bench.accuracy(after),
        **bench.reported(after),
    }


def _one_shot(
    bench: Bench, reduction: float, epochs: int, *, name: str, planned: _Planned, distil: bool
) -> Row:
    """Returns the row of a plan that one ranking of the dense network gives."""
    try:
        plan = planned(_Ranking.of(bench), 1 - reduction / 100)
    except InfeasibleBudget:  # layers alone reach no more than their sum
        none = dict.fromkeys(("macs_reduction", "params_reduction", "removed_blocks"), "")
        dense = bench.accuracy(bench.problem.model)
        return {
            **none,
            "epochs_total": 0,
            "dense_accuracy": dense,
            "accuracy_before": "",
            "accuracy": "unreachable",
            **dict.fromkeys(COLUMNS, ""),
        }
    before = Evaluator(bench.problem, bench.graph).final(plan, bench.seed)
    options = bench.options
    after = bench.train(
        before,
        f"{name}-{reduction}-{epochs}-{options.criterion}-{options.draws}",
        epochs=epochs,
        teacher=bench.problem.model if distil else None,
        draws=options.draws,
    )
    return _measured(bench, plan, before, after, epochs)


@dataclass(frozen=True)
class _Ranking:
    """What one look at the dense network says.

    Attributes:
        graph: Of the network.
        saliency: By group name, shape (group.size,).
        blocks: Those that can leave, lowest saliency first.
    """

    graph: PruningGraph
    saliency: Mapping[str, Tensor]
    blocks: list[str]

    @staticmethod
    def of(bench: Bench) -> _Ranking:
        problem, graph = bench.problem, bench.graph
        model = on_device(problem.model)
        criterion = CRITERIA[bench.options.criterion]()
        calibration = SharedCalibration(Moved(problem.calibration, device_of(model)), problem.loss)
        saliency = criterion(model, graph, calibration)
        blocks = block_saliency(criterion, saliency, model, graph, calibration)
        order = sorted(blocks, key=lambda name: blocks[name] * inner_units(graph, name))
        return _Ranking(graph, saliency, order)


_Planned = Callable[[_Ranking, float], PruningPlan]
"""(ranking, fraction of the MACs to keep) -> plan; raises InfeasibleBudget."""


def _layers(ranking: _Ranking, budget: float) -> PruningPlan:
    graph, order = ranking.graph, ranking.blocks
    for count in range(1, len(order) + 1):
        plan = PruningPlan(removed=tuple(order[:count]))
        if graph.cost(plan).macs <= budget * graph.cost().macs:
            return plan
    raise InfeasibleBudget(f"layers alone do not reach {budget:.2%} of the MACs.")


def _neurons(ranking: _Ranking, budget: float) -> PruningPlan:
    return select(ranking.graph, ranking.saliency, budget=budget)


def _half(ranking: _Ranking, budget: float) -> PruningPlan:
    half = tuple(ranking.blocks[: (len(ranking.blocks) + 1) // 2])
    return select(ranking.graph, ranking.saliency, budget=budget, removed=half)


def _greedy(bench: Bench, reduction: float, epochs: int) -> Row:
    return _searched(bench, reduction, "everything", "greedy", epochs, distil=False)


def _search(bench: Bench, reduction: float, epochs: int) -> Row:
    return _searched(bench, reduction, "optuna", "search", epochs, distil=False)


def _distilled(bench: Bench, reduction: float, epochs: int) -> Row:
    return _searched(bench, reduction, "optuna", "distilled", epochs, distil=True)


METHODS: dict[str, Callable[[Bench, float, int], Row]] = {
    "greedy": _greedy,
    "search": _search,
    "search distilled": _distilled,
    "layers": partial(_one_shot, name="layers", planned=_layers, distil=False),
    "neurons": partial(_one_shot, name="neurons", planned=_neurons, distil=False),
    "half the layers distilled": partial(_one_shot, name="half", planned=_half, distil=True),
}

if __name__ == "__main__":
    main()

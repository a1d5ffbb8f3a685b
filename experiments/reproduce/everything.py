"""Pruning Everything (arXiv:2506.04513): its loop beside the search, layers only, neurons only.

    python -m paretoprune.experiments.reproduce.everything --networks resnet56

Every method ends with a network of at most the FLOPs that the reduction leaves, and all of them
train on as many batches: what `greedy` spends on the recovery of its candidates, the others add to
the epochs of their fine-tuning, which distils from the dense network where the method says so.

- `greedy`: the loop, `--recovery` epochs for each candidate, then fine-tuning;
- `search`: the best of `--trials` trials, fine-tuned; `search distilled`: with distillation;
  `search distilled again`: what that ended with, for `--again` epochs more from a lower peak (a
  warm restart: Loshchilov & Hutter, ICLR 2017, arXiv:1608.03983), so that a row can be taken
  further without what it has cost; from the same peak, the loss is back where it was after a
  quarter of the epochs;
- `layers`: as many blocks as it takes, lowest KL divergence first; `neurons`: units alone;
  `half the layers distilled`: half of the blocks, lowest first, then units; such a network trains
  faster than one of as many MACs in twice as many blocks.

With `--draws`, later epochs take the batches of the first ones again, in turn, so that the dense
network is asked once about each: an epoch that is distilled costs little more than a plain one.
In `search distilled again`, that holds for the epochs of `--again` and for none before; `--mixup`,
which excludes `--draws`, is for these epochs alone, too.

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
from paretoprune.experiments.benchmarks.rows import RESULTS
from paretoprune.experiments.finetuning import FINETUNING, FineTuner
from paretoprune.experiments.reproduce.common import (
    Bench,
    Results,
    Row,
    benches,
    numbers,
)
from paretoprune.experiments.reproduce.common import parser as base_parser
from paretoprune.experiments.reproduce.reported import COLUMNS
from paretoprune.experiments.training import Training
from paretoprune.experiments.units import names
from paretoprune.search import Completed, Finetuning, ParetoFront, Record, read_run, search
from paretoprune.search.evaluation import Evaluator, Moved, on_device
from paretoprune.search.metrics import device_of
from paretoprune.search.weights import FINETUNED, Weights, trained_weights
from paretoprune.surgery import InfeasibleBudget, PruningGraph, PruningPlan

EPOCHS = 200
RECOVERY = 10
AGAIN = "search distilled again"
KEYS = (
    "network", "method", "reduction", "seed", "recovery", "trials", "criterion", "draws", "again",
    "mixup",
)  # fmt: skip


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
    made.add_argument("--again", type=int, default=0, help="epochs of `search distilled again`")
    made.add_argument("--mixup", type=float, default=0.0, help="of these epochs; 0 mixes nothing")
    made.add_argument("--methods", help="with commas; by default all that need no `--again`")
    options = made.parse_args(arguments)
    unasked = () if options.again else (AGAIN,)
    options.methods = options.methods or ",".join(name for name in METHODS if name not in unasked)
    if not options.again and AGAIN in names(options.methods):
        made.error(f"the method {AGAIN!r} needs its epochs: give --again, at least 1.")
    if options.mixup and (options.draws or not options.again):
        made.error("--mixup is for the epochs of --again, where batches do not recur (--draws 0).")
    out = options.out or RESULTS / "everything.csv"
    results = Results(out, KEYS, options.report)
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
            "again": options.again if method == AGAIN else 0,
            "mixup": options.mixup if method == AGAIN else 0.0,
        }
        row["full"] = row["full"] and options.recovery >= RECOVERY
        epochs = options.epochs
        if method != "greedy":
            done = results.find({**row, "method": "greedy", "again": 0, "mixup": 0.0})
            epochs = int(done["epochs_total"]) if done else epochs + _recovery(bench, reduction)
        yield row, partial(METHODS[method], bench, reduction, epochs)


def _recovery(bench: Bench, reduction: float) -> int:
    """Returns about how many epochs the loop spends on recovery: a block leaves per step."""
    share = 1 / max(1, len(bench.graph.blocks))
    return 2 * int(bench.options.recovery) * math.ceil(reduction / 100 / share)


def _folder(bench: Bench, name: str, draws: int) -> Path:
    options = bench.options
    scale = f"{options.recovery}-{options.trials}-{options.criterion}-{draws}"
    return bench.file(f"{name}-{scale}").with_suffix("")


@dataclass(frozen=True)
class _Ended:
    """What a search ended with.

    Attributes:
        best: The record that was fine-tuned.
        weights: Of the run.
        epochs: All that were trained.
    """

    best: Record
    weights: Weights
    epochs: int

    @property
    def plan(self) -> PruningPlan:
        assert self.best.plan is not None
        return self.best.plan

    def before(self, bench: Bench) -> nn.Module:
        """Returns the network that was fine-tuned, without that."""
        kind = trained_weights(replace(self.best, finetuned=None))
        if kind is None:
            return Evaluator(bench.problem, bench.graph).final(self.plan, bench.seed)
        return self.weights.network(bench.problem.model, bench.graph, self.plan, kind)

    def after(self, bench: Bench) -> nn.Module:
        """Returns the fine-tuned network."""
        return self.weights.network(bench.problem.model, bench.graph, self.plan, FINETUNED)


def _ended(
    bench: Bench, reduction: float, strategy: str, name: str, epochs: int, distil: bool, draws: int
) -> _Ended:
    """Returns what a search with its fine-tuning ends with."""
    options, problem = bench.options, bench.problem
    greedy = strategy == "everything"
    training = Training(epochs=1, learning_rate=options.learning_rate, warmup=0.05, draws=draws)
    finetuning = Finetuning(
        FineTuner.of(problem, distil=distil, training=training),
        epochs=epochs,
        top=1,
        recovery=options.recovery if greedy else 0,
    )
    folder = _folder(bench, f"{name}-{reduction}-{epochs}", draws)
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
    return _Ended(best, Weights.of_run(folder), spent)


def _finetuned(front: ParetoFront) -> Record:
    """Returns the record that was fine-tuned; the rows have its network even if it got worse."""
    for record in front.records:
        if isinstance(record.finetuned, Completed):
            return record
    raise RuntimeError("no record was fine-tuned: see why in the log of the search.")


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


def _searched(
    bench: Bench, reduction: float, epochs: int, *, strategy: str, name: str, distil: bool
) -> Row:
    """Returns the row of a search with its fine-tuning."""
    ended = _ended(bench, reduction, strategy, name, epochs, distil, bench.options.draws)
    return _measured(bench, ended.plan, ended.before(bench), ended.after(bench), ended.epochs)


def _again(bench: Bench, reduction: float, epochs: int) -> Row:
    ended = _ended(bench, reduction, "optuna", "distilled", epochs, distil=True, draws=0)
    options = bench.options
    after = bench.train(
        ended.after(bench),
        f"again-{reduction}-{epochs}-{options.trials}-{options.again}-{options.draws}"
        f"-{options.mixup}",
        rate=FINETUNING.learning_rate,
        epochs=options.again,
        teacher=bench.problem.model,
        draws=options.draws,
        mixup=options.mixup,
    )
    spent = ended.epochs + options.again
    return _measured(bench, ended.plan, ended.before(bench), after, spent)


METHODS: dict[str, Callable[[Bench, float, int], Row]] = {
    "greedy": partial(_searched, strategy="everything", name="greedy", distil=False),
    "search": partial(_searched, strategy="optuna", name="search", distil=False),
    "search distilled": partial(_searched, strategy="optuna", name="distilled", distil=True),
    AGAIN: _again,
    "layers": partial(_one_shot, name="layers", planned=_layers, distil=False),
    "neurons": partial(_one_shot, name="neurons", planned=_neurons, distil=False),
    "half the layers distilled": partial(_one_shot, name="half", planned=_half, distil=True),
}

if __name__ == "__main__":
    main()

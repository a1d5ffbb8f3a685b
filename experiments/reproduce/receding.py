"""Receding Neuron Importances (arXiv:2204.06404): trained from scratch, pruned once, fine-tuned.

    python -m paretoprune.experiments.reproduce.receding --networks vgg16,resnet56

Three trainings of as many epochs: bounded scales with the receding penalty (`receding`), BatchNorm
with an L1 penalty on its scales (`l1`), and BatchNorm alone (`plain`, the same share of every
layer). The reduction is that of prunable filters, as in the paper: those of all layers of VGG-16,
those of the first layer of every block of a ResNet; every layer keeps three. Scales begin as in
the authors' code: bounded ones at the sigmoid of a standard normal draw, the others at 0.5;
weights decay alike. Accuracies are those of the last epoch, and not of the best one on the test
split.

Minutes on two cores: `--networks resnet20 --epochs 1 --images 2000 --test-images 1000`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from paretoprune.criteria import CRITERIA
from paretoprune.criteria.bottlenecks import reset
from paretoprune.criteria.receding import Receding, recede
from paretoprune.experiments.benchmarks.rows import RESULTS
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
from paretoprune.surgery import PruningPlan, prune

EPOCHS = 160
RATE = 0.1
DECAY = 1e-4
SCALE = 0.5
"""Where the scales of ordinary BatchNorm begin."""
LEAST = 3
METHODS = ("receding", "l1", "plain")
PENALTIES = {"vgg16": (1e-3, 3.0, 1e-4), "resnet": (1e-4, 0.0, 1e-5)}
"""Strength and offset of the receding penalty, strength of L1; the authors'."""


def main(arguments: list[str] | None = None) -> None:
    """Measures the rows that the arguments ask for."""
    made = base_parser(__doc__, networks="vgg16,resnet56", reductions="0,50,90", epochs=EPOCHS)
    made.add_argument("--methods", default=",".join(METHODS))
    options = made.parse_args(arguments)
    results = Results(
        options.out or RESULTS / "receding.csv",
        ("network", "method", "reduction", "seed"),
        options.report,
    )
    for bench in benches(options, trained=False):
        for method in names(options.methods):
            for reduction in numbers(options.reductions):
                row = {**bench.keys, "learning_rate": RATE, "method": method}
                row["reduction"] = reduction
                measured = partial(_measure, bench, method, reduction)
                results.measure(row, measured, bench.reused)


def _measure(bench: Bench, method: str, reduction: float) -> Row:
    dense = _trained(bench, method)
    accuracy = bench.accuracy(dense)
    if not reduction:
        nothing = bench.costs(PruningPlan())
        same = bench.reported(dense, dense)
        return {**nothing, "accuracy_before": accuracy, "accuracy": accuracy, **same}
    plan = _plan(bench, dense, reduction / 100, each=method == "plain")
    dense = dense.cpu()
    small = prune(dense, bench.graph, plan)
    before = bench.accuracy(small)
    name = f"receding-{method}-{reduction}"
    after = bench.train(small, name, rate=RATE, decay=DECAY)
    return {
        **bench.costs(plan),
        "accuracy_before": before,
        "accuracy": bench.accuracy(after),
        **bench.reported(after, dense),
    }


def _trained(bench: Bench, method: str) -> nn.Module:
    """Returns the dense network after its training from scratch."""
    model = _fresh(bench, bounded=method == "receding")
    strength, offset, l1 = PENALTIES.get(bench.network, PENALTIES["resnet"])
    if method != "receding":
        penalty = partial(_l1, strength=l1) if method == "l1" else None
        return bench.train(model, f"{method}-dense", rate=RATE, decay=DECAY, penalty=penalty)
    settings = Receding(
        epochs=bench.options.epochs,
        strength=strength,
        offset=offset,
        learning_rate=RATE,
        weight_decay=DECAY,
        seed=bench.seed,
    )
    made = partial(recede, loss=bench.problem.loss, settings=settings)
    return bench.kept(model, "receding-dense", made)


def _fresh(bench: Bench, *, bounded: bool) -> nn.Module:
    """Returns the architecture with new weights, and scales as they begin."""
    network = reset(bench.problem.model, bench.seed).eval()
    generator = torch.Generator().manual_seed(bench.seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                drawn = torch.randn(module.num_features, generator=generator).sigmoid()
                module.weight.copy_(drawn if bounded else torch.full_like(drawn, SCALE))
    return network


def _l1(network: nn.Module, strength: float) -> Tensor:
    scales = [m.weight.abs().sum() for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    return strength * torch.stack(scales).sum()


def _plan(bench: Bench, dense: nn.Module, share: float, *, each: bool) -> PruningPlan:
    """Returns the plan without the filters of smallest scale, in all layers or in each alike."""
    graph = bench.graph
    saliency = CRITERIA["bn_scale"]()(dense, graph, [])
    inner = [group for group in graph.open_groups if group.name.endswith(".conv1")]
    groups = inner or graph.open_groups
    return without_lowest(groups, saliency, share, least=LEAST, each=each)


if __name__ == "__main__":
    main()

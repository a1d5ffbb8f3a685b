"""Surgery beside Torch-Pruning: time to trace, to price a plan and to build a candidate.

    pip install 'paretoprune[benchmark]'
    python -m paretoprune.experiments.benchmarks.surgery

For every network, in one process and in turns: a `torch.export` call and our whole `trace`; the
price of a plan; building a candidate that lost half of every group, and copying just the
parameters that survive in it, or the module it is; and the same candidate by Torch-Pruning, which
copies the dense network, builds its dependency graph and prunes group by group. Medians over the
repetitions.
Where Torch-Pruning raises, does not finish, or its network computes something else, the row says
so.
"""

from __future__ import annotations

import argparse
import copy
import signal
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.experiments.benchmarks.device import described
from paretoprune.experiments.benchmarks.rows import RESULTS, append
from paretoprune.surgery import PruningGraph, PruningPlan, prune, trace
from paretoprune.surgery.check import masked_outputs, telling_copy
from paretoprune.surgery.export import export_program

MODELS = (
    "resnet50", "mobilenet_v2", "vgg16_bn", "densenet121", "efficientnet_b0", "convnext_tiny",
    "vit_b_16", "regnet_y_400mf", "swin_t",
)  # fmt: skip
LIMIT = 100
"""Seconds that Torch-Pruning may take for one candidate."""
Row = dict[str, Any]


def main() -> None:
    """Runs the benchmark with the arguments of this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "surgery.csv")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.out.unlink(missing_ok=True)
    for name in options.models.split(","):
        row = {"model": name, **measure(name, options.repeats), **described(on_cpu=True)}
        print(row, flush=True)
        append(options.out, [row])


def measure(name: str, repeats: int) -> Row:
    """Returns the row of a model of torchvision at 224x224, batch 1."""
    from torchvision import models

    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    images = torch.randn(1, 3, 224, 224)
    graph = trace(model, images)
    plan = equal_plan(graph)
    exports, traces, builds, copies, modules, theirs = [], [], [], [], [], []
    said = ""
    for _ in range(repeats):
        exports.append(seconds(lambda: export_program(model, images)))
        traces.append(seconds(lambda: trace(model, images)))
        builds.append(seconds(lambda: prune(model, graph, plan)))
        small = prune(model, graph, plan)
        left = list(small.parameters())
        modules.append(seconds(lambda small=small: copy.deepcopy(small)))  # type: ignore[misc]
        copies.append(seconds(lambda left=left: [p.detach().clone() for p in left]))  # type: ignore[misc]
        if not said:
            start = time.perf_counter()
            said, _ = by_torch_pruning(model, graph, plan, images)
            theirs.append(time.perf_counter() - start)
    if not said:
        said = difference(model, graph, plan, images)
    prices = [seconds(lambda: graph.cost(plan)) for _ in range(50 * repeats)]
    trace_ms, export_ms = median_ms(traces), median_ms(exports)
    build_ms, copy_ms, their_ms = median_ms(builds), median_ms(copies), median_ms(theirs)
    ours = build_ms + median_ms(prices)
    return {
        "macs_left": round(graph.cost(plan).macs / graph.cost().macs, 3),
        "export_ms": export_ms,
        "trace_ms": trace_ms,
        "trace_over_export": round(trace_ms / export_ms, 2),
        "price_us": round(1000 * median_ms(prices), 1),
        "build_ms": build_ms,
        "copy_ms": copy_ms,
        "deepcopy_ms": median_ms(modules),
        "build_over_copy": round(build_ms / copy_ms, 2),
        "torch_pruning_ms": their_ms,
        "times_faster": round(their_ms / ours, 1),
        "torch_pruning_said": said or "same outputs",
        "repeats": repeats,
    }


def seconds(work: Callable[[], object]) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_ms(times: list[float]) -> float:
    """Returns the median in milliseconds."""
    return round(1000 * statistics.median(times), 4)


def equal_plan(graph: PruningGraph) -> PruningPlan:
    """Returns a plan that both tools can follow: half of every group of single channels."""
    kept = {}
    for group in graph.open_groups:
        made = next(item for item in group.slices if item.axis == 0)
        if len(made.indices[0]) == 1 and group.size > 1:
            kept[group.name] = tuple(range(0, group.size, 2))
    return PruningPlan(kept)


def by_torch_pruning(
    model: nn.Module, graph: PruningGraph, plan: PruningPlan, images: Tensor
) -> tuple[str, nn.Module | None]:
    """Returns what Torch-Pruning says against a plan, empty if nothing, and its network."""
    import torch_pruning as tp

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LIMIT)
    try:
        network = copy.deepcopy(model)
        dependencies = tp.DependencyGraph().build_dependency(network, example_inputs=images)
        layers = dict(network.named_modules())
        for name, kept in plan.kept.items():
            group = graph.groups[name]
            made = next(
                item
                for item in group.slices
                if item.axis == 0 and isinstance(layer(layers, item.parameter), PRUNABLE)
            )
            gone = sorted(
                {i for unit in made.indices for i in unit}
                - {i for unit in kept for i in made.indices[unit]}
            )
            target: Any = layer(layers, made.parameter)
            act = (
                tp.prune_linear_out_channels
                if isinstance(target, nn.Linear)
                else tp.prune_conv_out_channels
            )
            dependencies.get_pruning_group(target, act, idxs=gone).prune()
        return "", network
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}", None
    finally:
        signal.alarm(0)


def give_up(*_: object) -> None:
    """Ends a call that takes too long."""
    raise TimeoutError(f"not finished after {LIMIT} s")


PRUNABLE = (nn.Conv2d, nn.Linear)


def layer(layers: dict[str, nn.Module], parameter: str) -> nn.Module | None:
    """Returns the layer that owns a parameter."""
    return layers.get(parameter.rpartition(".")[0])


def difference(model: nn.Module, graph: PruningGraph, plan: PruningPlan, images: Tensor) -> str:
    """Returns in one line whether Torch-Pruning's network computes what the masked one does."""
    dense = telling_copy(model)
    said, network = by_torch_pruning(dense, graph, plan, images)
    if network is None:
        return said
    with torch.no_grad():
        (expected,) = masked_outputs(dense, graph, plan, images)
        try:
            actual = network(images)
        except Exception as error:
            return f"its network raises {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    error_ = ((expected - actual).abs().max() / expected.abs().max()).item()
    return "" if error_ < 1e-3 else f"its outputs differ by {error_:.1e}"


if __name__ == "__main__":
    main()

"""Criteria one-shot on ResNet-56 / CIFAR-10 at equal FLOPs, beside Torch-Pruning's; their cost.

    python -m paretoprune.experiments.benchmarks.criteria --data cifar10:DIR --weights FILE

Every criterion ranks globally, at every target, without fine-tuning; three seeds of our random
one. Our networks are measured as surgery leaves them, recalibrated, and reconstructed;
Torch-Pruning's (`pip install paretoprune[benchmark]`) as they are and recalibrated on the same
images. Ours may prune the residual stream, too; theirs prunes inner channels only, which is its
better way (it cannot trace the shortcuts otherwise). 1,000 images of the search split are read for
reconstructed rows, so that the best one can be chosen without the test split, of which every row
says how many images it was read on: `--images`, and a quarter of them without recovery.

Rows are appended to experiments/results/criteria.csv; those that are there are not measured again.
`--costs` measures what the gradient-based criteria cost instead.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA, Criterion, SharedCalibration
from paretoprune.criteria.random import Random
from paretoprune.experiments.benchmarks.device import described
from paretoprune.experiments.benchmarks.rows import RESULTS, append, first_batches, read
from paretoprune.experiments.comparison import RECOVERIES, Comparison, Ranking, Shot
from paretoprune.experiments.models import ResNet, resnet20, resnet56
from paretoprune.experiments.recipes import build_problem
from paretoprune.experiments.showing.comparison_plot import comparison_png
from paretoprune.search import Problem, evaluate
from paretoprune.search.problem import Batch
from paretoprune.surgery import PruningGraph, recalibrate, trace

SEEDS = (0, 1, 2)
SEARCHED = 1000
"""Images of the search split that are read."""
PEERS = ("random", "l2", "bn_scale", "lamp", "fpgm", "taylor", "hessian (bug fixed)")
Row = dict[str, Any]


def main() -> None:
    """Runs the benchmark with the arguments of this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", help="cifar10:DIR")
    parser.add_argument("--weights", help="trained weights, .safetensors")
    parser.add_argument("--flops", default="0.7,0.5,0.3,0.15", help="targets as fractions")
    parser.add_argument("--criteria", help="only these of ours")
    parser.add_argument("--peers", help="only these of Torch-Pruning; '' leaves it out")
    parser.add_argument("--cache", type=Path, default=Path("runs/.saliency"))
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--blocks", action="store_true", help="rank blocks with units, too")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.costs:
        append(options.out or RESULTS / "criteria-costs.csv", costs())
        return
    out = options.out or RESULTS / "criteria.csv"
    targets = [float(text) for text in options.flops.split(",")]
    problem = build_problem("resnet56-cifar10", data=options.data, weights=options.weights)
    done = {(row["tool"], row["criterion"], row["seed"]) for row in read(out)}
    names = list(CRITERIA) if options.criteria is None else options.criteria.split(",")
    criteria: dict[str, Criterion] = {}
    for name in filter(None, names):
        for seed in SEEDS if name == "random" else (0,):
            if ("paretoprune", name, str(seed)) not in done:
                label = f"random {seed}" if name == "random" else name
                criteria[label] = Random(seed) if name == "random" else CRITERIA[name]()
    if criteria:
        graph = trace(problem.model, problem.example_inputs)
        start = time.perf_counter()
        comparison = Comparison(problem, graph, criteria, options.cache)
        print(f"saliencies in {time.perf_counter() - start:.1f} s", flush=True)
        for label in criteria:
            append(out, ours(comparison, label, targets, options.images, options.blocks))
    peers = PEERS if options.peers is None else options.peers.split(",")
    for name in filter(None, peers):
        if ("torch-pruning", name, "0") not in done:
            append(out, theirs(problem, name, targets, options.images))
    draw(read(out), out.with_suffix(".png"))


def ours(
    comparison: Comparison, label: str, targets: list[float], images: int, blocks: bool
) -> Iterator[Row]:
    """Yields a row per target, ranking and recovery of one of our criteria."""
    problem = comparison.problem
    assert problem.test is not None, "CIFAR-10 has a test split"
    test = first_batches(problem.test(), images)
    few = first_batches(test, images // 4)
    only: dict[str, Any] = {"criteria": (label,)}
    searched = {
        shot.target: shot.loss
        for shot in comparison.shots(
            targets,
            recoveries=("reconstructed",),
            split=first_batches(problem.validation, SEARCHED),
            **only,
        )
    }
    name, _, seed = label.partition(" ")
    rankings: tuple[Ranking, ...] = ("units", "units and blocks") if blocks else ("units",)
    for recoveries, split in ((("plain",), few), (RECOVERIES[1:], test)):
        for shot in comparison.shots(
            targets, rankings=rankings, recoveries=recoveries, split=split, **only
        ):
            best = shot.recovery == "reconstructed" and shot.ranking == "units"
            loss = searched[shot.target] if best else None
            shown = replace(shot, criterion=name)
            yield row("paretoprune", int(seed or 0), shown, loss, _count(split))


def _count(batches: Iterable[Batch]) -> int:
    return sum(len(targets) for _, targets in batches)


def row(tool: str, seed: int, shot: Shot, search_loss: float | None, images: int) -> Row:
    """Returns the row of a shot on the test split."""
    print(tool, seed, shot, flush=True)
    values = {
        key: round(value, 4) if isinstance(value, float) else value
        for key, value in asdict(shot).items()
    }
    values["test_loss"], values["test_accuracy"] = values.pop("loss"), values.pop("accuracy")
    chosen = "" if search_loss is None else round(search_loss, 4)
    counts = {"search_loss": chosen, "test_images": images}
    return {"tool": tool, "seed": seed, **values, **counts, **described()}


def theirs(problem: Problem, name: str, targets: list[float], images: int) -> Iterator[Row]:
    """Yields a row per target and recovery of a Torch-Pruning criterion: 400 global steps."""
    import torch_pruning as tp

    torch.manual_seed(0)
    dense = trace(problem.model, problem.example_inputs).cost()
    model = copy.deepcopy(problem.model).eval()
    importance = {
        "random": tp.importance.RandomImportance,
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "bn_scale": tp.importance.BNScaleImportance,
        "lamp": lambda: tp.importance.LAMPImportance(p=2),
        "fpgm": tp.importance.FPGMImportance,
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian (bug fixed)": tp.importance.GroupHessianImportance,
    }[name]()
    start = time.perf_counter()
    _gradients(model, problem, name)
    inner = {f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(9)}
    pruner = tp.pruner.BasePruner(
        model,
        problem.example_inputs,
        importance=importance,
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=400,
        ignored_layers=[
            module
            for each, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and each not in inner
        ],
        in_channel_groups={},
        out_channel_groups={},
        channel_groups={},
    )
    assert problem.test is not None, "CIFAR-10 has a test split"
    test = first_batches(problem.test(), images)
    waiting = sorted(targets, reverse=True)
    while waiting:
        pruner.step()
        macs = tp.utils.count_ops_and_params(model, problem.example_inputs[:1])[0]
        if macs > waiting[0] * dense.macs:
            continue
        seconds = time.perf_counter() - start
        target = waiting.pop(0)
        small = copy.deepcopy(model)
        cost = trace(small, problem.example_inputs).cost()
        for recovery, network in (
            ("plain", small),
            ("recalibrated", recalibrate(small, problem.recalibration or problem.calibration)),
        ):
            network.to(memory_format=torch.channels_last)
            split = first_batches(test, images // 4) if recovery == "plain" else test
            measured = evaluate(network, split, problem.loss)
            shot = Shot(
                criterion=name,
                ranking="units",
                target=target,
                macs_ratio=cost.macs / dense.macs,
                params_ratio=cost.params / dense.params,
                removed_blocks=0,
                recovery=recovery,  # type: ignore[arg-type]
                loss=measured["loss"],
                accuracy=measured["accuracy"],
                seconds=seconds,
            )
            yield row("torch-pruning", 0, shot, None, _count(split))


def _gradients(model: nn.Module, problem: Problem, name: str) -> None:
    """Leaves on the parameters what the criterion reads: gradients, or their squares.

    Torch-Pruning 1.6.1 overwrites every example's squares with the next one's; here the mean over
    100 examples is put where it looks for it.
    """
    inputs, targets = next(iter(problem.calibration))
    if name == "taylor":
        F.cross_entropy(model(inputs), targets).backward()
    elif name.startswith("hessian"):
        squares = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
        for image, target in zip(inputs[:100], targets[:100], strict=True):
            model.zero_grad()
            F.cross_entropy(model(image[None]), target[None]).backward()
            for parameter, total in squares.items():
                assert parameter.grad is not None
                total += parameter.grad.square() / 100
        for parameter, total in squares.items():
            parameter.grad = total


def draw(rows: list[dict[str, str]], file: Path) -> None:
    """Draws the measured rows; of seeds the mean."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for each in rows:
        key = ("tool", "criterion", "ranking", "target", "recovery")
        groups.setdefault(tuple(each[name] for name in key), []).append(each)

    def mean(own: list[dict[str, str]], name: str) -> float:
        return sum(float(each[name]) for each in own) / len(own)

    shots = [
        Shot(
            criterion=criterion if tool == "paretoprune" else f"Torch-Pruning {criterion}",
            ranking="units" if ranking == "units" else "units and blocks",
            target=float(target),
            macs_ratio=mean(own, "macs_ratio"),
            params_ratio=mean(own, "params_ratio"),
            removed_blocks=0,
            recovery=recovery,  # type: ignore[arg-type]
            loss=mean(own, "test_loss"),
            accuracy=mean(own, "test_accuracy"),
            seconds=mean(own, "seconds"),
        )
        for (tool, criterion, ranking, target, recovery), own in groups.items()
        if ranking == "units"
    ]
    title = "ResNet-56, CIFAR-10: one-shot pruning without fine-tuning, test top-1"
    comparison_png(shots, title).savefig(file)


def costs() -> Iterator[Row]:
    """Yields CPU seconds of criteria relative to one plain gradient pass over the same images.

    Networks grow from ResNet-20 to one with the parameters of a ResNet-50; images and weights are
    random, which changes no time. The pass and the criteria take turns, so that what else the
    machine does meets all of them. They have one thread: what a thread waits for others is CPU
    time, too.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    networks: dict[str, Callable[[], nn.Module]] = {
        "resnet20": resnet20,
        "resnet56": resnet56,
        "resnet56, twice as wide": lambda: ResNet(9, (32, 64, 128), 3, 10),
        "resnet56, four times as wide": lambda: ResNet(9, (64, 128, 256), 3, 10),
        "resnet44, six times as wide": lambda: ResNet(7, (96, 192, 384), 3, 10),
    }
    for name, build in networks.items():
        model = build().eval()
        graph = trace(model, torch.randn(2, 3, 32, 32))
        batch = (torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))

        def gradients(model: nn.Module = model, batch: Any = batch) -> None:
            loss = F.cross_entropy(model(batch[0]), batch[1])
            torch.autograd.grad(loss, list(model.parameters()))

        actions: dict[str, Callable[[], object]] = {"gradients": gradients}
        for criterion in ("taylor", "proscore", "sosp_h"):
            actions[criterion] = partial(_score, criterion, model, graph, batch)
        seconds = _cpu_seconds(actions)
        base = seconds.pop("gradients")
        measured: Row = {
            "network": name,
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "macs": graph.cost().macs,
            "gradient_pass_seconds": round(base, 3),
            **{f"{criterion}_ratio": round(each / base, 2) for criterion, each in seconds.items()},
        }
        print(measured, flush=True)
        yield {**measured, **described(on_cpu=True)}


def _score(criterion: str, model: nn.Module, graph: PruningGraph, batch: Batch) -> None:
    CRITERIA[criterion]()(model, graph, SharedCalibration([batch]))


def _cpu_seconds(actions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the least CPU time of each action's five runs, after one of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(6):
        for name, action in actions.items():
            start = time.process_time()
            action()
            times[name].append(time.process_time() - start)
    return {name: min(each[1:]) for name, each in times.items()}


if __name__ == "__main__":
    main()

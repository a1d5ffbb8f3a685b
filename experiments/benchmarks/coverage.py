"""What surgery can do with the networks people have: every model of torchvision, families of timm.

    python -m paretoprune.experiments.benchmarks.coverage torchvision
    python -m paretoprune.experiments.benchmarks.coverage timm

Every network is built with random weights and traced; half of the units of every open group are
pruned, and the result is compared with the masked dense network. Writes one row per network to
experiments/results/, with the most common reason why units are frozen. Of timm, the smallest
network of every family is taken: the first word of the name, without its numbers.
"""

from __future__ import annotations

import argparse
import csv
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.experiments.benchmarks.device import described
from paretoprune.experiments.benchmarks.rows import RESULTS
from paretoprune.surgery import PruningGraph, prune, trace
from paretoprune.surgery.check import masked_outputs, telling_copy
from paretoprune.surgery.trial_plans import whole_plan

LARGEST = 300_000_000
"""Most parameters of a network that is tried."""
FIELDS = (
    "model", "size", "seconds", "groups", "open", "blocks", "units", "open_units", "macs_removed",
    "error", "statistics", "frozen",
)  # fmt: skip
Row = dict[str, Any]


def main() -> None:
    """Runs the benchmark with the arguments of this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", choices=("torchvision", "timm"))
    parser.add_argument("--only", default="", help="regular expression of model names")
    parser.add_argument("--seconds", type=float, default=300, help="limit per network")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = torchvision_names() if options.source == "torchvision" else timm_names()
    names = [name for name in names if re.search(options.only, name)]
    out = options.out or RESULTS / f"coverage-{options.source}.csv"
    with out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*FIELDS, *described(on_cpu=True)])
        writer.writeheader()
        for index, name in enumerate(names, 1):
            row = in_own_process(f"{options.source}:{name}", options.seconds)
            writer.writerow({**row, **described(on_cpu=True)})
            stream.flush()
            print(f"[{index}/{len(names)}]", *(f"{k}={v}" for k, v in row.items()), flush=True)


def torchvision_names() -> list[str]:
    """Returns the classification and segmentation models of torchvision."""
    from torchvision import models

    segmentation = models.list_models(module=models.segmentation)
    names = [*models.list_models(module=models), *segmentation]

    def create(name: str) -> nn.Module:
        inner = {"weights_backbone": None} if name in segmentation else {}
        network: nn.Module = models.get_model(name, weights=None, **inner)
        return network

    return [name for name in names if parameters(create, name) <= LARGEST]


def timm_names() -> list[str]:
    """Returns the smallest model of every family of timm."""
    import timm

    smallest: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        family = re.sub(r"\d+.*$", "", name.split("_")[0]) or name
        size = parameters(timm.create_model, name)
        smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return [name for size, name in sorted(smallest.values()) if size <= LARGEST]


def parameters(create: Any, name: str) -> int:
    """Returns how many parameters a network has, without giving them memory."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(parameter.numel() for parameter in create(name).parameters())
    except Exception:  # its code needs numbers: it is measured when it is its turn
        return LARGEST


def in_own_process(reference: str, seconds: float) -> Row:
    """Returns the row of a network, measured in a process that may not take longer."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, reference))
    process.start()
    row: Row = {"model": reference, "frozen": f"took longer than {seconds:.0f} s"}
    if receiver.poll(seconds):
        try:
            row = receiver.recv()
        except EOFError:
            row["frozen"] = "the process died"
    process.kill()
    process.join()
    return row


def _send(sender: Any, reference: str) -> None:
    torch.set_num_threads(1)
    try:
        sender.send(measure(reference))
    except Exception as error:
        lines = str(error).splitlines() or [""]
        sender.send({"model": reference, "frozen": f"{type(error).__name__}: {lines[0][:300]}"})


def build(reference: str) -> tuple[nn.Module, int]:
    """Returns a network with random weights, in eval mode, and the size of its images."""
    library, name = reference.split(":")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        model: Any = timm.create_model(name)
        return model.eval(), int(model.default_cfg.get("input_size", (3, 224, 224))[-1])
    from torchvision import models

    options: dict[str, Any] = {}
    if name in models.list_models(models.segmentation):
        options = {"weights_backbone": None}
    elif name in ("googlenet", "inception_v3"):
        options = {"init_weights": False}
    fixed = ("vit", "swin", "maxvit")  # built for one size
    size = 224 if name.startswith(fixed) else 299 if name.startswith("incep") else 128
    return models.get_model(name, weights=None, **options).eval(), size


def measure(reference: str) -> Row:
    """Returns the row of one network."""
    model, size = build(reference)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    graph = trace(model, images)
    seconds = time.perf_counter() - start
    plan = whole_plan(graph)
    model = telling_copy(model)
    with torch.no_grad():
        expected = masked_outputs(model, graph, plan, images)
        actual = list(_floats(prune(model, graph, plan)(images)))
    error = max(
        ((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item()
        for a, b in zip(expected, actual, strict=True)
    )
    return {
        "model": reference,
        "size": size,
        "seconds": round(seconds, 1),
        "groups": len(graph.groups),
        "open": len(graph.open_groups),
        "blocks": len(graph.blocks),
        "units": sum(group.size for group in graph.groups.values()),
        "open_units": sum(group.size for group in graph.open_groups),
        "macs_removed": round(1 - graph.cost(plan).macs / graph.cost().macs, 3),
        "error": f"{error:.1e}",
        "statistics": sum(bool(group.statistics) for group in graph.open_groups),
        "frozen": _reasons(graph),
    }


def _floats(value: Any) -> Iterator[Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def _reasons(graph: PruningGraph) -> str:
    """Returns the three reasons that freeze most groups, each with its number of groups."""
    reasons = Counter(
        group.frozen
        for group in graph.groups.values()
        if group.frozen and group.frozen != "reaches the model's output"
    )
    return "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common(3))


if __name__ == "__main__":
    main()

"""What the scripts that reproduce the papers' tables share: options, problems, training, rows.

A row is written once it is measured, and never measured again; what is trained for a row lies in
`--work`, epoch by epoch, so that a script that was stopped goes on where it was. A row that takes
what was trained before, whole or in part, leaves seconds and energy empty, because its own
measurement is no longer all that it took. Networks without weights under $PARETOPRUNE_DATA are
trained there first, on the training images outside the search split.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from paretoprune.experiments import models
from paretoprune.experiments.benchmarks.device import described
from paretoprune.experiments.benchmarks.rows import append, read
from paretoprune.experiments.data.splits import Batches, TrainingBatches
from paretoprune.experiments.finetuning import DISTILLATION
from paretoprune.experiments.measuring.reports import parse_reports
from paretoprune.experiments.recipes import RECIPES, build_problem
from paretoprune.experiments.reproduce.reported import COLUMNS, WORK, energy, robust, worked
from paretoprune.experiments.training import Training, train
from paretoprune.experiments.units import names
from paretoprune.search import Problem, evaluate
from paretoprune.search.evaluation import on_device
from paretoprune.search.metrics import device_of
from paretoprune.search.weights import write_weights
from paretoprune.surgery import PrunableGroup, PruningGraph, PruningPlan, trace

ALL_IMAGES = 46_000
"""Training images of CIFAR-10 outside the search split."""
ALL_TESTED = 10_000
SCALE = ("epochs", "images", "test_images", "batch_size", "learning_rate")
"""Columns that say how far a row was run; rows of other scales stand beside each other."""
Row = dict[str, Any]


def parser(
    description: str | None, *, networks: str, reductions: str, epochs: int
) -> argparse.ArgumentParser:
    """Returns a parser with the options that all scripts have.

    Args:
        description: The script's docstring.
        networks: Default of `--networks`.
        reductions: Default of `--reductions`.
        epochs: Of the full run, the default of `--epochs`.
    """
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--networks", default=networks, help="such as resnet56,vgg16")
    made.add_argument("--reductions", default=reductions, help="percent that is removed")
    made.add_argument("--epochs", type=_count, default=epochs, help="of every training")
    made.add_argument("--images", type=_count, default=ALL_IMAGES, help="training images")
    made.add_argument("--test-images", type=_count, default=ALL_TESTED)
    made.add_argument("--seeds", default="0")
    made.add_argument("--batch-size", type=_count, default=128)
    made.add_argument("--learning-rate", type=float, default=0.05, help="of fine-tuning")
    made.add_argument("--data", help="cifar10:DIR; by default under $PARETOPRUNE_DATA")
    made.add_argument("--work", type=Path, default=Path("runs/reproduce"), help="for checkpoints")
    made.add_argument("--out", type=Path, help="CSV to add rows to")
    made.add_argument(
        "--report", type=parse_reports, default=(), help="robustness,energy of every network"
    )
    made.add_argument(
        "--report-images", type=_count, help="of the test images, for robustness; by default all"
    )
    made.set_defaults(full_epochs=epochs)
    return made


def _count(text: str) -> int:
    """Returns a number of epochs or images.

    Raises:
        ValueError: If it is no number.
        ArgumentTypeError: If it is less than 1.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {number}")
    return number


def numbers(text: str) -> list[float]:
    """Returns the numbers of a list with commas."""
    return [float(part) for part in names(text)]


def benches(options: argparse.Namespace, *, trained: bool = True) -> Iterator[Bench]:
    """Yields a bench for every network and seed that the options name, see `Bench.of`."""
    for network in names(options.networks):
        for seed in numbers(options.seeds):
            yield Bench.of(options, network, int(seed), trained=trained)


@dataclass(frozen=True)
class Results:
    """A CSV of rows.

    Attributes:
        file: The CSV.
        keys: Columns that tell rows apart, beside those in `SCALE`.
        reports: What `--report` asks for.
    """

    file: Path
    keys: tuple[str, ...]
    reports: tuple[str, ...] = ()

    def find(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        """Returns the row with the same keys; None if it was not measured."""
        for one in read(self.file):
            if self._key(one) == self._key(row):
                return one
        return None

    def _key(self, row: Mapping[str, Any]) -> str:
        return " ".join(str(row[name]) for name in (*self.keys, *SCALE))

    def measure(
        self, row: Row, measured: Callable[[], Row], reused: list[Path] | None = None
    ) -> None:
        """Measures a row and adds it, unless it is there.

        Args:
            row: Keys, and all that is known before.
            measured: Returns the other columns.
            reused: `Bench.reused` of the bench that `measured` trains on; emptied before. None if
                it trains nothing.
        """
        if self.find(row) is not None:
            return
        taken: list[Path] = [] if reused is None else reused
        taken.clear()
        start = time.perf_counter()
        found = worked(self.reports, measured)
        whole = {**row, **found, "seconds": round(time.perf_counter() - start), **described()}
        if taken:
            whole |= dict.fromkeys(("seconds", *WORK), "")
        print(whole, flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        append(self.file, [whole])


@dataclass(frozen=True)
class Bench:
    """A network with its data, at the scale that the options give.

    Attributes:
        options: Of the command line.
        network: Name, as in `experiments.models`, or `digits`.
        seed: Of all that is drawn.
        problem: With few training images where the options say so.
        graph: Of the dense network.
        reused: What `file` found of earlier work; see `Results.measure`.
    """

    options: argparse.Namespace
    network: str
    seed: int
    problem: Problem
    graph: PruningGraph
    reused: list[Path] = field(default_factory=list)

    @staticmethod
    def of(options: argparse.Namespace, network: str, seed: int, *, trained: bool = True) -> Bench:
        """Returns the bench of a network; where it has no weights, it is trained first.

        Args:
            options: Of the command line.
            network: Its name.
            seed: Of all that is drawn.
            trained: Whether it needs to be trained.
        """
        recipe = network if network in RECIPES else f"{network}-cifar10"
        if recipe in RECIPES:
            problem = build_problem(recipe, data=options.data, seed=seed)
        else:
            data = options.data or _cifar10()
            problem = build_problem(f"{models.__name__}:{network}", data=data, seed=seed)
        batches = problem.training
        assert isinstance(batches, TrainingBatches)
        few = batches.resized(options.images, options.batch_size)
        problem = replace(problem, training=few, name=network)
        bench = Bench(
            options, network, seed, problem, trace(problem.model, problem.example_inputs)
        )
        if trained and recipe not in RECIPES:
            dense = bench.train(problem.model, f"{network}-dense", rate=0.1)
            return replace(bench, problem=replace(problem, model=dense.cpu()))
        return bench

    @property
    def keys(self) -> Row:
        """The columns that every row begins with."""
        full = (
            self.options.epochs >= self.options.full_epochs
            and self.options.images >= ALL_IMAGES
            and self.options.test_images >= ALL_TESTED
        )
        return {
            "network": self.network,
            "seed": self.seed,
            "epochs": self.options.epochs,
            "images": self.options.images,
            "test_images": self.options.test_images,
            "batch_size": self.options.batch_size,
            "learning_rate": self.options.learning_rate,
            "full": full,
        }

    def file(self, name: str) -> Path:
        """Returns where something that is trained is kept, and notes what is there of it.

        Other scales have other folders. All scripts share them, so that a dense network is trained
        once; what other scripts could mean something else by is named after the script, too.

        Args:
            name: Of the file, without `.safetensors`; a checkpoint ends in `.part` instead, and
                the folder of a search in nothing.
        """
        scale = [getattr(self.options, name) for name in SCALE if name != "test_images"]
        folder = self.options.work / "-".join(map(str, [self.network, *scale, self.seed]))
        folder.mkdir(parents=True, exist_ok=True)
        file: Path = folder / f"{name}.safetensors"
        kinds = (file, file.with_suffix(".part"), file.with_suffix(""))
        self.reused.extend(one for one in kinds if one.exists())
        return file

    def train(
        self,
        network: nn.Module,
        name: str,
        *,
        rate: float | None = None,
        decay: float = 5e-4,
        epochs: int | None = None,
        teacher: nn.Module | None = None,
        draws: int = 0,
        mixup: float = 0.0,
        penalty: Callable[[nn.Module], Tensor] | None = None,
    ) -> nn.Module:
        """Returns a trained copy of a network, which is kept under a name.

        Args:
            network: Where training starts.
            name: Where it is kept.
            rate: Peak learning rate; None takes that of the options.
            decay: Of the weights.
            epochs: None takes those of the options.
            teacher: Distilled.
            draws: Epochs whose batches are drawn, see `Training`.
            mixup: Of the batches, likewise.
            penalty: Added to the loss.
        """
        settings = Training(
            epochs=self.options.epochs if epochs is None else epochs,
            learning_rate=self.options.learning_rate if rate is None else rate,
            distillation=0.0 if teacher is None else DISTILLATION,
            weight_decay=decay,
            warmup=0.05,
            draws=draws,
            mixup=mixup,
            seed=self.seed,
        )
        taught = None if teacher is None else on_device(teacher)
        made = partial(train, training=settings, teacher=taught, penalty=penalty)
        return self.kept(network, name, made)

    def kept(self, network: nn.Module, name: str, made: Callable[..., nn.Module]) -> nn.Module:
        """Returns a trained copy of a network, which is kept under a name.

        Args:
            network: Where training starts.
            name: Where it is kept.
            made: Trains: (network, batches, checkpoint, progress) -> trained network.
        """
        file = self.file(name)
        if file.exists():
            kept = copy.deepcopy(network)
            kept.load_state_dict(load_file(file))
            return kept.eval()
        batches, checkpoint = self.problem.training, file.with_suffix(".part")
        assert isinstance(batches, TrainingBatches)
        model = on_device(network).to(memory_format=torch.channels_last)
        trained = made(
            model,
            batches.on(device_of(model)),
            checkpoint=checkpoint,
            progress=lambda line: print(f"{name}: {line}", flush=True),
        )
        write_weights(trained, file)
        checkpoint.unlink(missing_ok=True)
        return trained

    def accuracy(self, network: nn.Module) -> float:
        """Returns the top-1 accuracy on the test images, in percent."""
        metrics = evaluate(on_device(network), self._tested, self.problem.loss)
        return round(100 * metrics["accuracy"], 2)

    def reported(self, small: nn.Module, dense: nn.Module | None = None) -> Row:
        """Returns the columns of `--report`, empty where it asks for nothing.

        Args:
            small: The pruned network.
            dense: What it came from; None takes the problem's network.
        """
        names, few = self.options.report, self._attacked
        before = self._dense_robust if dense is None else robust(names, dense, few)
        found = {
            "robust_images": len(few.indices) if "robustness" in names else "",
            **{f"dense_{name}": value for name, value in before.items()},
            **robust(names, small, few),
            **energy(names, dense or self.problem.model, small, self._tested),
        }
        return {name: found[name] for name in COLUMNS}

    @cached_property
    def _dense_robust(self) -> Row:
        return robust(self.options.report, self.problem.model, self._attacked)

    @cached_property
    def _tested(self) -> Batches:
        """The test images that are read."""
        assert self.problem.test is not None
        test = self.problem.test()
        assert isinstance(test, Batches)
        return replace(test, indices=test.indices[: self.options.test_images])

    @property
    def _attacked(self) -> Batches:
        """Those of the test images that robustness is measured on."""
        return replace(self._tested, indices=self._tested.indices[: self.options.report_images])

    def costs(self, plan: PruningPlan) -> Row:
        """Returns what a plan takes away."""
        cost, dense = self.graph.cost(plan), self.graph.cost()
        return {
            "macs_reduction": round(100 * (1 - cost.macs / dense.macs), 2),
            "params_reduction": round(100 * (1 - cost.params / dense.params), 2),
            "removed_blocks": len(plan.removed),
        }


def without_lowest(
    groups: Sequence[PrunableGroup],
    saliency: Mapping[str, Tensor],
    share: float,
    *,
    least: int,
    each: bool = False,
) -> PruningPlan:
    """Returns the plan without the units of lowest saliency, counted in units and not in MACs.

    Args:
        groups: What may lose units.
        saliency: By group name, shape (group.size,).
        share: Of the units, that goes.
        least: Units that every group keeps.
        each: Whether every group loses the same share; else all are ranked together.
    """
    scores = [saliency[group.name] for group in groups]
    if each:
        stay = [_without_lowest(one, share) for one in scores]
    else:
        stay = [*_without_lowest(torch.cat(scores), share).split([len(one) for one in scores])]
    kept = {}
    for group, own, staying in zip(groups, scores, stay, strict=True):
        count = max(min(least, group.size), int(staying.sum()))
        kept[group.name] = tuple(own.topk(count).indices.sort().values.tolist())
    return PruningPlan(kept)


def _without_lowest(scores: Tensor, share: float) -> Tensor:
    """Returns what stays, shape (n,); by rank, because scales that were penalised are often 0."""
    stays = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    stays[scores.argsort(stable=True)[: round(share * len(scores))]] = False
    return stays


def _cifar10() -> str:
    return f"cifar10:{os.environ['PARETOPRUNE_DATA']}/data/cifar10"

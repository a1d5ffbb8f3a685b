"""Checks before long work: what a search is asked for, and whether model and data fit."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from paretoprune.criteria import (
    CRITERIA,
    UNBOUNDED,
    Bounds,
    Criterion,
    fingerprint,
    largest_macs,
    smallest_macs,
    target_macs,
)
from paretoprune.search.cluster import reach
from paretoprune.search.evaluation import on_device, one_line
from paretoprune.search.metrics import device_of, evaluate, evaluating, forward
from paretoprune.search.objectives import MEASURED
from paretoprune.search.problem import Batch, Metric, Problem
from paretoprune.search.ties import GRANULARITIES
from paretoprune.surgery import InfeasibleBudget, PruningGraph, prune
from paretoprune.surgery.inputs import has_rows, join_rows
from paretoprune.surgery.trial_plans import whole_plan

DAMAGE = "damage"
"""The sampler of `search.damage`."""
SAMPLERS = (DAMAGE, "tpe", "nsga2", "nsga3", "gp", "random")
"""Names of the samplers: our own, then Optuna's."""
_METRIC = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def check_flops(flops: float | int) -> None:
    """Verifies a FLOPs target: a share of the dense MACs as float, or MACs as int.

    Raises:
        ValueError: If it is out of range.
    """
    if isinstance(flops, bool) or not isinstance(flops, (int, float)):
        raise ValueError(f"flops is a fraction (float) or MACs (int), but got {flops!r}.")
    if isinstance(flops, float) and not 0 < flops <= 1:
        raise ValueError(f"flops as a fraction lies in (0, 1], but got {flops}.")
    if isinstance(flops, int) and flops < 1:
        raise ValueError(f"flops in MACs must be at least 1, but got {flops}.")


def check_count(name: str, value: int, least: int) -> None:
    """Verifies a whole number.

    Raises:
        ValueError: If it is none, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but got {value!r}.")


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Verifies that `name` is one of `known`.

    Raises:
        ValueError: If not; lists what is.
    """
    if name not in (options := tuple(known)):
        raise ValueError(f"unknown {kind} {name!r}; available: {', '.join(options)}.")


def check_search(
    strategy: str,
    criteria: Iterable[str],
    *,
    objectives: Sequence[str],
    measured: Iterable[str] | None,
    granularity: str,
    bounds: Bounds,
    sampler: str | None,
    recovery: int,
    trials: int,
    seed: int,
    workers: int | None,
    gpus_per_trial: float | None,
    trial_timeout: float | None,
) -> None:
    """Verifies what a search is asked for; see `search.loop.search` for the other arguments.

    Args:
        strategy: Which.
        criteria: Names.
        objectives: Names.
        measured: Which objectives there are; None where that is not known yet.

    Raises:
        ValueError: If something is unknown, out of range, or would not be used.
    """
    steps = strategy == "everything"
    check_count("trials", trials, 2 if steps else 1)  # a step has two candidates
    check_count("seed", seed, 0)
    check_count("recovery", recovery, 0)
    check_workers(workers, gpus_per_trial, trial_timeout)
    check_objectives(objectives, measured)
    check_used(strategy, sampler, recovery)
    check_name("sampler", sampler or DAMAGE, SAMPLERS)
    check_name("granularity", granularity, GRANULARITIES)
    if steps:
        check_steps(criteria, objectives, bounds, granularity)


def check_used(strategy: str, sampler: str | None, recovery: int) -> None:
    """Verifies that nothing was given that the strategy would not use.

    Args:
        strategy: `optuna` or `everything`.
        sampler: As it was given; None where it was not.
        recovery: Epochs for every candidate.

    Raises:
        ValueError: If something was.
    """
    if strategy == "everything" and sampler is not None:
        raise ValueError(
            f"the strategy everything decides without a sampler, but got {sampler!r}; leave it "
            f"out, or take the strategy optuna."
        )
    if strategy != "everything" and recovery:
        raise ValueError(
            f"recovery trains the candidates of the strategy everything alone, but got {recovery} "
            f"epochs with the strategy {strategy}; the best of the front are trained for epochs."
        )


def check_address(address: str | None, workers: int | None) -> None:
    """Verifies that there is a cluster at `address` to evaluate on; None is this machine.

    Raises:
        ValueError: If there are to be no workers at all.
        ConnectionError: If nothing answers.
    """
    if address is None:
        return
    if workers == 0:
        raise ValueError(f"workers is 0, so nothing would run on the cluster at {address}.")
    reach(address)


def check_gpus(gpus_per_trial: float | None) -> None:
    """Verifies that this machine has the GPUs that each evaluation may take.

    Raises:
        ValueError: If it has fewer.
    """
    there = torch.cuda.device_count()
    if gpus_per_trial is not None and gpus_per_trial > there:
        raise ValueError(
            f"every trial is to have {gpus_per_trial:g} GPUs, but this machine has {there}."
        )


def check_workers(
    workers: int | None, gpus_per_trial: float | None, trial_timeout: float | None
) -> None:
    """Verifies what each evaluation may take of the workers.

    Raises:
        ValueError: If it is out of range, or there are no workers that it could apply to.
    """
    check_count("workers", 0 if workers is None else workers, 0)
    if gpus_per_trial is not None:
        whole = gpus_per_trial >= 1 and gpus_per_trial == int(gpus_per_trial)
        if not (0 <= gpus_per_trial < 1 or whole):  # what Ray can give
            raise ValueError(
                f"gpus_per_trial is a fraction of a GPU below 1 or a whole number, but got "
                f"{gpus_per_trial}."
            )
        if workers == 0:
            raise ValueError(
                f"gpus_per_trial is {gpus_per_trial:g}, but workers is 0: without Ray there are "
                f"no shares of a GPU."
            )
    if trial_timeout is not None:
        if not 0 < trial_timeout < float("inf"):
            raise ValueError(f"trial_timeout is seconds above 0, but got {trial_timeout}.")
        if workers == 0:
            raise ValueError(
                f"trial_timeout is {trial_timeout:g} s, but workers is 0: an evaluation in this "
                f"process cannot be stopped; take one worker or more."
            )


def check_objectives(names: Sequence[str], measured: Iterable[str] | None) -> None:
    """Verifies the names of objectives; `measured` are those there are, None if not known yet.

    Raises:
        ValueError: If there are fewer than two, one is unknown or named twice.
    """
    for name in names if measured is not None else ():
        check_name("objective", name, measured or ())
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"a search has two or more different objectives, but got {list(names)}.")


def check_steps(
    criteria: Iterable[str],
    objectives: Sequence[str] = (),
    bounds: Bounds = UNBOUNDED,
    granularity: str = "group",
) -> None:
    """Verifies what the strategy `everything` is asked for.

    Raises:
        ValueError: If there is not just one criterion, an objective is not measured in steps, or
            something is to hold that its steps do not know.
    """
    if len(names := tuple(criteria)) != 1:
        raise ValueError(
            f"the strategy everything takes one criterion, but got {', '.join(names)}."
        )
    for name in sorted({"cka", "latency"}.intersection(objectives)):
        raise ValueError(
            f"the strategy everything compares candidates with their parents and not with the "
            f"dense network; {name} is no objective of it, but got {list(objectives)}."
        )
    if bounds.min_ratio > 0 or bounds.max_ratio < 1:
        raise ValueError(
            f"the strategy everything prunes what the step before left, so that no ratio of the "
            f"dense network can be bounded, but got {bounds.min_ratio:g} to "
            f"{bounds.max_ratio:g}; give a multiple or exclusions."
        )
    if granularity != "group":
        raise ValueError(
            f"the strategy everything has no offsets that groups could share, but the granularity "
            f"is {granularity!r}."
        )


def criteria_by_name(criteria: Sequence[str] | Mapping[str, Criterion]) -> dict[str, Criterion]:
    """Returns criteria by name; names stand for the defaults in `CRITERIA`.

    Raises:
        ValueError: If there is none, or a name is unknown.
    """
    if isinstance(criteria, str):
        raise ValueError(f"criteria is a sequence of names, but got the string {criteria!r}.")
    if not isinstance(criteria, Mapping):
        for name in criteria:
            check_name("criterion", name, CRITERIA)
        criteria = {name: CRITERIA[name]() for name in criteria}
    if not criteria:
        raise ValueError(f"a search needs a criterion; available: {', '.join(CRITERIA)}.")
    return dict(criteria)


def check_problem(problem: Problem) -> None:
    """Verifies that the data is there and fits the model and the loss.

    Reads the calibration data and the first batches of the other splits.

    Raises:
        ValueError: If the model is no module, if a split is empty, can be read only once or cannot
            be used as it is, if the search split is drawn anew at every reading, or if the loss
            does not fit what the model returns and the targets.
    """
    if not isinstance(problem.model, nn.Module):
        raise ValueError(f"problem.model is a module, but got a {type(problem.model).__name__}.")
    for name in ("calibration", "validation", "recalibration", "refit"):
        batches = getattr(problem, name)
        if batches is not None:
            _check_batch(problem, name, _first(name, batches))
    first, again = (
        fingerprint.of_batches([_first("validation", problem.validation)]) for _ in range(2)
    )
    if first != again:
        raise ValueError(
            "problem.validation gives other batches every time it is read, so that candidates "
            "would be compared on different data; give it without shuffling, sampling and random "
            "augmentation."
        )
    _check_calibration(problem)
    for name, metric in problem.metrics.items():
        _check_metric(problem, name, metric)


def _check_metric(problem: Problem, name: str, metric: Metric) -> None:
    """Verifies that a metric has a name of its own and measures a number."""
    if name in MEASURED or not _METRIC.fullmatch(name):
        raise ValueError(
            f"a metric of problem.metrics is named by letters, digits and '_' and not as one that "
            f"is measured anyway ({', '.join(MEASURED)}), but got {name!r}."
        )
    batch = [_first("validation", problem.validation)]
    try:
        value = evaluate(problem.model, batch, problem.loss, {name: metric})[name]
    except Exception as error:
        raise ValueError(
            f"the metric {name!r} does not take the model's outputs with the targets of "
            f"problem.validation: {one_line(error)}"
        ) from error
    if not math.isfinite(value):
        raise ValueError(f"the metric {name!r} of a batch of problem.validation is {value}.")


def _check_calibration(problem: Problem) -> None:
    """Verifies that the calibration batches can be joined, and are numbers."""
    expected = _sizes(problem.example_inputs)
    ranks = [len(size) for size in expected]
    first: list[tuple[int, ...]] | None = None
    for inputs, _ in problem.calibration:
        sizes = _sizes(inputs)
        if [len(size) for size in sizes] != ranks:
            raise ValueError(
                f"problem.example_inputs are inputs as of problem.calibration, a batch of "
                f"examples, but they have {_said(expected)} and a batch has {_said(sizes)} as "
                f"the sizes of one example."
            )
        counts = {len(leaf) for leaf in tree_leaves(inputs) if has_rows(leaf)}
        if len(counts) > 1:
            raise ValueError(
                f"every input of problem.calibration has a dim of examples first, but a batch has "
                f"{' and '.join(map(str, sorted(counts)))} of them; what all examples share is a "
                f"buffer of the model, or repeated for each."
            )
        first = first or sizes
        if sizes != first:
            raise ValueError(
                f"problem.calibration has examples of {_said(first)} and of {_said(sizes)}; bring "
                f"all to the same size, as by padding them to one length."
            )
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
                raise ValueError("the inputs of problem.calibration are not all finite numbers.")


def _sizes(inputs: Any) -> list[tuple[int, ...]]:
    """Returns the size of one example in each tensor of a network's inputs."""
    return [tuple(leaf.shape[1:]) for leaf in tree_leaves(inputs) if has_rows(leaf)]


def _said(sizes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join("x".join(map(str, size)) or "1" for size in sizes)


def _first(name: str, batches: Iterable[Batch]) -> Batch:
    iterator = iter(batches)
    if iterator is batches:
        raise ValueError(
            f"problem.{name} is read many times, but an iterator or generator ends after the "
            f"first; pass a list or a data loader."
        )
    batch = next(iterator, None)
    if batch is None:
        raise ValueError(f"problem.{name} must have at least one batch, but it is empty.")
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        raise ValueError(
            f"a batch of problem.{name} is (inputs, targets) with targets a tensor, but got "
            f"{_form(batch)}."
        )
    return batch[0], batch[1]


def _form(batch: object) -> str:
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in batch)})"
    return type(batch).__name__


def _check_batch(problem: Problem, name: str, batch: Batch) -> None:
    model, (inputs, targets) = problem.model, batch
    with evaluating(model), torch.no_grad():
        try:
            outputs = forward(model, inputs)
        except Exception as error:
            raise ValueError(
                f"the model does not take a batch of problem.{name}: {error}"
            ) from error
        try:
            value = problem.loss(outputs, targets.to(device_of(model)))
        except Exception as error:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            default = problem.loss is F.cross_entropy
            more = "; give `loss` in a function that returns a Problem" if default else ""
            raise ValueError(
                f"the loss does not take the model's outputs ({shape}) with the targets "
                f"({tuple(targets.shape)}) of problem.{name}: {error}{more}"
            ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"problem.loss returns a tensor with one number, but got {got}.")
    if not math.isfinite(value):
        raise ValueError(
            f"the loss of the dense network on problem.{name} is {float(value)}, and must be "
            f"finite."
        )
    if problem.loss is F.cross_entropy:
        _check_classes(name, outputs, targets)


def _check_classes(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Verifies that the cross entropy, the loss by default, is meant: it takes any floats."""
    classes = outputs.shape[min(1, outputs.dim() - 1)]
    if targets.is_floating_point():
        sums = targets.sum(min(1, targets.dim() - 1))
        shares = bool((targets >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), 1e-3)
        fits, got = shares, "floats that are no probabilities"
    else:
        fits, got = True, "integers"
    if fits and classes > 1:
        return
    raise ValueError(
        f"the loss is the cross entropy, for a logit of each of two classes or more and targets "
        f"that are classes, but the network returns {tuple(outputs.shape)} and the targets of "
        f"problem.{name} are {got} of shape {tuple(targets.shape)}; give `loss` in a function "
        f"that returns a Problem, such as F.mse_loss or F.binary_cross_entropy_with_logits."
    )


def check_trainable(problem: Problem, graph: PruningGraph) -> None:
    """Verifies that the network and what is left of it can be trained, by one step of each.

    A network may run other code in training than in evaluation, which is what was traced.

    Args:
        problem: The dense network and its data.
        graph: Its graph.

    Raises:
        ValueError: If the loss does not take what the network returns in training, or a pruned
            network does not run there.
    """
    inputs, targets = _some(problem.calibration)
    pruned = prune(problem.model, graph, whole_plan(graph))
    networks = {"the network": copy.deepcopy(problem.model), "the pruned network": pruned}
    for name, network in networks.items():
        network = on_device(network).train()
        device = device_of(network)
        cuda = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                outputs = forward(network, inputs)
                problem.loss(outputs, targets.to(device)).backward()
        except Exception as error:
            raise ValueError(
                f"{name} cannot be trained: in training mode it raises {type(error).__name__}: "
                f"{error}; build the network without branches that run in training alone, such "
                f"as auxiliary heads, which are not pruned, or search without training."
            ) from error


def _some(batches: Iterable[Batch]) -> Batch:
    """Returns a batch of at least two examples, where there are: norms take no single one."""
    first = list(itertools.islice(batches, 2))
    if len(first[0][1]) > 1 or len(first) == 1:
        return first[0]
    inputs, targets = join_rows(*first)
    return inputs, targets


def check_reachable(
    graph: PruningGraph,
    flops: float | int,
    bounds: Bounds = UNBOUNDED,
    *,
    blocks: bool = True,
) -> int:
    """Returns a FLOPs target in MACs, verified before anything is measured.

    Args:
        graph: The dense network's graph.
        flops: Share of the dense MACs (float) or MACs (int).
        bounds: Which unit counts groups may keep, and which blocks may go.
        blocks: Whether blocks may go at all.

    Raises:
        InfeasibleBudget: If no plan meets it; names the smallest reachable MACs, or the largest
            where bounds ask for more pruning.
        ValueError: If it is more than the dense network has, or a pattern of the bounds matches
            nothing.
    """
    bounds.check(graph)
    target, dense = target_macs(graph, flops), graph.cost().macs
    within = "" if bounds == UNBOUNDED else " within the bounds"
    whole = " without removing blocks" if graph.blocks and not blocks else ""
    smallest = smallest_macs(graph, bounds.blocks(graph) if blocks else (), bounds)
    largest = largest_macs(graph, (), bounds)
    asked = f"the target of {target:,} MACs ({target / dense:.2%} of the dense network)"
    if smallest > target:
        raise InfeasibleBudget(
            f"{asked} cannot be reached: the smallest reachable{whole}{within} is {smallest:,} "
            f"MACs ({smallest / dense:.2%})."
        )
    if largest <= 0.99 * target:
        raise InfeasibleBudget(
            f"{asked} cannot be used up: the largest reachable{within} is {largest:,} MACs "
            f"({largest / dense:.2%})."
        )
    return target

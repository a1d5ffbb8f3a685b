"""Checks before long work: what a search is asked for. Whether data fit: `search.fit`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from paretoprune.criteria import (
    CRITERIA,
    UNBOUNDED,
    Bounds,
    Criterion,
    largest_macs,
    smallest_macs,
    target_macs,
)
from paretoprune.search.cluster import reach
from paretoprune.search.ties import GRANULARITIES
from paretoprune.surgery import InfeasibleBudget, PruningGraph

DAMAGE = "damage"
"""The sampler of `search.damage`."""
SAMPLERS = (DAMAGE, "tpe", "nsga2", "nsga3", "gp", "random")
"""Names of the samplers: our own, then Optuna's."""


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

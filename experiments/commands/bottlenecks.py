"""`paretoprune bottlenecks`: layers that a global ranking spares, and the network widened."""

from __future__ import annotations

import math
from pathlib import Path

from rich import box
from rich.table import Table

from paretoprune.criteria import select
from paretoprune.criteria.bottlenecks import Pressure, pressures, reset, widen
from paretoprune.experiments.commands.progress import long_step, progress_console, results_console
from paretoprune.experiments.commands.traced import traced_problem
from paretoprune.experiments.comparison import Comparison
from paretoprune.experiments.exporting.card import load_call
from paretoprune.experiments.exporting.export import check_destination
from paretoprune.experiments.places import check_folder
from paretoprune.experiments.runs import SALIENCY_DIR
from paretoprune.experiments.units import format_count, format_percent, parse_flops
from paretoprune.search import Problem, checks
from paretoprune.surgery import PruningGraph, PruningPlan, save, trace


def bottlenecks(
    model: str,
    flops: str,
    *,
    data: str | None,
    weights: str | None,
    criterion: str,
    factor: float,
    to: Path | None,
    seed: int,
    runs_dir: Path,
    quiet: bool,
) -> None:
    """Prints the pressure on every layer, and writes the widened network where that is asked for.

    Raises:
        ValueError: If an argument cannot be meant.
        InfeasibleBudget: If no plan meets the target.
    """
    target = parse_flops(flops)
    chosen = checks.criteria_by_name([criterion])
    if not 1 < factor < math.inf:
        raise ValueError(f"a widening factor is a finite number above 1, but got {factor}.")
    check_folder(runs_dir)  # for the saliencies
    if to is not None:
        check_destination(to)
    problem, graph = traced_problem(model, data=data, weights=weights, seed=seed, quiet=quiet)
    checks.check_reachable(graph, target, blocks=False)
    with long_step(progress_console(), f"Measuring {criterion}", quiet=quiet) as progress:
        comparison = Comparison(problem, graph, chosen, runs_dir / SALIENCY_DIR, progress)
    plan = select(graph, comparison.scores.units[criterion], budget=target)
    found = pressures(graph, plan)
    tight = [pressure.group for pressure in found if pressure.bottleneck]
    out = results_console()
    out.print(f"{problem.name}: what {criterion} removes at {flops} of the MACs, least first")
    out.print(_table(found))
    if not tight:
        out.print("no layer is pruned markedly less than the others: there is no bottleneck.")
        return
    _say_widened(problem, graph, tight, factor, seed, to)


def _table(found: list[Pressure]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("layer", "units", "removed", "pruning ratio", "bottleneck"):
        table.add_column(head, justify="left" if head in ("layer", "bottleneck") else "right")
    for each in found:
        table.add_row(
            each.group,
            str(each.units),
            str(each.removed),
            format_percent(each.ratio),
            "yes" if each.bottleneck else "",
        )
    return table


def _say_widened(
    problem: Problem,
    graph: PruningGraph,
    tight: list[str],
    factor: float,
    seed: int,
    to: Path | None,
) -> None:
    wide = reset(widen(problem.model, graph, tight, factor), seed)
    dense, cost = graph.cost(), trace(wide, problem.example_inputs).cost()
    out = results_console()
    out.print(
        f"widening {len(tight)} of {len(graph.open_groups)} layers {factor:g} times: "
        f"{format_count(dense.macs)} → {format_count(cost.macs)} MACs, "
        f"{format_count(dense.params)} → {format_count(cost.params)} parameters"
    )
    if to is None:
        out.print("--to DIR writes the widened network, untrained.")
        return
    save(
        to,
        wide,
        PruningPlan(),
        reference=problem.reference,
        arguments=problem.arguments,
        example_inputs=problem.example_inputs,
    )
    out.print(
        f"written: {to}; train it after paretoprune.surgery.{load_call(to, problem.reference)}.",
        soft_wrap=True,
    )

"""`paretoprune compare`: all criteria at equal FLOPs, as a table, CSV, plot and MLflow run."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import typer
from rich import box
from rich.table import Table

from paretoprune.criteria import CRITERIA, Bounds, CostClass, largest_macs, smallest_macs
from paretoprune.experiments.commands.progress import long_step, progress_console, results_console
from paretoprune.experiments.commands.traced import traced_problem
from paretoprune.experiments.comparison import RECOVERIES, Comparison, Ranking, Shot
from paretoprune.experiments.places import check_folder
from paretoprune.experiments.runs import SALIENCY_DIR, comparison_dir
from paretoprune.experiments.showing.comparison_plot import comparison_png
from paretoprune.experiments.tracking.mlflow_runs import log_comparison
from paretoprune.experiments.tracking.store import store_of
from paretoprune.experiments.units import format_percent, format_target, names, parse_flops
from paretoprune.search import checks
from paretoprune.search.evaluation import one_line
from paretoprune.surgery import InfeasibleBudget, PruningGraph

CHEAP = tuple(name for name, kind in CRITERIA.items() if kind.cost < CostClass.ABLATION)
"""What is compared unasked: all criteria without a forward pass per unit or a training."""


def compare(
    model: str,
    flops: str,
    *,
    data: str | None,
    weights: str | None,
    criteria: str | None,
    blocks: bool,
    bounds: Bounds,
    seed: int,
    to: Path | None,
    runs_dir: Path,
    quiet: bool,
    as_json: bool = False,
) -> None:
    """Measures every criterion at every target, writes what came out and prints it.

    Raises:
        ValueError: If an argument cannot be meant.
        InfeasibleBudget: If no plan meets a target, or no criterion has one within 1 % under any.
    """
    targets = [parse_flops(part) for part in names(flops) or [flops]]
    chosen = checks.criteria_by_name(names(criteria or "") or CHEAP)
    for folder in (runs_dir, *([] if to is None else [to])):  # the first for the saliencies
        check_folder(folder)
    problem, graph = traced_problem(model, data=data, weights=weights, seed=seed, quiet=quiet)
    for target in targets:
        checks.check_reachable(graph, target, bounds, blocks=blocks)
    if to is not None:
        to.mkdir(parents=True, exist_ok=True)
    with long_step(progress_console(), "Measuring saliencies", quiet=quiet) as progress:
        comparison = Comparison(problem, graph, chosen, runs_dir / SALIENCY_DIR, progress, bounds)
    with long_step(progress_console(), "Comparing", quiet=quiet) as progress:
        both = blocks and bool(graph.blocks)
        rankings: tuple[Ranking, ...] = ("units", "units and blocks") if both else ("units",)
        shots = list(comparison.shots(targets, rankings=rankings, progress=progress))
    if not shots:
        raise _without_plans(graph, targets, bounds, blocks=both)
    folder = to or comparison_dir(runs_dir, problem.name)
    folder.mkdir(parents=True, exist_ok=True)
    file = write_csv(shots, folder / "criteria.csv")
    figure = comparison_png(shots, f"{problem.name}: criteria one-shot, search split")
    picture = folder / "criteria.png"
    figure.savefig(picture)
    missing = _left_out(shots, chosen, rankings, targets)
    if as_json:
        facts = {"problem": problem.name, "csv": str(file), "plot": str(picture)}
        rows = [asdict(shot) for shot in shots]
        typer.echo(json.dumps({**facts, "shots": rows, "left_out": missing}, indent=2))
    else:
        _print(shots, targets, missing, f"written: {file} and {picture}", problem.name)
    try:
        log_comparison(store_of(runs_dir), problem.name, flops, shots, (file, picture))
    except Exception as error:  # what was measured is on disk, and MLflow is only a view of it
        print(f"MLflow was not written: {one_line(error)[:200]}", file=sys.stderr)


def _print(
    shots: Sequence[Shot],
    targets: Sequence[float | int],
    missing: Sequence[str],
    written: str,
    name: str,
) -> None:
    out = results_console()
    out.print(
        f"{name}: {'accuracy' if shots[0].accuracy is not None else 'loss'} on the search "
        "split by MACs left (the papers' FLOPs); plain / recalibrated / reconstructed"
    )
    out.print(table(shots, targets))
    if missing:
        out.print(f"left out, with no plan within 1 % under the target: {', '.join(missing)}")
    out.print(written, soft_wrap=True)


def _without_plans(
    graph: PruningGraph, targets: Sequence[float | int], bounds: Bounds, *, blocks: bool
) -> InfeasibleBudget:
    """Returns the error that no criterion has a plan, with what lies within reach."""
    dense = graph.cost().macs
    smallest = smallest_macs(graph, bounds.blocks(graph) if blocks else (), bounds)
    largest = largest_macs(graph, (), bounds)
    asked = ", ".join(format_target(target) for target in targets)
    return InfeasibleBudget(
        f"no criterion has a plan within 1 % under {asked}: plans of "
        f"{'units and blocks' if blocks else 'units alone'} have {smallest:,} to {largest:,} MACs "
        f"({smallest / dense:.2%} to {largest / dense:.2%} of the dense network), in steps of "
        f"whole units; try another target or other bounds."
    )


def _left_out(
    shots: Sequence[Shot],
    criteria: Iterable[str],
    rankings: Sequence[Ranking],
    targets: Sequence[float | int],
) -> list[str]:
    """Returns what was not measured, such as `l2 at 50%`."""
    measured = {(shot.criterion, shot.ranking, shot.target) for shot in shots}
    return [
        f"{_named(criterion, ranking)} at {format_target(target)}"
        for criterion, ranking, target in product(criteria, rankings, targets)
        if (criterion, ranking, target) not in measured
    ]


def _named(criterion: str, ranking: Ranking) -> str:
    return criterion if ranking == "units" else f"{criterion}, with blocks"


def write_csv(shots: Sequence[Shot], file: Path) -> Path:
    """Writes shots as CSV, a row each, and returns the file."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(asdict(shots[0])))
        writer.writeheader()
        for shot in shots:
            rounded = {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in asdict(shot).items()
            }
            writer.writerow(rounded)
    return file


def table(shots: Sequence[Shot], targets: Sequence[float | int]) -> Table:
    """Returns a table with a row per criterion and a column per target."""
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("criterion")
    for target in targets:
        shown.add_column(format_target(target), justify="right")
    for criterion, ranking in dict.fromkeys((s.criterion, s.ranking) for s in shots):
        cells = []
        for target in targets:
            own = {
                s.recovery: s
                for s in shots
                if (s.criterion, s.ranking, s.target) == (criterion, ranking, target)
            }
            values = [_cell(own[recovery]) for recovery in RECOVERIES if recovery in own]
            cells.append(" / ".join(values) or "no plan")
        shown.add_row(_named(criterion, ranking), *cells)
    return shown


def _cell(shot: Shot) -> str:
    return f"{shot.loss:.3f}" if shot.accuracy is None else format_percent(shot.accuracy)

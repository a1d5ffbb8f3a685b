"""`paretoprune front`, and what a search prints at its end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import typer

from paretoprune.experiments import runs
from paretoprune.experiments.commands.progress import results_console
from paretoprune.experiments.runs import RunSpec
from paretoprune.experiments.showing.summary import advantages
from paretoprune.experiments.showing.tables import front_csv, front_json, front_table
from paretoprune.experiments.showing.view import SearchView
from paretoprune.search import read_run
from paretoprune.search.record import reasons


def front(name: str, form: str, *, runs_dir: Path) -> None:
    """Prints the front of a run."""
    folder, spec = runs.load_run(runs_dir, name)
    view = view_of(folder, spec)
    if form == "json":
        typer.echo(front_json(view.front_rows))
    elif form == "csv":
        typer.echo(front_csv(view.front_rows), nl=False)
    else:
        _print_front(view, folder)


def view_of(folder: Path, spec: RunSpec) -> SearchView:
    return SearchView.of(read_run(folder, spec.storage))


def print_result(
    view: SearchView,
    folder: Path,
    as_json: bool,
    reported: tuple[Iterable[str], Mapping[str, float]] = ((), MappingProxyType({})),
) -> None:
    """Prints the front at the end of a search, with lines and metrics of the reports, if any."""
    lines, metrics = reported
    if as_json:
        facts = {"run": folder.name, "folder": str(folder), **view.to_json()}
        typer.echo(json.dumps({**facts, "reports": dict(metrics)}, indent=2))
        return
    _print_front(view, folder)
    for line in lines:
        typer.echo(line)


def _print_front(view: SearchView, folder: Path) -> None:
    console = results_console()
    if not view.records:
        console.print(f"No trial of [bold]{folder.name}[/bold] is finished yet.")
        return
    console.print(
        f"Pareto front of [bold]{folder.name}[/bold] after {len(view.records)} trials: no other "
        f"trial has {advantages(view)} at once; MACs are the papers' FLOPs, loss and accuracy "
        f"those on the search split"
    )
    if view.front_rows:
        console.print(front_table(view.front_rows, view.dense, view.dense_metrics))
    else:
        console.print("No trial completed, for these reasons:")
        for reason, number in reasons(view.records).items():
            console.print(f"  {number} x {reason}", markup=False)

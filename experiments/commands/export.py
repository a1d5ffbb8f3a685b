"""`paretoprune export`: which trial, where to, and its place in MLflow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import typer
from torch import Tensor

from paretoprune.experiments import runs
from paretoprune.experiments.commands.front import view_of
from paretoprune.experiments.commands.progress import long_step, progress_console
from paretoprune.experiments.commands.search import problem_of
from paretoprune.experiments.exporting.card import verdict
from paretoprune.experiments.exporting.export import Exported, check_destination, export
from paretoprune.experiments.exporting.formats import parse_formats
from paretoprune.experiments.measuring.reports import parse_reports
from paretoprune.experiments.runs import RunSpec
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.tracking.mlflow_runs import register_export
from paretoprune.experiments.tracking.store import Tracked
from paretoprune.experiments.units import parse_flops, parse_fraction
from paretoprune.search import Completed, Problem, Record
from paretoprune.search.evaluation import one_line
from paretoprune.search.weights import Weights


@dataclass(frozen=True, slots=True)
class Choice:
    """Which trial to export; the best of the front where nothing is given.

    Attributes:
        trial: Its number.
        max_flops: A FLOPs target that the best of the front must meet.
        min_accuracy: An accuracy on the search split that the smallest of the front must have.
    """

    trial: int | None = None
    max_flops: str | None = None
    min_accuracy: str | None = None

    def of(self, view: SearchView) -> Record:
        """Returns the record.

        Raises:
            ValueError: If there is none, or more than one way of choosing is given.
        """
        if sum(way is not None for way in (self.trial, self.max_flops, self.min_accuracy)) > 1:
            raise ValueError("give one of --trial, --max-flops and --min-accuracy.")
        if self.trial is not None:
            return _completed(view, self.trial)
        if self.min_accuracy is not None:
            return view.front.smallest(parse_fraction(self.min_accuracy, "an accuracy"))
        limit = None if self.max_flops is None else parse_flops(self.max_flops)
        if isinstance(limit, float):
            limit = int(limit * view.dense.macs)
        return view.front.best(view.target if limit is None else limit)


def _completed(view: SearchView, number: int) -> Record:
    for record in view.records:
        if record.number == number:
            if isinstance(record.outcome, Completed):
                return record
            raise ValueError(f"trial {number} has no network: {record.outcome}.")
    raise ValueError(
        f"there is no trial {number}; the run has trials 0 to {len(view.records) - 1}."
        if view.records
        else f"there is no trial {number}; the run has none yet."
    )


def export_run(
    name: str,
    choice: Choice,
    to: Path,
    *,
    formats: str,
    reports: str = "",
    runs_dir: Path,
    quiet: bool,
    as_json: bool = False,
) -> None:
    """Exports a trial of a run, registers it in MLflow, and prints what was verified."""
    beside, more = parse_formats(formats), parse_reports(reports)
    check_destination(to)
    folder, spec = runs.load_run(runs_dir, name)
    record = choice.of(view_of(folder, spec))
    problem = problem_of(spec, quiet, folder)
    title = f"Exporting trial {record.number}"
    with long_step(progress_console(), title, quiet=quiet) as progress:
        done = export(
            problem,
            record,
            to,
            weights=Weights.of_run(folder),
            formats=beside,
            reports=more,
            run=name,
            seed=spec.seed,
            progress=progress,
        )
        progress("registering it in MLflow")
        registered = _registered(done, problem, record, folder, spec)
    if as_json:
        facts = {
            "directory": str(to),
            "trial": record.number,
            "dense": done.dense.to_json(),
            "exported": done.small.to_json(),
            "formats": {one.name: one.to_json() for one in done.written},
            "reports": {k: v for report in done.reports for k, v in report.metrics.items()},
            "mlflow": registered,
        }
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(verdict(to, done.dense, done.small, done.written))
        for report in done.reports:
            typer.echo(report.line)
        typer.echo(f"MLflow   {registered}")


def _registered(
    done: Exported, problem: Problem, record: Record, folder: Path, spec: RunSpec
) -> str:
    """Puts an export into MLflow, and returns its URI, or why it has none."""
    example = problem.example_inputs
    if not isinstance(example, Tensor):
        return "not registered: its inputs are no single tensor"
    metrics = {k: v for report in done.reports for k, v in report.metrics.items()}
    try:
        return register_export(
            Tracked.of(folder, spec),
            record.number,
            problem.name,
            done.directory,
            done.model,
            example,
            about=(done.directory / "README.md").read_text(encoding="utf-8"),
            metrics=metrics,
        )
    except Exception as error:  # the export is complete without it
        return f"not registered: {one_line(error)}"

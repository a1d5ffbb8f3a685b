"""What the commands do; each checks all of its input before anything that takes long."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

import typer
from rich.table import Table

from paretoprune.criteria import CRITERIA, Bounds
from paretoprune.experiments import runs
from paretoprune.experiments.best_report import FILE as REPORTS_FILE
from paretoprune.experiments.best_report import report_best
from paretoprune.experiments.counting import thop_macs
from paretoprune.experiments.energy import energy_of_run, metered
from paretoprune.experiments.finetuning import FineTuner
from paretoprune.experiments.progress import (
    SearchProgress,
    long_step,
    progress_console,
    reasons,
    results_console,
)
from paretoprune.experiments.recipes import RECIPES, build_problem
from paretoprune.experiments.references import load_weights
from paretoprune.experiments.reports import check_reports, parse_reports
from paretoprune.experiments.runs import RunSpec
from paretoprune.experiments.summary import advantages
from paretoprune.experiments.tables import front_csv, front_json, front_table
from paretoprune.experiments.tracker import MlflowListener
from paretoprune.experiments.tracking import log_reports
from paretoprune.experiments.units import parse_flops, parse_fraction
from paretoprune.experiments.view import SearchView
from paretoprune.search import (
    Finetuning,
    Problem,
    SearchInterrupted,
    StoreFailed,
    checks,
    read_run,
)
from paretoprune.search import search as run_search
from paretoprune.search.evaluation import one_line
from paretoprune.search.loop import DEFAULTS
from paretoprune.search.stages import EVALUATIONS
from paretoprune.search.ties import GRANULARITIES, Granularity
from paretoprune.search.weights import FOLDER as WEIGHTS
from paretoprune.search.weights import write_weights
from paretoprune.surgery import trace

TOP = 3
"""How many of the front are fine-tuned by default."""
DENSE_FILE = "dense.safetensors"
"""In the run folder: the dense weights, where they came from no file."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """The options of `search` as they were given; see its help."""

    model: str
    flops: str
    data: str | None = None
    weights: str | None = None
    trials: int = 100
    criteria: str | None = None
    sampler: str | None = None
    seed: int = 0
    workers: int | None = None
    address: str | None = None
    gpus_per_trial: float | None = None
    trial_timeout: float | None = None
    storage: str | None = None
    strategy: str = "optuna"
    finetune: int = 0
    top: int | None = None
    distil: bool = False
    recovery: int = 0
    report: str = ""
    objectives: str = "loss,macs"
    granularity: str = "group"
    multiple: int = 1
    min_ratio: str = "0"
    max_ratio: str = "1"
    exclude: str = ""

    def checked(self) -> RunSpec:
        """Returns the run that they describe.

        Raises:
            ValueError: If one of them cannot be meant.
        """
        checks.check_name("strategy", self.strategy, DEFAULTS)
        names = _names(self.criteria or "") or DEFAULTS[self.strategy]
        for name in names:
            checks.check_name("criterion", name, CRITERIA)
        objectives = _names(self.objectives)
        checks.check_objectives(objectives)
        checks.check_name("granularity", self.granularity, GRANULARITIES)
        bounds = bounds_of(self.multiple, self.min_ratio, self.max_ratio, self.exclude)
        if self.strategy == "everything":
            checks.check_steps(names, objectives, bounds, self.granularity)
        checks.check_used(self.strategy, self.sampler, self.recovery)
        checks.check_sampler(self.sampler or checks.DAMAGE)
        checks.check_count("--trials", self.trials, 1)
        checks.check_count("--seed", self.seed, 0)
        checks.check_count("--workers", self.workers or 0, 0)
        checks.check_workers(self.workers, self.gpus_per_trial, self.trial_timeout)
        checks.check_count("--finetune", self.finetune, 0)
        checks.check_count("--top", TOP if self.top is None else self.top, 1)
        checks.check_count("--recovery", self.recovery, 0)
        if self.top is not None and not self.finetune:
            raise ValueError(
                f"--top {self.top} says how many are fine-tuned, but none are: give --finetune "
                f"EPOCHS, or leave --top out."
            )
        if self.distil and not self.finetune and not self.recovery:
            raise ValueError("--distill needs a training: give --finetune EPOCHS.")
        return RunSpec(
            model=self.model,
            flops=parse_flops(self.flops),
            trials=self.trials,
            criteria=names,
            objectives=objectives,
            granularity=cast("Granularity", self.granularity),
            bounds=bounds,
            data=_anchored(self.data),
            weights=_absolute(self.weights),
            sampler=None if self.strategy == "everything" else self.sampler or checks.DAMAGE,
            strategy=self.strategy,
            finetune=self.finetune,
            top=TOP if self.top is None else self.top,
            distil=self.distil,
            recovery=self.recovery,
            reports=parse_reports(self.report),
            seed=self.seed,
            workers=self.workers,
            address=self.address,
            gpus_per_trial=self.gpus_per_trial,
            trial_timeout=self.trial_timeout,
            storage=self.storage,
        )


def bounds_of(multiple: int, min_ratio: str, max_ratio: str, exclude: str) -> Bounds:
    """Returns the bounds that options describe; see their help.

    Raises:
        ValueError: If one of them cannot be meant.
    """
    checks.check_count("--multiple", multiple, 1)
    low, high = (parse_fraction(text, "a pruning ratio") for text in (min_ratio, max_ratio))
    return Bounds(multiple=multiple, min_ratio=low, max_ratio=high, exclude=_names(exclude))


def _names(text: str) -> tuple[str, ...]:
    """Returns what commas separate."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _anchored(data: str | None) -> str | None:
    """Returns a data reference with its folder made absolute, so that any folder can resume."""
    kind, colon, path = (data or "").partition(":")
    return f"{kind}:{Path(path).resolve()}" if colon and Path(path).is_dir() else data


def _absolute(weights: str | None) -> str | None:
    """Returns the path of weights made absolute; a library's own have a name and no path."""
    return str(Path(weights).resolve()) if weights and Path(weights).is_file() else weights


def search(
    options: SearchOptions,
    *,
    run: str | None,
    runs_dir: Path,
    quiet: bool,
    as_json: bool = False,
) -> str:
    """Runs a search in a new run folder, prints its front, and returns the run's name."""
    spec = options.checked()
    if run is not None:
        runs.check_name(runs_dir, run)
    problem = problem_of(spec, quiet)
    check_reports(spec.reports, problem)
    with long_step(progress_console(), f"Tracing {spec.model}", quiet=quiet):
        graph = trace(problem.model, problem.example_inputs)
        checks.check_reachable(graph, spec.flops, spec.bounds)
    name = run or runs.default_name(runs_dir, problem.name, spec.flops)
    folder = runs.create_run(runs_dir, name, spec)
    try:
        if spec.weights is None:
            write_weights(problem.model, folder / DENSE_FILE)
        _search(problem, spec, folder, quiet, as_json)
    except BaseException:
        if not _has_begun(folder, spec):  # leave nothing half-made
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return name


def _has_begun(folder: Path, spec: RunSpec) -> bool:
    try:
        read_run(folder, spec.storage)
    except ValueError:
        return False
    except StoreFailed:  # a database that went away: what was evaluated is in the folder
        return (folder / EVALUATIONS).exists()
    return True


def resume(name: str, *, runs_dir: Path, quiet: bool, as_json: bool = False) -> None:
    """Continues a run, and writes to MLflow what it lacks."""
    folder, spec = runs.load_run(runs_dir, name)
    _search(problem_of(spec, quiet, folder), spec, folder, quiet, as_json)


def problem_of(spec: RunSpec, quiet: bool, folder: Path | None = None) -> Problem:
    """Returns the problem of a run.

    Args:
        spec: What its run.json says.
        quiet: Shows no progress.
        folder: Of a run that has begun: its dense network is the one that was searched, even
            where it was trained on the spot and a second training would end elsewhere.
    """
    dense = None if folder is None else folder / DENSE_FILE
    kept = dense is not None and dense.exists()
    given = str(dense) if kept and spec.model in RECIPES else spec.weights
    with long_step(progress_console(), f"Preparing {spec.model}", quiet=quiet) as progress:
        problem = build_problem(
            spec.model, data=spec.data, weights=given, seed=spec.seed, progress=progress
        )
        if kept and dense is not None:
            load_weights(problem.model, dense)
    return problem


def _search(problem: Problem, spec: RunSpec, folder: Path, quiet: bool, as_json: bool) -> None:
    """Searches until all trials are finished, and prints the front.

    Raises:
        typer.Exit: With status 130, if the user interrupts.
    """
    finetuning = finetuning_of(spec, problem)
    steps = spec.strategy == "everything"
    shown = SearchProgress(progress_console(), quiet=quiet, then=_then(spec, folder), steps=steps)
    tracked = MlflowListener(
        folder, spec, thop_macs=lambda: thop_macs(problem.model, problem.example_inputs)
    )
    try:
        with shown, _metered(spec, folder):
            run_search(
                problem,
                spec.flops,
                spec.trials,
                strategy=spec.strategy,
                criteria=spec.criteria,
                objectives=spec.objectives,
                granularity=spec.granularity,
                bounds=spec.bounds,
                sampler=None if steps else spec.sampler,  # older runs name one
                finetuning=finetuning,
                seed=spec.seed,
                workers=spec.workers,
                address=spec.address,
                gpus_per_trial=spec.gpus_per_trial,
                trial_timeout=spec.trial_timeout,
                run_dir=folder,
                storage=spec.storage,
                saliency_dir=folder.parent / runs.SALIENCY_DIR,
                listeners=(shown, tracked),
                progress=shown.preparing,
            )
    except SearchInterrupted:
        view = view_of(folder, spec)
        _print_result(view, folder, as_json)
        typer.echo(
            f"interrupted after {len(view.records)} of {spec.trials} trials, which are kept; "
            f"continue with: paretoprune resume {_named(folder)}",
            err=True,
        )
        raise typer.Exit(130) from None
    view = view_of(folder, spec)
    reported = _reported(problem, view, spec, folder, quiet)
    _print_result(view, folder, as_json, reported)
    if not view.front_rows:
        raise typer.Exit(1)
    if as_json:
        return
    typer.echo(f"look at it:      paretoprune ui {_named(folder)}")
    typer.echo(f"export the best: paretoprune export {_named(folder)} --to DIR")


def _reported(
    problem: Problem, view: SearchView, spec: RunSpec, folder: Path, quiet: bool
) -> Mapping[str, float]:
    """Measures the reports of the best network, if any, prints them, and writes them to MLflow."""
    if not spec.reports or view.best is None:
        return {}
    title = f"Measuring {', '.join(spec.reports)} of trial {view.best.number}"
    with long_step(progress_console(), title, quiet=quiet) as progress:
        metrics = report_best(
            problem, view.best, spec.reports, folder, seed=spec.seed, progress=progress
        )
    try:
        log_reports(json.loads((folder / runs.TRACKING_FILE).read_text()), metrics)
    except Exception as error:  # the run's folder has them
        typer.echo(f"the reports are not in MLflow: {one_line(error)}", err=True)
    return metrics


def finetuning_of(spec: RunSpec, problem: Problem) -> Finetuning | None:
    """Returns how a run trains; None if it does not."""
    if not spec.finetune and not spec.recovery:
        return None
    trainer = FineTuner.of(problem, distil=spec.distil)
    return Finetuning(trainer, epochs=spec.finetune, top=spec.top, recovery=spec.recovery)


@contextmanager
def _metered(spec: RunSpec, folder: Path) -> Iterator[None]:
    """Adds the energy that this machine takes meanwhile to that of earlier drivers of the run."""
    if "energy" not in spec.reports:
        yield
        return
    with ExitStack() as stack:
        meter = stack.enter_context(metered())
        try:
            yield
        finally:
            stack.close()  # the meter is filled in now
            typer.echo(f"energy of {energy_of_run(folder, meter)}", err=True)


def _then(spec: RunSpec, folder: Path) -> str | None:
    """Returns what comes after the trials, and where to follow it."""
    if not spec.finetune:
        return None
    logs = folder / WEIGHTS / "*.log"
    return f"then the best {spec.top} are fine-tuned for {spec.finetune} epochs; see {logs}"


def _named(folder: Path) -> str:
    """Returns a run as the other commands take it."""
    other = "" if folder.parent == Path("runs") else f" --runs-dir {folder.parent}"
    return f"{folder.name}{other}"


def view_of(folder: Path, spec: RunSpec) -> SearchView:
    return SearchView.of(read_run(folder, spec.storage))


def _print_result(
    view: SearchView,
    folder: Path,
    as_json: bool,
    reported: Mapping[str, float] = MappingProxyType({}),
) -> None:
    if as_json:
        facts = {"run": folder.name, "folder": str(folder), **view.to_json()}
        typer.echo(json.dumps({**facts, "reports": dict(reported)}, indent=2))
        return
    _print_front(view, folder)
    if reported:
        for line in json.loads((folder / REPORTS_FILE).read_text())["lines"]:
            typer.echo(line)


def _print_front(view: SearchView, folder: Path) -> None:
    console = results_console()
    console.print(
        f"Pareto front of [bold]{folder.name}[/bold] after {len(view.records)} trials: no other "
        f"trial has {advantages(view)} at once; MACs are the papers' FLOPs, loss and accuracy "
        f"those on the search split"
    )
    if view.front_rows:
        console.print(front_table(view.front_rows, view.dense, view.dense_metrics))
    else:
        console.print("No trial completed, for these reasons:")
        for reason, number in reasons(view).items():
            console.print(f"  {number} x {reason}", markup=False)


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


def criteria() -> None:
    """Prints the table of criteria."""
    table = Table(box=None, pad_edge=False)
    for head in ("criterion", "what it measures", "what it needs", "paper"):
        table.add_column(head)
    for name, kind in CRITERIA.items():
        table.add_row(name, kind.summary, str(kind.cost), kind.paper)
    results_console().print(table)

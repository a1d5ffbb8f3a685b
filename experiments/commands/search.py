"""`paretoprune search` and `resume`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import typer

from paretoprune.experiments import runs
from paretoprune.experiments.commands.best_report import report_best
from paretoprune.experiments.commands.front import print_result, view_of
from paretoprune.experiments.commands.options import SearchOptions
from paretoprune.experiments.commands.progress import SearchProgress, long_step, progress_console
from paretoprune.experiments.finetuning import FineTuner, finetuning_for
from paretoprune.experiments.measuring.counting import thop_macs
from paretoprune.experiments.measuring.energy import energy_of_run, metered
from paretoprune.experiments.measuring.reports import check_reports
from paretoprune.experiments.places import check_folder
from paretoprune.experiments.recipes import RECIPES, build_problem
from paretoprune.experiments.references import load_weights
from paretoprune.experiments.runs import RunSpec
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.tracking.mlflow_runs import log_reports
from paretoprune.experiments.tracking.store import Tracked
from paretoprune.experiments.tracking.tracker import MlflowListener
from paretoprune.experiments.units import format_count
from paretoprune.search import (
    Finetuning,
    Listener,
    NothingCompleted,
    ParetoFront,
    Problem,
    Record,
    RunLocked,
    SearchInfo,
    SearchInterrupted,
    StoreFailed,
    read_run,
)
from paretoprune.search import search as run_search
from paretoprune.search.evaluation import one_line
from paretoprune.search.record import Failed
from paretoprune.search.stages import EVALUATIONS
from paretoprune.search.weights import FOLDER as WEIGHTS
from paretoprune.search.weights import write_weights

DENSE_FILE = "dense.safetensors"
"""In the run folder: the dense weights, where they came from no file."""


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
    check_folder(runs_dir)
    if run is not None:
        runs.check_name(runs_dir, run)
    if spec.storage is not None:
        _check_storage(spec.storage)
    problem = problem_of(spec, quiet)
    check_reports(spec.reports, problem)
    name = run or runs.default_name(runs_dir, problem.name, spec.flops)
    folder = runs.create_run(runs_dir, name, spec)
    try:
        if spec.weights is None:
            write_weights(problem.model, folder / DENSE_FILE)
        _search(problem, spec, folder, quiet, as_json)
    except BaseException as error:  # leave nothing half-made
        others = isinstance(error, RunLocked)  # a database that another search took meanwhile
        if others or not _has_begun(folder, spec):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return name


def _check_storage(storage: str) -> None:
    """Verifies that a database can hold a search, and holds none whose trials it would take."""
    from paretoprune.search.study import check_storage  # Optuna takes a while to import

    check_storage(storage)
    try:
        found = read_run(Path(), storage)
    except ValueError:
        return
    raise ValueError(
        f"the database of --storage holds a search of {found.problem} with {len(found.records)} "
        f"trials already; continue that one with `paretoprune resume`, or name another database."
    )


def _has_begun(folder: Path, spec: RunSpec) -> bool:
    try:
        read_run(folder, spec.storage)
    except ValueError:
        return False
    except StoreFailed:  # a database that went away: what was evaluated is in the folder
        return (folder / EVALUATIONS).exists()
    return True


def resume(
    name: str, trials: int | None, *, runs_dir: Path, quiet: bool, as_json: bool = False
) -> None:
    """Continues a run, to more trials where that is asked for; writes to MLflow what it lacks.

    Raises:
        ValueError: If the run was asked for as many trials already.
    """
    folder, spec = runs.load_run(runs_dir, name)
    if trials is not None:
        if trials <= spec.trials:
            raise ValueError(
                f"--trials of resume is more than the run was asked for, but got {trials} and "
                f"{name} was asked for {spec.trials}."
            )
        spec = replace(spec, trials=trials)
    problem = problem_of(spec, quiet, folder)
    changed = () if trials is None else (_Remembered(folder, spec),)
    _search(problem, spec, folder, quiet, as_json, changed)


class _Remembered(NamedTuple):
    """A listener that writes run.json once no other process can be driving the run."""

    folder: Path
    spec: RunSpec

    def started(self, info: SearchInfo) -> None:
        runs.write_json(self.folder / runs.RUN_FILE, self.spec.to_json())

    def finished(self, record: Record, front: ParetoFront) -> None:
        pass

    def ended(self, error: BaseException | None) -> None:
        pass


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


def _search(
    problem: Problem,
    spec: RunSpec,
    folder: Path,
    quiet: bool,
    as_json: bool,
    listeners: Sequence[Listener] = (),
) -> None:
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
                sampler=spec.sampler,
                finetuning=finetuning,
                seed=spec.seed,
                workers=spec.workers,
                address=spec.address,
                gpus_per_trial=spec.gpus_per_trial,
                trial_timeout=spec.trial_timeout,
                run_dir=folder,
                storage=spec.storage,
                saliency_dir=folder.parent / runs.SALIENCY_DIR,
                listeners=(*listeners, shown, tracked),
                progress=shown.preparing,
            )
    except NothingCompleted:
        pass  # what is printed below says why
    except SearchInterrupted:
        view = view_of(folder, spec)
        print_result(view, folder, as_json)
        typer.echo(
            f"{len(view.records)} of {spec.trials} trials are done and kept; continue with: "
            f"paretoprune resume {_named(folder)}",
            err=True,
        )
        raise typer.Exit(130) from None
    view = view_of(folder, spec)
    reported = _reported(problem, view, spec, folder, quiet)
    print_result(view, folder, as_json, reported)
    _say_failed(view, folder)
    if as_json:
        return
    typer.echo(f"look at it:      paretoprune ui {_named(folder)}")
    typer.echo(f"export the best: paretoprune export {_named(folder)} --to DIR")


def _say_failed(view: SearchView, folder: Path) -> None:
    """Says what a search did not do of what it was asked for.

    Raises:
        typer.Exit: With status 1, if there is no network at the target, or none of those that were
            to be fine-tuned is.
    """
    tried = {r.number: r.finetuned for r in view.records if r.finetuned is not None}
    failed = {at: one.error for at, one in tried.items() if isinstance(one, Failed)}
    for number, error in failed.items():
        typer.echo(
            f"fine-tuning of trial {number} failed: {error}; it is tried again by: "
            f"paretoprune resume {_named(folder)}",
            err=True,
        )
    if view.best is None and view.front_rows:
        least = min(row.macs for row in view.front_rows)
        typer.echo(
            f"no trial of {len(view.records)} meets the target of {format_count(view.target)} "
            f"MACs; the smallest network has {format_count(least)}. Go on with: "
            f"paretoprune resume {_named(folder)} --trials {2 * len(view.records)}",
            err=True,
        )
    if view.best is None or (tried and len(failed) == len(tried)):
        raise typer.Exit(1)


def _reported(
    problem: Problem, view: SearchView, spec: RunSpec, folder: Path, quiet: bool
) -> tuple[list[str], Mapping[str, float]]:
    """Returns lines and metrics of the reports on the best network, and writes MLflow these."""
    if not spec.reports or view.best is None:
        return [], {}
    title = f"Measuring {', '.join(spec.reports)} of trial {view.best.number}"
    with long_step(progress_console(), title, quiet=quiet) as progress:
        lines, metrics = report_best(
            problem, view.best, spec.reports, folder, seed=spec.seed, progress=progress
        )
    try:
        log_reports(Tracked.of(folder, spec), metrics)
    except Exception as error:  # the run's folder has them
        typer.echo(f"the reports are not in MLflow: {one_line(error)}", err=True)
    return lines, metrics


def finetuning_of(spec: RunSpec, problem: Problem) -> Finetuning | None:
    """Returns how a run trains; None if it does not."""
    if not spec.finetune and not spec.recovery:
        return None
    training = finetuning_for(problem.model)
    if spec.learning_rate is not None:
        training = replace(training, learning_rate=spec.learning_rate)
    trainer = FineTuner.of(problem, distil=spec.distil, training=training)
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

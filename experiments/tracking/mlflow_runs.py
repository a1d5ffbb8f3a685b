"""A search in MLflow: a view that can be rebuilt from its records at any time.

Only the driver writes, and in few calls. The only file that imports mlflow.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from paretoprune.criteria import UNBOUNDED, Bounds
from paretoprune.experiments.comparison import Shot
from paretoprune.experiments.runs import TRACKING_FILE, RunSpec, write_json
from paretoprune.experiments.showing import page
from paretoprune.experiments.showing.importance import importance
from paretoprune.experiments.showing.pictures import pictures
from paretoprune.experiments.showing.summary import costs, note, qualities
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.tracking.saved_view import front_link, view_link, view_tag
from paretoprune.experiments.tracking.store import Store, Tracked
from paretoprune.experiments.tracking.trial_facts import (
    metrics_of,
    params_of,
    run_name,
    table_of,
    tags_of,
)
from paretoprune.search import Completed, Failed, ParetoFront, Record, Stopped
from paretoprune.search.objectives import own_metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from torch import Tensor, nn


def connect(uri: str) -> MlflowClient:
    """Returns a client of a tracking URI; a server that is mute costs seconds, not minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with _silenced(), alone(uri):
        from mlflow import MlflowClient  # after the environment, which it reads once

        logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # what it raises is said by us
        return MlflowClient(tracking_uri=uri)


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Lets one process at a time make what is not there yet: MLflow's tables, an experiment."""
    kind, _, path = uri.partition(":///")
    if kind != "sqlite":
        yield
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed
        yield


@contextmanager
def _silenced() -> Iterator[None]:
    """Keeps what MLflow says about its own insides off the terminal."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _experiment(client: MlflowClient, store: Store, name: str) -> str:
    """Returns the id of an experiment: a new one, or the one there is, restored if deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        artifacts = store.artifacts and f"{store.artifacts}/{name}"
        about = (
            "Searches for smaller networks. Open a saved view under Views, or a run named "
            "after its search and then Artifacts, pareto/front.html."
        )
        tags = {"mlflow.note.content": about}
        return str(client.create_experiment(name, artifacts, tags=tags))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _log_metrics(client: MlflowClient, run: str, metrics: Sequence[Metric]) -> None:
    for start in range(0, len(metrics), 1000):  # MLflow's limit per call
        client.log_batch(run, metrics=metrics[start : start + 1000])


class SearchRuns:
    """The parent run and the child runs of one search in MLflow."""

    def __init__(self, client: MlflowClient, store: Store, run_dir: Path, spec: RunSpec) -> None:
        self._client = client
        self._store = store
        self._run_dir = run_dir
        self._spec = spec
        self._experiment = ""
        self._parent = ""
        self._children: dict[int, Run] = {}
        self._pareto: dict[int, bool] = {}

    def open(self, view: SearchView, thop_macs: int | None) -> None:
        """Finds or makes experiment, parent run and saved view, and finds the child runs."""
        with alone(self._store.uri):
            self._experiment = _experiment(self._client, self._store, view.name)
        spec = self._spec
        own = f"tags.search_id = '{spec.id}'"
        found = self._client.search_runs([self._experiment], f"{own} AND tags.kind = 'search'")
        if found:
            self._parent = found[0].info.run_id
            self._client.update_run(self._parent, status="RUNNING")
            self._client.set_tag(self._parent, "trials", str(spec.trials))  # a param cannot change
        else:
            self._parent = self._new_parent(view, thop_macs)
        for run in self._all_runs(f"{own} AND tags.kind = 'trial'"):
            self._children[int(run.data.tags["trial"])] = run
        self._pareto = {
            number: run.data.tags.get("pareto") == "true" for number, run in self._children.items()
        }
        title = f"Pareto front of {self._run_dir.name}"
        shown = {"qualities": qualities(view), "costs": costs(view)}
        key, value = view_tag(spec.id, title, _now(), **shown)
        self._client.set_experiment_tag(self._experiment, key, value)
        where = {"uri": self._store.uri, "experiment": self._experiment, "run": self._parent}
        write_json(self._run_dir / TRACKING_FILE, where)

    def _new_parent(self, view: SearchView, thop_macs: int | None) -> str:
        from mlflow.entities import Param

        spec = self._spec
        tags = {
            "kind": "search",
            "search": self._run_dir.name,
            "search_id": spec.id,
            "trials": str(spec.trials),
            "mlflow.source.name": "paretoprune",
        }
        run = self._client.create_run(self._experiment, run_name=self._run_dir.name, tags=tags)
        values: dict[str, Any] = {
            "model": spec.model,
            "data": spec.data or "of the model",
            "weights": spec.weights or "of the model",
            "strategy": spec.strategy,
            "finetune": spec.finetune,
            "target_macs": view.target,
            "criteria": ", ".join(spec.criteria),
            "objectives": ", ".join(spec.objectives),
            "granularity": spec.granularity,
            "bounds": _said(spec.bounds),
            "sampler": spec.sampler or "none",
            "seed": spec.seed,
            "dense_macs": view.dense.macs,
            "dense_params": view.dense.params,
            "dense_macs_by_thop": "not countable" if thop_macs is None else thop_macs,
        }
        values |= {f"dense_{name}": round(value, 4) for name, value in view.dense_metrics.items()}
        values |= {f"version_{name}": value for name, value in spec.libraries.items()}
        params = [Param(name, str(value)) for name, value in values.items()]
        self._client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

    def _all_runs(self, query: str) -> Iterable[Run]:
        token: str | None = None
        while token != "":
            found = self._client.search_runs([self._experiment], query, page_token=token)
            yield from found
            token = found.token or ""

    def add_missing(self, view: SearchView) -> None:
        """Writes the trials and the progress that MLflow lacks."""
        for record in view.records:
            run = self._children.get(record.number)
            told = run is not None and run.info.status != "RUNNING"  # a crash before the log
            trained = None if run is None else run.data.tags.get("finetuned")
            if not told or trained != tags_of(record).get("finetuned"):
                self.add(record, view)
        self.mark(view.front)
        history = self._client.get_metric_history(self._parent, "hypervolume")
        known = {metric.step for metric in history}
        self.add_progress([one for one in view.hypervolumes() if one[0] not in known], view)

    def add(self, record: Record, view: SearchView) -> None:
        """Writes one trial as a child run; a run begun earlier is completed."""
        from mlflow.entities import Metric, Param, RunTag

        tags = tags_of(record) | {
            "pareto": "false",  # until `mark` knows better
            "search": self._run_dir.name,
            "search_id": self._spec.id,
            "mlflow.parentRunId": self._parent,
        }
        begun = self._children.get(record.number)
        now = _now()
        if begun is None:
            outcome = record.outcome
            seconds = outcome.seconds if isinstance(outcome, Completed | Stopped) else 0.0
            start = now - round(1000 * seconds)
            begun = self._client.create_run(
                self._experiment, start, tags, run_name=run_name(record, view)
            )
            self._children[record.number] = begun
        self._pareto[record.number] = False
        run_id = begun.info.run_id
        metrics = metrics_of(record, view)
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, value, now, 0) for name, value in metrics.items()],
            params=[Param(name, value) for name, value in params_of(record, view).items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        if record.plan is not None:
            self._client.log_dict(run_id, record.plan.to_json(), "plan.json")
        failed = isinstance(record.outcome, Failed)
        self._client.set_terminated(run_id, "FAILED" if failed else "FINISHED", now)

    def mark(self, front: ParetoFront) -> None:
        """Brings the tag `pareto` of the child runs up to date."""
        members = {record.number for record in front.records}
        for number, was in self._pareto.items():
            if was != (number in members):
                run_id = self._children[number].info.run_id
                self._client.set_tag(run_id, "pareto", str(number in members).lower())
                self._pareto[number] = number in members

    def add_progress(self, hypervolumes: list[tuple[int, float]], view: SearchView) -> None:
        """Writes the parent's curves: hypervolume, and what the best reached."""
        from mlflow.entities import Metric

        now = _now()
        metrics = [Metric("hypervolume", round(v, 6), now, step) for step, v in hypervolumes]
        if hypervolumes and view.best is not None:
            best = view.best.outcome
            assert isinstance(best, Completed)
            metrics += [
                Metric(f"best_{name}", round(best.metrics[name], 4), now, hypervolumes[-1][0])
                for name in ("loss", "accuracy", "latency", *own_metrics(best.metrics))
                if name in best.metrics
            ]
        _log_metrics(self._client, self._parent, metrics)

    def draw(self, view: SearchView, name: str) -> None:
        """Writes plots, table and description on the parent run."""
        spec = self._spec
        here = (self._experiment, self._parent)
        links = (
            f"[Open the front, interactive]({front_link('.', *here)}) · "
            f"[the front as runs]({view_link('.', self._experiment, spec.id)})"
        )
        asked = f"{spec.trials} trials of {spec.model} with {', '.join(spec.criteria)}"
        description = note(view, name, asked, links if view.front_rows else "")
        self._client.set_tag(self._parent, "mlflow.note.content", description)
        if not view.front_rows:
            return
        found = importance(view)
        for file, figure in pictures(view, found):
            self._client.log_figure(self._parent, figure, f"pareto/{file}")
        self._client.log_text(self._parent, page.front_page(view, found), "pareto/front.html")
        self._client.log_dict(self._parent, table_of(view.front_rows), "pareto/front.json")
        shown = '[{"path": "pareto/front.json", "type": "table"}]'
        self._client.set_tag(self._parent, "mlflow.loggedArtifacts", shown)

    def close(self, error: BaseException | None) -> None:
        """Ends the parent run, by what ended the search before its end."""
        status = "FINISHED" if error is None else "FAILED"
        if isinstance(error, KeyboardInterrupt):
            status = "KILLED"
        self._client.set_terminated(self._parent, status)


def log_comparison(
    store: Store, problem: str, flops: str, shots: Sequence[Shot], files: Iterable[Path]
) -> None:
    """Writes a comparison of criteria: a run with a metric per criterion, its CSV and plot.

    Args:
        store: Where MLflow keeps runs.
        problem: Name of the experiment.
        flops: The targets as they were given.
        shots: What was measured.
        files: CSV and plot.
    """
    from mlflow.entities import Metric, Param

    client = connect(store.uri)
    experiment = _experiment(client, store, problem)
    tags = {"kind": "comparison", "mlflow.source.name": "paretoprune"}
    run = client.create_run(experiment, tags=tags, run_name=f"criteria at {flops}").info.run_id
    metrics = [
        Metric(
            f"{shot.recovery}/{shot.criterion}{'' if shot.ranking == 'units' else ' with blocks'}",
            shot.loss if shot.accuracy is None else shot.accuracy,
            _now(),
            round(100 * shot.macs_ratio),  # the step: percent of the MACs that are left
        )
        for shot in shots
    ]
    _log_metrics(client, run, metrics)
    client.log_batch(run, params=[Param("flops", flops)])
    for file in files:  # and not their folder, which may hold anything
        client.log_artifact(run, str(file))
    client.set_terminated(run)


def _said(bounds: Bounds) -> str:
    """Returns the bounds that are none of the defaults, such as `multiple 8, max_ratio 0.8`."""
    plain = UNBOUNDED.to_json()
    given = {name: value for name, value in bounds.to_json().items() if value != plain[name]}
    if bounds.exclude:
        given["exclude"] = " ".join(bounds.exclude)
    return ", ".join(f"{name} {value}" for name, value in given.items()) or "none"


def log_reports(tracked: Tracked, metrics: Mapping[str, float]) -> None:
    """Writes what reports measured of the best network, by name, onto the run of its search."""
    from mlflow.entities import Metric

    now = _now()
    named = [Metric(f"report/{name}", value, now, 0) for name, value in metrics.items()]
    connect(tracked.uri).log_batch(tracked.parent, metrics=named)


def _now() -> int:
    return round(1000 * time.time())


@contextmanager
def _tracking_to(uri: str) -> Iterator[None]:
    """Sets MLflow's own tracking URI, which it also writes into the environment, for a while."""
    import mlflow

    known: bool = mlflow.is_tracking_uri_set()  # type: ignore[no-untyped-call]
    before = mlflow.get_tracking_uri() if known else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None unsets it


def register_export(
    tracked: Tracked,
    trial: int,
    name: str,
    directory: Path,
    model: nn.Module,
    example: Tensor,
    *,
    about: str = "",
    metrics: Mapping[str, float] = MappingProxyType({}),
) -> str:
    """Puts an export on its trial's run and registers the network as a model that loads.

    MLflow stores the network as a `torch.export` program, so loading it unpickles nothing.

    Args:
        tracked: Where its search lies.
        trial: Number of the exported trial.
        name: Of the registered model, once without MLflow's separators; it counts its versions.
        directory: The export's folder.
        model: The exported network, in eval mode on the CPU.
        example: Inputs of at least two examples, so that the batch size stays free.
        about: Description of the model's version, in Markdown.
        metrics: What else was measured, for the trial's run.

    Returns:
        The URI under which MLflow loads the model.

    Raises:
        LookupError: If MLflow has no run of the trial.
    """
    client = connect(tracked.uri)
    import mlflow
    import mlflow.pytorch

    query = f"tags.search_id = '{tracked.search_id}' AND tags.trial = '{trial}'"
    found = client.search_runs([tracked.experiment], query)
    if not found:
        raise LookupError(f"there is no run of trial {trial}")
    run_id = found[0].info.run_id
    client.log_artifacts(run_id, str(directory), "export")
    for key, value in metrics.items():
        client.log_metric(run_id, key, round(value, 6))
    name = name.replace(":", "-").replace("/", "-")  # MLflow's own separators
    info = found[0].info
    try:
        with _tracking_to(tracked.uri), mlflow.start_run(run_id=run_id), _silenced():
            logged = mlflow.pytorch.log_model(
                model,
                name="exported",
                input_example=example.cpu().numpy(),
                pip_requirements=[f"torch=={version('torch')}"],  # inferring takes ten seconds
                registered_model_name=name,
            )
    finally:  # the model is no part of how the trial ended, nor of the time that it took
        client.set_terminated(run_id, info.status, info.end_time)
    version_number = logged.registered_model_version
    client.update_model_version(name, version_number, about)
    client.set_registered_model_alias(name, "exported", version_number)
    return f"models:/{name}@exported"

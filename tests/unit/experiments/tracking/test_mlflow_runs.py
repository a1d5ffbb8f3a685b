"""MLflow shows every trial once, is brought up to date on resume, and never ends a search."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.criteria import Bounds
from paretoprune.experiments.comparison import Shot
from paretoprune.experiments.runs import RunSpec, create_run
from paretoprune.experiments.showing import page
from paretoprune.experiments.showing.summary import costs, qualities
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.tracking import mlflow_runs as tracking
from paretoprune.experiments.tracking import tracker
from paretoprune.experiments.tracking.mlflow_runs import (
    _tracking_to,
    connect,
    log_comparison,
    register_export,
)
from paretoprune.experiments.tracking.saved_view import view_tag
from paretoprune.experiments.tracking.store import Store, Tracked, store_of
from paretoprune.experiments.tracking.tracker import MlflowListener
from paretoprune.search import Completed, Direction, Failed, Objective, ParetoFront, Record
from tests.unit.experiments.infos import info_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

SPEC = RunSpec("made-up", 0.5, 7, ("l2", "taylor"))


@pytest.fixture
def folder(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with a store beside it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = create_run(tmp_path / "runs", "first", SPEC)
    shutil.copy(empty_database, run.parent)
    return run


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a test the plots."""
    monkeypatch.setattr(page, "front_page", lambda view, found: "")
    monkeypatch.setattr(tracking, "pictures", lambda view, found: [])


def curve_of(history: list[Metric]) -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in history]


def expected_curve(view: SearchView) -> list[tuple[int, float]]:
    return [(number, round(value, 6)) for number, value in view.hypervolumes()]


def play(
    listener: MlflowListener, view: SearchView, *, before: int = 0, upto: int = 7
) -> Iterator[Record]:
    """Tells a listener of a search whose first records are there already."""
    listener.started(info_of(view, view.records[:before]))
    for at, record in enumerate(view.records[before:upto], start=before + 1):
        listener.finished(record, ParetoFront.of(view.records[:at], view.objectives))
        yield record


def played(listener: MlflowListener, view: SearchView, *, before: int = 0) -> None:
    for _ in play(listener, view, before=before):
        pass
    listener.ended(None)


def runs_in(folder: Path) -> tuple[MlflowClient, Run, dict[int, Run]]:
    """Returns the client, the parent run and the child runs by trial."""
    client = connect(store_of(folder.parent).uri)
    where = json.loads((folder / "mlflow.json").read_text())
    children = client.search_runs(
        [where["experiment"]], f"tags.`mlflow.parentRunId` = '{where['run']}'"
    )
    numbers = [int(run.data.tags["trial"]) for run in children]
    assert len(set(numbers)) == len(numbers), "a trial is there twice"
    return client, client.get_run(where["run"]), dict(zip(numbers, children, strict=True))


def test_a_search_becomes_a_parent_and_a_child_per_trial(folder: Path, view: SearchView) -> None:
    played(MlflowListener(folder, SPEC, thop_macs=lambda: 1_000_000), view)
    client, parent, children = runs_in(folder)
    assert sorted(children) == list(range(7))
    assert children[1].info.run_name == "t001 95.0% @ 49.8%"
    assert children[2].info.run_name == "t002 infeasible"
    assert children[1].data.metrics == {
        "accuracy": 0.95,
        "loss": 0.2,
        "macs": 498_000,
        "params": 9960,
        "macs_ratio": 0.498,
        "flops_reduction": 0.502,
        "seconds": 1.5,
    }
    assert children[3].data.params == {
        "criterion": "l2",
        "allocation": "global",
        "budget": "0.3000",
        "removed": "layer1.1",
        "pruning_ratio.stem": "0.000",
        "pruning_ratio.layer1": "0.750",
        "pruning_ratio.layer2": "0.000",
    }
    pareto = {number for number, run in children.items() if run.data.tags["pareto"] == "true"}
    assert pareto == {1, 3, 4}
    taken = {number: run.info.end_time - run.info.start_time for number, run in children.items()}
    assert (taken[1], taken[2]) == (1500, 0)  # in milliseconds, as the records say
    assert children[5].info.status == "FAILED"
    assert children[5].data.tags["reason"] == "ValueError: not finite"
    assert {run.data.tags["origin"] for run in children.values()} == {"seed", "sampler"}
    assert parent.info.run_name == "first"
    assert parent.info.status == "FINISHED"
    assert parent.data.params["dense_macs_by_thop"] == "1000000"
    assert "trial 1 keeps 49.8 %" in parent.data.tags["mlflow.note.content"]
    files = {file.path for file in client.list_artifacts(parent.info.run_id, "pareto")}
    names = ("architecture", "front", "hypervolume", "ratios")
    pages = {"pareto/front.html", "pareto/front.json"}
    assert files == {f"pareto/{name}.png" for name in names} | pages
    history = client.get_metric_history(parent.info.run_id, "hypervolume")
    assert curve_of(history) == expected_curve(view)
    best = curve_of(client.get_metric_history(parent.info.run_id, "best_loss"))
    assert best == [(0, 0.5), (1, 0.2), (3, 0.2), (4, 0.2), (6, 0.2)]


@pytest.mark.usefixtures("undrawn")
def test_a_parent_says_what_is_searched(folder: Path, view: SearchView) -> None:
    bounds = Bounds(multiple=8, max_ratio=0.8, exclude=("stem", "layer1*"))
    spec = RunSpec("digits", 0.5, 7, ("l2", "taylor"), bounds=bounds, weights="w", seed=3)
    MlflowListener(folder, spec).started(info_of(view))
    params = runs_in(folder)[1].data.params
    assert {name: params[name] for name in params if not name.startswith("version_")} == {
        "model": "digits",
        "data": "of the model",
        "weights": "w",
        "strategy": "optuna",
        "finetune": "0",
        "target_macs": "500000",
        "criteria": "l2, taylor",
        "objectives": "loss, macs",
        "granularity": "group",
        "bounds": "multiple 8, max_ratio 0.8, exclude stem layer1*",
        "sampler": "damage",
        "seed": "3",
        "dense_macs": "1000000",
        "dense_params": "20000",
        "dense_macs_by_thop": "not countable",
        "dense_loss": "0.01",
        "dense_accuracy": "0.99",
    }
    assert params["version_torch"] == version("torch")


@pytest.mark.usefixtures("undrawn")
def test_the_plan_is_kept_with_its_trial(folder: Path, view: SearchView, tmp_path: Path) -> None:
    played(MlflowListener(folder, SPEC), view)
    client, _, children = runs_in(folder)
    file = client.download_artifacts(children[3].info.run_id, "plan.json", str(tmp_path))
    plan = view.records[3].plan
    assert plan is not None
    assert json.loads(Path(file).read_text()) == plan.to_json()


@pytest.mark.usefixtures("undrawn")
def test_resuming_adds_what_is_missing_and_nothing_twice(folder: Path, view: SearchView) -> None:
    killed = play(MlflowListener(folder, SPEC), view)
    for _ in range(3):  # the driver dies after three trials; the study has five
        next(killed)
    client, _, children = runs_in(folder)
    where = json.loads((folder / "mlflow.json").read_text())
    begun = client.create_run(  # and it died between creating a run and writing it
        where["experiment"],
        tags={"kind": "trial", "trial": "3", "search_id": SPEC.id, **_child_of(where["run"])},
    )
    played(MlflowListener(folder, SPEC), view, before=5)
    client, parent, children = runs_in(folder)
    assert sorted(children) == list(range(7))
    assert children[3].info.run_id == begun.info.run_id
    assert children[3].data.metrics["loss"] == 0.3
    assert {n for n, run in children.items() if run.data.tags["pareto"] == "true"} == {1, 3, 4}
    history = client.get_metric_history(parent.info.run_id, "hypervolume")
    assert curve_of(history) == expected_curve(view)


@pytest.mark.usefixtures("undrawn")
def test_a_fine_tuning_that_is_tried_again_is_brought_up_to_date(
    folder: Path, view: SearchView
) -> None:
    record = view.records[1]
    metrics = {"loss": 0.3, "loss_before": 0.2, "epochs": 5.0, "taken": 0.0}
    ends: dict[str, Completed | Failed] = {
        "failed": Failed("OSError: the disk is gone"),
        "worse": Completed(metrics, 9.0),
        "taken": Completed({**metrics, "loss": 0.1, "taken": 1.0}, 9.0),
    }
    for word, end in ends.items():
        told = view.told(replace(record, finetuned=end))
        listener = MlflowListener(folder, SPEC)
        listener.started(info_of(told, told.records))
        listener.ended(None)
        _, _, children = runs_in(folder)
        tags, shown = children[1].data.tags, children[1].data.metrics
        assert tags["finetuned"] == word
        assert {"failed": "disk is gone", "worse": "worse than it began", "taken": ""}[
            word
        ] in tags["finetuning_reason"]
        assert "finetuned" not in children[3].data.tags
        if isinstance(end, Completed):
            assert shown["finetuned_loss"] == end.metrics["loss"]
            assert shown["finetuned_loss_before"] == 0.2
    assert not tags["finetuning_reason"]


def _child_of(parent: str) -> dict[str, str]:
    return {"mlflow.parentRunId": parent}


@pytest.mark.usefixtures("undrawn")
def test_everything_can_be_rebuilt_from_the_records(folder: Path, view: SearchView) -> None:
    listener = MlflowListener(folder, SPEC)
    listener.started(info_of(view, view.records))
    listener.ended(None)
    _, parent, children = runs_in(folder)
    assert sorted(children) == list(range(7))
    assert parent.info.status == "FINISHED"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "KILLED"), (RuntimeError("no worker"), "FAILED")]
)
def test_a_search_that_ended_early_says_so(
    folder: Path, view: SearchView, error: BaseException, status: str
) -> None:
    listener = MlflowListener(folder, SPEC)
    next(play(listener, view))
    listener.ended(error)
    assert runs_in(folder)[1].info.status == status


def test_a_search_without_a_completed_trial_is_shown(folder: Path, view: SearchView) -> None:
    nothing = replace(view, records=(view.records[2],))
    played(MlflowListener(folder, SPEC), nothing)
    _, parent, children = runs_in(folder)
    assert sorted(children) == [2]
    assert "no completed trial" in parent.data.tags["mlflow.note.content"]


def test_an_absent_server_costs_one_sentence(
    folder: Path, view: SearchView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    said: list[str] = []
    listener = MlflowListener(folder, SPEC, warn=said.append)
    for _ in play(listener, view):
        assert len(said) == 1
    assert "paretoprune resume first" in said[0]
    assert "http://127.0.0.1:9" in said[0]


def refuse(uri: str) -> None:
    raise ConnectionError("refused")


@pytest.mark.usefixtures("undrawn")
def test_a_server_that_comes_back_gets_everything_at_the_end(
    folder: Path, view: SearchView, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    listener = MlflowListener(folder, SPEC, warn=said.append)
    with monkeypatch.context() as patch:
        patch.setattr(tracker, "connect", refuse)
        for _ in play(listener, view):
            pass
    listener.ended(None)
    assert len(said) == 1
    assert sorted(runs_in(folder)[2]) == list(range(7))


@pytest.mark.usefixtures("undrawn")
def test_a_server_that_comes_back_is_found_while_the_search_goes_on(
    folder: Path, view: SearchView, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    listener = MlflowListener(folder, SPEC, warn=said.append)
    with monkeypatch.context() as patch:
        patch.setattr(tracker, "connect", refuse)
        patch.setattr(tracker, "_RETRY_SECONDS", 0.0)
        for _ in play(listener, view, upto=4):
            pass
    listener.finished(view.records[4], view.front)
    assert len(said) == 1
    assert sorted(runs_in(folder)[2]) == list(range(5))


def test_several_searches_may_begin_in_an_empty_folder(tmp_path: Path) -> None:
    code = "import sys; from paretoprune.experiments.tracking.mlflow_runs import connect\n"
    code += "print(len(connect(sys.argv[1]).search_experiments()))"
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/mlflow.db"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [one.communicate(timeout=300)[0] for one in started] == ["1\n"] * 3


@pytest.mark.usefixtures("undrawn")
def test_two_runs_of_one_name_are_kept_apart(folder: Path, view: SearchView) -> None:
    played(MlflowListener(folder, SPEC), view)
    again = RunSpec("made-up", 0.5, 7, ("l2",))
    played(MlflowListener(folder, again), view)
    client, parent, children = runs_in(folder)
    assert sorted(children) == list(range(7))
    everything = client.search_runs([parent.info.experiment_id], "tags.kind = 'trial'")
    assert len(everything) == 14


@pytest.mark.usefixtures("undrawn")
def test_a_saved_view_opens_on_the_front(folder: Path, view: SearchView) -> None:
    played(MlflowListener(folder, SPEC), view)
    client, parent, _ = runs_in(folder)
    tags = client.get_experiment(parent.info.experiment_id).tags
    saved = json.loads(tags[f"mlflow.sharedViewState.{SPEC.id}"])
    state = json.loads(saved["state"])
    assert saved["name"] == "Pareto front of first"
    found = client.search_runs([parent.info.experiment_id], state["searchFilter"])
    assert {int(run.data.tags["trial"]) for run in found} == {1, 3, 4}
    drawn = [chart["uuid"] for chart in state["compareRunCharts"]]
    assert drawn[:3] == [
        "accuracy-over-macs_ratio",
        "loss-over-macs_ratio",
        "accuracy-over-params",
    ]


def test_a_saved_view_draws_what_is_optimised(view: SearchView) -> None:
    objectives = tuple(
        Objective(name, Direction.MAXIMIZE, "", 0.0) for name in ("miou", "latency")
    )
    dense = {"loss": 0.1, "miou": 0.7, "latency": 3.0}
    own = replace(view, objectives=objectives, dense_metrics=dense)
    _, value = view_tag("0" * 12, "front", 0, qualities=qualities(own), costs=costs(own))
    *scatters, parallel = json.loads(json.loads(value)["state"])["compareRunCharts"]
    assert [(one["xaxis"]["key"], one["yaxis"]["key"]) for one in scatters] == [
        ("macs_ratio", "miou"),
        ("macs_ratio", "loss"),
        ("params", "miou"),
        ("latency", "miou"),
    ]
    assert {"miou", "loss", "latency"} < set(parallel["selectedMetrics"])


def test_a_saved_view_fits_into_a_tag() -> None:
    qualities, costs = (
        ["panoptic_quality", "accuracy", "loss"],
        ["macs_ratio", "params", "latency"],
    )
    title = "Pareto front of " + "x" * 200
    key, value = view_tag("0" * 12, title, 0, qualities=qualities, costs=costs)
    assert len(key) <= 250
    assert len(value) <= 5000


def test_the_default_store_lies_with_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = store_of(tmp_path)
    assert store.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert store.artifacts == f"file://{tmp_path}/mlartifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert store_of(tmp_path) == Store("http://server")
    monkeypatch.chdir(tmp_path)  # the server of the UI runs in another folder
    for given, found in {
        "sqlite:///mine.db": f"sqlite:///{tmp_path}/mine.db",
        "sqlite:////mine.db": "sqlite:////mine.db",
        "./mlruns": f"file://{tmp_path}/mlruns",
        "file:mlruns": f"file://{tmp_path}/mlruns",
        "file:///mlruns": "file:///mlruns",
        "databricks": "databricks",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert store_of(tmp_path) == Store(found)


def test_a_comparison_goes_into_an_experiment_that_was_deleted(
    tmp_path: Path, empty_database: Path
) -> None:
    store = Store(f"sqlite:///{shutil.copy(empty_database, tmp_path)}")
    client = connect(store.uri)
    experiment = client.create_experiment("digits")
    client.delete_experiment(experiment)
    shot = Shot("l2", "units", 0.5, 0.5, 0.5, 0, "plain", 1.0, 0.7, 0.1)
    log_comparison(store, "digits", "50%", [shot], [])
    (logged,) = client.search_runs([experiment])
    assert logged.data.metrics == {"plain/l2": 0.7}


@pytest.mark.usefixtures("undrawn")
def test_an_export_becomes_a_model_that_loads_without_pickle(
    folder: Path, view: SearchView, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pytorch

    played(MlflowListener(folder, SPEC), view)
    client, _, children = runs_in(folder)
    run, tracked = children[3].info, Tracked.of(folder, SPEC)
    client.set_terminated(run.run_id, "FAILED", run.end_time)
    played(MlflowListener(folder, RunSpec("made-up", 0.5, 7, ("l2",))), view)  # has a trial 3, too
    export = folder.parent / "exported"
    export.mkdir()
    (export / "README.md").write_text("a card")
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    store = store_of(folder.parent)
    example, measured = torch.zeros(2, 4), {"fgsm_8": 0.5}
    given = (tracked, 3, "made:up", export, model, example)
    uri = register_export(*given, about="a card", metrics=measured)
    assert uri == "models:/made-up@exported"
    assert store_of(folder.parent) == store  # MLflow's own setting is as it was
    assert client.get_model_version("made-up", "1").description == "a card"
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with _tracking_to(store.uri):
        loaded = mlflow.pytorch.load_model(uri)
    inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
    torch.testing.assert_close(loaded(inputs), model(inputs), rtol=0, atol=0)
    files = [one.path for one in client.list_artifacts(run.run_id, "export")]
    assert files == ["export/README.md"]
    after = client.get_run(run.run_id)
    assert after.data.metrics == children[3].data.metrics | measured
    assert (after.info.status, after.info.end_time) == ("FAILED", run.end_time)
    with pytest.raises(LookupError, match="no run of trial 99"):
        register_export(tracked, 99, "made:up", export, model, example)

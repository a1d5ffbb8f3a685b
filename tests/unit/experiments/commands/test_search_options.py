"""Bounds, granularity and objectives on the command line, as a person gives them."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from paretoprune.criteria import CRITERIA, Bounds
from paretoprune.experiments.__main__ import main
from paretoprune.experiments.commands import search as command
from paretoprune.experiments.commands.options import SearchOptions
from paretoprune.experiments.comparison import Comparison
from paretoprune.experiments.models import digits_resnet
from paretoprune.experiments.recipes import build_problem
from paretoprune.experiments.showing.page import front_page
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.tracking.mlflow_runs import connect
from paretoprune.experiments.tracking.store import store_of
from paretoprune.search import Completed, Problem, evaluation, read_run
from paretoprune.search.journal import JournalFile
from paretoprune.surgery import PruningGraph, PruningPlan, trace


def search(weights: str, folder: Path, run: str, *options: str) -> int:
    given = ["--weights", weights, "--runs-dir", str(folder), "--run", run, "--quiet"]
    return main(["search", "digits", *given, "--workers", "0", "--criteria", "l2", *options])


def graph() -> PruningGraph:
    return trace(digits_resnet(), torch.randn(2, 1, 8, 8))


def within(plan: PruningPlan | None, bounds: Bounds) -> bool:
    """Whether a plan of the digits network keeps to bounds."""
    assert plan is not None
    network = graph()
    inside = {name for block in plan.removed for name in network.blocks[block].groups}
    kept = {
        group: len(plan.kept.get(group.name, range(group.size)))
        for group in network.open_groups
        if group.name not in inside
    }
    even = all(
        count % bounds.multiple == 0 or count == group.size for group, count in kept.items()
    )
    ratios = [1 - count / group.size for group, count in kept.items() if count < group.size]
    whole = not set(bounds.exclude) & plan.kept.keys()
    return even and whole and all(ratio <= bounds.max_ratio + 1e-9 for ratio in ratios)


def test_a_search_keeps_to_its_options_and_a_resumed_one_to_them(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--multiple", "2", "--max-ratio", "75%", "--exclude", "conv1, layer3.1")
    more = ("--granularity", "stage", "--objectives", "accuracy,params", "--trials", "6")
    assert search(untrained, tmp_path, "mine", "--flops", "60%", *options, *more) == 0
    info = read_run(tmp_path / "mine")
    bounds = Bounds(multiple=2, max_ratio=0.75, exclude=("conv1",))
    for record in info.records:
        assert within(record.plan, bounds)
        assert record.plan is not None
        assert "layer3.1" not in record.plan.removed
    assert [one.name for one in info.objectives] == ["accuracy", "params"]
    spec = json.loads((tmp_path / "mine" / "run.json").read_text())
    assert spec["bounds"]["exclude"] == ["conv1", "layer3.1"]
    where = json.loads((tmp_path / "mine" / "mlflow.json").read_text())
    params = connect(store_of(tmp_path).uri).get_run(where["run"]).data.params
    assert params["bounds"] == "multiple 2, max_ratio 0.75, exclude conv1 layer3.1"
    capsys.readouterr()
    (tmp_path / "mine" / "run.json").write_text(json.dumps({**spec, "trials": 7}))
    assert main(["resume", "mine", "--runs-dir", str(tmp_path), "--quiet"]) == 0
    (last,) = [one for one in read_run(tmp_path / "mine").records if one.number == 6]
    assert within(last.plan, bounds)
    changed = {**spec, "trials": 8, "bounds": {**spec["bounds"], "multiple": 4}}
    (tmp_path / "mine" / "run.json").write_text(json.dumps(changed))
    assert main(["resume", "mine", "--runs-dir", str(tmp_path), "--quiet"]) == 2
    assert "a search with other settings (bounds differ)" in capsys.readouterr().err


def test_every_option_reaches_the_search(
    untrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def spy(problem: Problem, flops: float, trials: int, **options: Any) -> None:
        given.update(options, flops=flops, trials=trials)
        raise ValueError("enough")

    monkeypatch.setattr(command, "run_search", spy)
    options = ["--weights", untrained, "--runs-dir", str(tmp_path), "--run", "mine", "--quiet"]
    options += ["--flops", "60%", "--trials", "7", "--criteria", "l1,obs", "--sampler", "tpe"]
    options += ["--objectives", "accuracy,params", "--granularity", "uniform", "--multiple", "2"]
    options += ["--seed", "3", "--workers", "2", "--gpus-per-trial", "0", "--trial-timeout", "9"]
    options += ["--finetune", "5", "--top", "2", "--storage", f"sqlite:///{tmp_path}/study.db"]
    options += ["--distill", "--learning-rate", "0.5", "--address", "127.0.0.1:9"]
    assert main(["search", "digits", *options]) == 2
    finetuning = given.pop("finetuning")
    assert (finetuning.epochs, finetuning.top, finetuning.recovery) == (5, 2, 0)
    assert finetuning.train.teacher is not None
    assert finetuning.train.training.learning_rate == 0.5
    del given["listeners"], given["progress"]
    assert given == {
        "flops": 0.6,
        "trials": 7,
        "strategy": "optuna",
        "criteria": ("l1", "obs"),
        "objectives": ("accuracy", "params"),
        "granularity": "uniform",
        "bounds": Bounds(multiple=2),
        "sampler": "tpe",
        "seed": 3,
        "workers": 2,
        "address": "127.0.0.1:9",
        "gpus_per_trial": 0.0,
        "trial_timeout": 9.0,
        "run_dir": tmp_path / "mine",
        "storage": f"sqlite:///{tmp_path}/study.db",
        "saliency_dir": tmp_path / ".saliency",
    }


def test_latency_is_measured_shown_and_tracked(
    untrained: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluation, "TIMED_SECONDS", 0.02)
    options = ("--objectives", "latency,loss", "--flops", "60%", "--trials", "4")
    assert search(untrained, tmp_path, "quick", *options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no other trial has a lower latency and a lower loss at once" in shown
    assert " ms " in shown
    info = read_run(tmp_path / "quick")
    dense = info.metrics["latency"]
    assert [(one.name, one.unit) for one in info.objectives] == [
        ("latency", "ms"),
        ("loss", "nats"),
    ]
    assert info.objectives[0].reference == dense > 0
    measured = {}
    for record in info.records:
        assert isinstance(record.outcome, Completed)
        measured[record.number] = record.outcome.metrics["latency"]
    assert all(0 < value < 1e4 for value in measured.values())
    fastest = min(measured, key=lambda number: measured[number])
    assert info.front.best().number == fastest
    for form in ("csv", "json"):
        assert main(["front", "quick", "--runs-dir", str(tmp_path), "--format", form]) == 0
        out = capsys.readouterr().out
        rows = json.loads(out) if form == "json" else list(csv.DictReader(out.splitlines()))
        assert {int(row["trial"]): float(row["latency"]) for row in rows} == {
            record.number: measured[record.number] for record in info.front.records
        }
    html = front_page(SearchView.of(info))
    assert "<th>latency</th>" in html
    assert "a lower latency and a lower loss at once" in html
    client = connect(store_of(tmp_path).uri)
    where = json.loads((tmp_path / "quick" / "mlflow.json").read_text())
    for run in client.search_runs([where["experiment"]], "tags.kind = 'trial'"):
        expected = measured[int(run.data.tags["trial"])]
        assert run.data.metrics["latency"] == pytest.approx(expected, abs=1e-4)
    params = client.get_run(where["run"]).data.params
    assert float(params["dense_latency"]) == pytest.approx(dense, abs=1e-4)
    assert (params["objectives"], params["granularity"], params["bounds"]) == (
        "latency, loss",
        "group",
        "none",
    )


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("cifar10:there", "cifar10:{here}/there"),
        ("cifar10:not/yet", "cifar10:{here}/not/yet"),
        ("imagefolder:~/photos", "imagefolder:{here}/photos"),
        ("there:there", "there:there"),  # a function, named like a folder
        ("digits", "digits"),
    ],
)
def test_a_folder_of_data_is_kept_from_the_root(
    given: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there").mkdir()
    spec = SearchOptions("digits", "50%", data=given).checked()
    assert spec.data == kept.format(here=tmp_path.resolve())


def test_a_finished_search_goes_on_to_more_trials(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(untrained, tmp_path, "more", "--flops", "60%", "--trials", "2") == 0
    resume = ["resume", "more", "--runs-dir", str(tmp_path), "--quiet"]
    assert main([*resume, "--trials", "4"]) == 0
    assert len(read_run(tmp_path / "more").records) == 4
    capsys.readouterr()
    assert main([*resume, "--trials", "4"]) == 2
    assert "but got 4 and more was asked for 4" in capsys.readouterr().err
    assert main(resume) == 0  # remembered: there is nothing left to do
    assert len(read_run(tmp_path / "more").records) == 4
    before = (tmp_path / "more" / "run.json").read_bytes()
    other = JournalFile(tmp_path / "more" / "journal.log")
    assert main([*resume, "--trials", "6"]) == 2
    other.close()
    assert "another search is running" in capsys.readouterr().err
    assert (tmp_path / "more" / "run.json").read_bytes() == before


def test_steps_that_end_above_the_target_are_no_success(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--flops", "20%", "--strategy", "everything", "--trials", "2")
    assert search(untrained, tmp_path, "short", *options) == 1
    said = capsys.readouterr()
    assert "no trial of 2 meets the target" in said.err
    assert "--trials 4" in said.err
    assert "export the best" not in said.out


def test_steps_keep_to_multiples_and_exclusions(untrained: str, tmp_path: Path) -> None:
    options = ("--multiple", "4", "--exclude", "layer2.1", "--strategy", "everything")
    assert search(untrained, tmp_path, "steps", "--flops", "70%", *options) == 0
    for record in read_run(tmp_path / "steps").records:
        assert within(record.plan, Bounds(multiple=4))
        assert record.plan is not None
        assert "layer2.1" not in record.plan.removed


def test_compared_plans_keep_to_the_bounds(untrained: str, tmp_path: Path) -> None:
    problem = build_problem("digits", weights=untrained)
    bounds = Bounds(multiple=4, exclude=("layer1.0.conv1",))
    graph = trace(problem.model, problem.example_inputs)
    comparison = Comparison(problem, graph, {"l2": CRITERIA["l2"]()}, tmp_path, bounds=bounds)
    assert within(comparison.plan("l2", 0.5, "units and blocks"), bounds)
    options = [
        "--multiple",
        "4",
        "--flops",
        "50%",
        "--criteria",
        "l2",
        "--runs-dir",
        str(tmp_path),
    ]
    assert main(["compare", "digits", "--weights", untrained, "--quiet", *options]) == 0


def test_a_search_reports_on_its_best_network(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--flops", "60%", "--trials", "2", "--report", "robustness,energy"]
    options += ["--finetune", "1", "--top", "1"]
    assert search(untrained, tmp_path, "told", *options) == 0
    shown = capsys.readouterr().out
    assert "robust   FGSM 8/255" in shown
    assert "energy   " in shown
    file = tmp_path / "told" / "reports.json"
    metrics = json.loads(file.read_text())["metrics"]
    assert metrics["dense_fgsm_2"] >= metrics["dense_fgsm_8"]
    assert 0 <= metrics["corrupted"] <= 1
    where = json.loads((tmp_path / "told" / "mlflow.json").read_text())
    logged = connect(store_of(tmp_path).uri).get_run(where["run"]).data.metrics
    assert logged["report/fgsm_8"] == pytest.approx(metrics["fgsm_8"])
    assert logged["report/energy_joules_per_1000"] > 0
    before = file.stat().st_mtime_ns
    assert main(["resume", "told", "--runs-dir", str(tmp_path), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reports"] == metrics
    assert file.stat().st_mtime_ns == before  # the same network is not measured again


def test_a_search_trains_at_the_rate_that_it_is_given(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--flops", "60%", "--trials", "1", "--finetune", "1", "--top", "1"]
    assert search(untrained, tmp_path, "wild", *options, "--learning-rate", "1e30") == 1
    assert "take a lower learning rate than 1e+30" in " ".join(capsys.readouterr().err.split())


def test_a_database_holds_one_search(
    untrained: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--flops", "60%", "--trials", "2", "--storage", "sqlite:///trials.db")
    assert search(untrained, tmp_path, "first", *options) == 0
    assert search(untrained, tmp_path, "second", *options) == 2
    said = capsys.readouterr().err
    assert "the database of --storage holds a search of digits with 2 trials already" in said
    assert not (tmp_path / "second").exists()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # a relative path is that of where it was given
    capsys.readouterr()
    assert main(["resume", "first", "--runs-dir", str(tmp_path), "--quiet", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["front"]) >= 1
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("trials.db", "a database is named by a URL such as sqlite:///trials.db"),
        ("postgresql://me:secret@host:port/name", "password@host/name, but got 'host:port/name'"),
        ("mysql://me:secret@host/name", "or in PostgreSQL, but got mysql://me:***@host/name"),
        ("postgresql+asyncpg://host/name", "no driver for postgresql+asyncpg is installed"),
        ("sqlite:///nowhere/trials.db", "lies in a folder that is there, but got"),
    ],
)
def test_what_is_no_database_is_refused_before_the_network_is_made(
    url: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(tmp_path / "not there, and not looked for yet")
    options = ("--flops", "60%", "--trials", "1", "--storage", url)
    assert search(weights, tmp_path, "never", *options) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert "secret" not in error
    assert not list(tmp_path.iterdir())


TAKEN = """
import shutil
from pathlib import Path
from typing import Any
import torch
from paretoprune.search.journal import lock

held = Path("late.db.lock").open("ab")

def data():
    shutil.copy("early.db", "late.db")  # another search begins while this one prepares
    lock(held, Path("late.db"))
    return [(torch.rand(400, 1, 8, 8), torch.arange(400) % 10)], None
"""


def test_a_search_whose_database_was_taken_leaves_no_run(
    untrained: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "taken_meanwhile.py").write_text(TAKEN)
    options = ("--flops", "60%", "--trials", "1", "--data", "digits")
    assert search(untrained, tmp_path, "early", *options, "--storage", "sqlite:///early.db") == 0
    options = (*options[:-1], "taken_meanwhile:data")
    assert search(untrained, tmp_path, "late", *options, "--storage", "sqlite:///late.db") == 2
    sys.modules["taken_meanwhile"].held.close()
    assert "another search is running" in capsys.readouterr().err
    assert not (tmp_path / "late").exists()

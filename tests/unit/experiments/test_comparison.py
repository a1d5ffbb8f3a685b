"""compare and bottlenecks, on the digits, as a person runs them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paretoprune.criteria import CRITERIA
from paretoprune.criteria.receding import is_receded
from paretoprune.experiments.__main__ import main
from paretoprune.experiments.comparison import Comparison
from paretoprune.experiments.models import digits_resnet
from paretoprune.experiments.recipes import build_problem
from paretoprune.experiments.tracking.mlflow_runs import connect
from paretoprune.experiments.tracking.store import store_of
from paretoprune.search import evaluate
from paretoprune.surgery import Reconstructor, load, prune, recalibrate, trace
from tests.unit.experiments.interrupting import interrupted


def run(command: str, weights: str, folder: Path, *options: str) -> int:
    return main(
        [command, "digits", "--weights", weights, "--runs-dir", str(folder), "--quiet", *options]
    )


def test_compare_writes_a_row_per_shot_a_plot_and_an_mlflow_run(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--flops", "50%,30%,", "--criteria", "l2,taylor,", "--blocks")
    assert run("compare", untrained, tmp_path, *options) == 0
    shown = capsys.readouterr()
    assert "taylor, with blocks" in shown.out
    assert "MLflow was not written" not in shown.err
    folder = tmp_path / "comparisons" / "digits-1"
    rows = list(csv.DictReader((folder / "criteria.csv").read_text().splitlines()))
    assert len(rows) == 2 * 2 * 2 * 3  # criteria, targets, rankings, recoveries
    for row in rows:
        assert 0.99 * float(row["target"]) < float(row["macs_ratio"]) <= float(row["target"])
    assert (folder / "criteria.png").stat().st_size > 10_000
    client = connect(store_of(tmp_path).uri)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    history = client.get_metric_history(logged.info.run_id, "reconstructed/taylor")
    assert {point.step for point in history} == {50, 30}
    assert {item.path for item in client.list_artifacts(logged.info.run_id)} == {
        "criteria.csv",
        "criteria.png",
    }


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--flops", "50"), "a FLOPs target without suffix counts MACs"),
        (("--flops", "0.1%"), "cannot be reached"),
        (("--flops", "50%", "--criteria", "tailor"), "unknown criterion 'tailor'"),
        (
            ("--flops", "50%", "--criteria", "l2", "--multiple", "8"),
            "smallest reachable without removing blocks within the bounds is 242,160 MACs",
        ),
        (
            ("--flops", "0.4%", "--criteria", "l2", "--blocks"),
            "no criterion has a plan within 1 % under 0.4%: plans of units and blocks have",
        ),
    ],
)
def test_misuse_of_compare_is_said_in_a_sentence(
    untrained: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    sentence: str,
) -> None:
    assert run("compare", untrained, tmp_path, *options) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "comparisons").exists()


def test_a_target_without_a_plan_is_left_out_and_named(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--flops", "80%,0.4%", "--criteria", "l2", "--blocks")
    assert run("compare", untrained, tmp_path, *options) == 0
    said = capsys.readouterr().out
    assert "no plan within 1 % under the target: l2 at 0.4%, l2, with blocks at 0.4%" in said
    file = tmp_path / "comparisons" / "digits-1" / "criteria.csv"
    rows = [*csv.DictReader(file.read_text().splitlines())]
    assert {row["target"] for row in rows} == {"0.8"}
    assert run("compare", untrained, tmp_path, *options, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["left_out"] == ["l2 at 0.4%", "l2, with blocks at 0.4%"]
    assert [(one["recovery"], round(one["loss"], 4)) for one in told["shots"]] == [
        (row["recovery"], float(row["loss"])) for row in rows
    ]


def test_a_comparison_puts_its_own_files_alone_into_mlflow(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("somebody's own")
    options = ("--flops", "50%", "--criteria", "l2", "--to", str(tmp_path))  # holds the runs, too
    assert run("compare", untrained, tmp_path, *options) == 0
    assert "MLflow was not written" not in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "mlartifacts").rglob("*") if file.is_file()} == {
        "criteria.csv",
        "criteria.png",
    }


def test_shots_measure_the_network_of_their_plan(untrained: str, tmp_path: Path) -> None:
    problem = build_problem("digits", weights=untrained)
    graph = trace(problem.model, problem.example_inputs)
    comparison = Comparison(problem, graph, {"l2": CRITERIA["l2"]()}, tmp_path)
    plan = comparison.plan("l2", 0.5, "units")
    small = prune(problem.model, graph, plan)
    assert problem.recalibration is not None
    assert problem.test is not None
    reconstruct = Reconstructor(problem.model, graph, problem.calibration)
    networks = {
        "plain": small,
        "recalibrated": recalibrate(small, problem.recalibration),
        "reconstructed": reconstruct(small, plan),
    }
    test = problem.test()
    for shot in comparison.shots([0.5], split=test):
        network = networks.pop(shot.recovery)
        assert trace(network, problem.example_inputs).cost() == comparison.graph.cost(plan)
        expected = evaluate(network, test, problem.loss)["loss"]
        assert shot.loss == pytest.approx(expected, rel=1e-4)
        assert shot.macs_ratio == comparison.graph.cost(plan).macs / comparison.graph.cost().macs
    assert not networks


def test_bottlenecks_writes_a_network_that_loads(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "wide"
    options = ("--flops", "30%", "--criterion", "taylor", "--factor", "1.5", "--to", str(to))
    assert run("bottlenecks", untrained, tmp_path, *options) == 0
    assert "pruning ratio" in capsys.readouterr().out
    wide, dense = load(to), digits_resnet()
    assert wide(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (wide, dense)]
    assert sizes[0] > sizes[1]


def test_bottlenecks_says_how_a_network_of_somebodys_own_loads(
    untrained: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = "from paretoprune.experiments.models import digits_resnet\n\nnet = digits_resnet\n"
    (tmp_path / "widened_own.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["bottlenecks", "widened_own:net", "--data", "digits", "--weights", untrained]
    arguments += ["--flops", "30%", "--criterion", "taylor", "--to", str(tmp_path / "wide")]
    assert main([*arguments, "--runs-dir", str(tmp_path), "--quiet"]) == 0
    call = re.search(r"surgery\.load\((.*)\)\.$", capsys.readouterr().out, re.MULTILINE)
    assert call is not None
    folder, reference = (part.strip('"') for part in call[1].split(", "))
    assert load(folder, reference)(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_a_factor_that_does_not_widen_is_refused(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--flops", "30%", "--factor", "1")
    assert run("bottlenecks", untrained, tmp_path, *options) == 2
    assert "a widening factor is a finite number above 1, but got 1.0" in capsys.readouterr().err


def test_criteria_lists_what_each_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["criteria"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in CRITERIA)
    assert "Hessian" in shown


def test_recede_writes_weights_that_a_recipe_takes(
    untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "receded.safetensors"
    arguments = ["recede", "digits", "--weights", untrained, "--to", str(to), "--epochs", "1"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "receded: loss" in shown.out
    training = build_problem("digits", weights=untrained).training
    assert training is not None
    assert f"epoch 1/1, 0 of {len(training)}" in shown.err
    assert is_receded(build_problem("digits", weights=str(to)).model)
    assert [file.name for file in tmp_path.iterdir()] == [to.name]
    assert main([*arguments, "--quiet"]) == 2
    assert "exists already; take another --to" in capsys.readouterr().err


def test_a_broken_recede_goes_on_and_ends_the_same(untrained: str, tmp_path: Path) -> None:
    arguments = ["recede", "digits", "--weights", untrained, "--epochs", "2", "--quiet"]
    assert main([*arguments, "--to", str(tmp_path / "whole.safetensors")]) == 0
    broken = [*arguments, "--to", str(tmp_path / "broken.safetensors")]
    with interrupted():
        assert main(broken) == 130
    assert main(broken) == 0
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


OTHERS = """
import torch
from torch.utils.data import TensorDataset

def first():
    torch.manual_seed(1)
    return TensorDataset(torch.rand(400, 1, 8, 8), torch.arange(400) % 10), None

def second():
    torch.manual_seed(2)
    return TensorDataset(torch.rand(400, 1, 8, 8), torch.arange(400) % 10), None
"""


def test_a_broken_recede_goes_on_with_the_same_data_alone(
    untrained: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "receded_on.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["recede", "digits", "--weights", untrained, "--epochs", "2", "--to"]
    arguments += [str(tmp_path / "broken.safetensors"), "--data"]
    with interrupted():
        assert main([*arguments, "receded_on:first"]) == 130
        assert main([*arguments, "receded_on:second"]) == 130
    assert "other data or other settings" in capsys.readouterr().err
    assert main([*arguments, "receded_on:second"]) == 0
    shown = capsys.readouterr().err
    assert "it is not taken" not in shown
    assert "epoch 1/2, loss" not in shown

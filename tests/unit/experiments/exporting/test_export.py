"""An export is the record's network, or it is not there at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paretoprune.experiments.commands.export import _registered
from paretoprune.experiments.exporting import export as exporting
from paretoprune.experiments.exporting.card import verdict
from paretoprune.experiments.exporting.export import export
from paretoprune.experiments.exporting.formats import FORMATS, ExportFailed
from paretoprune.experiments.measuring.counting import thop_macs
from paretoprune.experiments.measuring.reports import Report
from paretoprune.experiments.models import digits_resnet
from paretoprune.experiments.runs import RunSpec
from paretoprune.search import Candidate, Completed, Failed, Problem, Record
from paretoprune.search.evaluation import Evaluator
from paretoprune.search.latency import Latency, measure_latency
from paretoprune.search.metrics import evaluate
from paretoprune.surgery import PruningPlan, load, prune, trace

PLAN = PruningPlan({"layer1.0.conv1": (0, 2, 4), "layer2.0.conv1": tuple(range(8))}, ("layer3.1",))


@pytest.fixture(scope="module")
def problem() -> Problem:
    """A ResNet with random weights on random images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = digits_resnet().eval()
        batches = [(torch.randn(32, 1, 8, 8), torch.randint(10, (32,))) for _ in range(3)]
    return Problem(
        model,
        batches[0][0][:2],
        calibration=batches[:2],
        validation=batches[2:],
        test=lambda: batches[:1],
        name="made-up",
        reference="paretoprune.experiments.models:digits_resnet",
    )


@pytest.fixture(scope="module")
def record(problem: Problem) -> Record:
    """The trial of a plan, evaluated as a search does it."""
    graph = trace(problem.model, problem.example_inputs)
    metrics = Evaluator(problem, graph)(PLAN, 0).metrics
    return Record(3, Candidate("l2", 0.5), PLAN, graph.cost(PLAN), Completed(metrics, 0.1))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies of a unit test need not be exact."""

    def quickly(models: Any, inputs: Any) -> list[Latency]:
        return measure_latency(models, inputs, seconds=0.01)

    monkeypatch.setattr(exporting, "measure_latency", quickly)


def test_what_was_written_loads_and_computes_the_same(
    problem: Problem, record: Record, tmp_path: Path
) -> None:
    done = export(problem, record, tmp_path / "deep" / "small", run="first")
    reloaded = load(tmp_path / "deep" / "small")
    inputs = problem.validation[0][0]  # type: ignore[index]
    torch.testing.assert_close(reloaded(inputs), done.model(inputs), rtol=0, atol=0)
    assert [one.name for one in (tmp_path / "deep").iterdir()] == ["small"]
    assert record.cost is not None
    assert sum(p.numel() for p in reloaded.parameters()) == record.cost.params
    assert done.small.thop_macs == record.cost.macs


def test_the_card_states_what_was_measured(
    problem: Problem, record: Record, tmp_path: Path
) -> None:
    done = export(problem, record, tmp_path / "small", run="first")
    card = (tmp_path / "small" / "README.md").read_text()
    assert isinstance(record.outcome, Completed)
    assert f"| loss, search split | {done.dense.search['loss']:.4f} |" in card
    assert f"{100 * record.outcome.metrics['accuracy']:.2f} %" in card
    for network, measured in ((problem.model, done.dense), (done.model, done.small)):
        assert problem.test is not None
        expected = {**evaluate(network, problem.test()), "examples": 32}
        assert measured.test == pytest.approx(expected)
    assert "The test split, 32 examples that the search chose nothing by" in card
    assert "Trial 3 of run `first`, found by the search" in card
    assert "removed: layer3.1" in card
    assert "equal to the counts above" in card
    assert 'load("PATH/OF/THIS/FOLDER")' in card
    plan = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert plan["metrics"]["macs"] == done.small.cost.macs
    assert "outputs equal" in verdict(done.directory, done.dense, done.small)
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert abs(size - done.small.file_bytes) <= 64


def test_the_card_says_how_much_accuracy_was_lost(
    problem: Problem, record: Record, tmp_path: Path
) -> None:
    images = torch.randn(200, 1, 8, 8)
    with torch.no_grad():
        learnt = [(images, problem.model(images).argmax(1))]
        done = export(replace(problem, test=lambda: learnt), record, tmp_path / "small")
        right = 100 * float((done.model(images).argmax(1) == learnt[0][1]).float().mean())
    assert right < 100
    card = (tmp_path / "small" / "README.md").read_text()
    row = f"| 100.00 % | {right:.2f} % | -{100 - right:.2f} points |"
    assert f"| accuracy, test split {row}" in card


@pytest.mark.usefixtures("ascii_locale")
def test_the_card_is_utf_8_in_every_locale(
    problem: Problem, record: Record, tmp_path: Path
) -> None:
    export(problem, record, tmp_path / "small")
    assert "“FLOPs”" in (tmp_path / "small" / "README.md").read_text(encoding="utf-8")


def test_a_damaged_note_of_mlflow_is_said_and_the_export_stays(
    problem: Problem, record: Record, tmp_path: Path
) -> None:
    done = export(problem, record, tmp_path / "small")
    spec = RunSpec("made-up", 0.5, 1, ("l2",))
    gone = f"{tmp_path}/old/mlflow.db"  # where the runs were before they were moved
    moved = json.dumps({"uri": f"sqlite:///{gone}", "experiment": "1", "run": "abc"})
    (tmp_path / "old").mkdir()
    for text, said in (
        ("{", "JSONDecodeError: "),
        ("{}", "KeyError: 'uri'"),
        (moved, f"ValueError: the MLflow database {gone} is not there; `paretoprune resume"),
    ):
        (tmp_path / "mlflow.json").write_text(text)
        registered = _registered(done, problem, record, tmp_path, spec)
        assert registered.startswith(f"not registered: {said}")
    assert not Path(gone).exists()


def test_the_card_says_what_else_read_the_test_split(
    problem: Problem, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        name: lambda *_given, tested=tested: Report({}, {}, "", "## More", tested=tested)
        for name, tested in (("energy", False), ("attacks", True))
    }
    monkeypatch.setattr(exporting, "REPORTS", made)
    for name, ending in (("energy", "eval mode."), ("attacks", "mode and the robustness below.")):
        export(problem, record, tmp_path / name, reports=[name])
        card = (tmp_path / name / "README.md").read_text()
        assert "was read for this card: top-1 of both networks" in card
        assert ending in card


def test_another_format_is_on_the_card_and_in_the_plan(
    problem: Problem, record: Record, tmp_path: Path
) -> None:
    done = export(problem, record, tmp_path / "small", formats=["pt2"])
    (one,) = done.written
    model = torch.export.load(tmp_path / "small" / "model.pt2").module()
    inputs = problem.validation[0][0]  # type: ignore[index]
    torch.testing.assert_close(model(inputs), done.model(inputs))
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"| `model.pt2` | file size | {one.file_bytes[0] / 1e6:.2f} MB |" in card
    assert "on 32 examples of the search split" in card
    assert 'torch.export.load("model.pt2")' in card
    plan = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert plan["metrics"]["formats"]["pt2"]["file_bytes"] == one.file_bytes[1]
    assert f"on {one.examples} real inputs" in verdict(
        done.directory, done.dense, done.small, done.written
    )


def test_a_format_that_cannot_hold_the_network_leaves_nothing(
    problem: Problem, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(program: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setitem(FORMATS, "pt2", replace(FORMATS["pt2"], write=broken))
    with pytest.raises(ExportFailed, match="no space left on device"):
        export(problem, record, tmp_path / "small", formats=["pt2"])
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_unknown_origin_needs_its_function(
    problem: Problem, record: Record, tmp_path: Path
) -> None:
    export(replace(problem, reference=None, test=None), record, tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "make_dense_model" in card
    assert "No test split" in card
    with pytest.raises(ValueError, match="pass the function"):
        load(tmp_path / "small")
    load(tmp_path / "small", digits_resnet)


@pytest.mark.parametrize(
    ("targets", "read", "message"),
    [
        (torch.full((4,), 10), list, "cannot be measured: Target 10 is out of bounds"),
        (torch.zeros(4).long(), iter, "cannot be measured: it is read twice, but an iterator"),
        (None, list, "cannot be measured: "),
    ],
)
def test_a_test_split_that_cannot_be_measured_is_named(
    problem: Problem, record: Record, tmp_path: Path, targets: Any, read: Any, message: str
) -> None:
    odd = replace(problem, test=lambda: read([(torch.zeros(4, 1, 8, 8), targets)]))
    with pytest.raises(ValueError, match=f"the test split {message}"):
        export(odd, record, tmp_path / "small")
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(
    problem: Problem, record: Record, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists already"):
        export(problem, record, tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["mine.txt"]


def test_a_network_that_is_not_the_records_is_not_written(
    problem: Problem, record: Record, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = replace(problem, model=digits_resnet().eval())
    with pytest.raises(RuntimeError, match="weights or data must have changed"):
        export(other, record, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_not_left(
    problem: Problem, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> nn.Module:
        model = load(*arguments)
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
        return model

    monkeypatch.setattr(exporting, "load", wrong)
    with pytest.raises(RuntimeError, match="does not compute"):
        export(problem, record, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_trial_has_no_network(problem: Problem, record: Record, tmp_path: Path) -> None:
    failed = replace(record, outcome=Failed("out of memory"))
    with pytest.raises(ValueError, match="did not complete"):
        export(problem, failed, tmp_path / "small")


def test_latency_counts_as_better_beyond_the_spread_alone() -> None:
    dense = Latency(10, 1, 10)
    assert Latency(7.9, 1, 10).improves_on(dense)
    assert not Latency(8.1, 1, 10).improves_on(dense)
    assert not Latency(12, 0, 10).improves_on(dense)


def test_latency_that_does_not_improve_is_said_with_a_hint(
    problem: Problem, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    equal = [Latency(1, 0.1, 10)] * 2
    monkeypatch.setattr(exporting, "measure_latency", lambda models, inputs: equal)
    done = export(problem, record, tmp_path / "small")
    said = verdict(done.directory, done.dense, done.small)
    assert "Not faster than the dense network, beyond the spread, in: torch." in said
    assert "2 of the 12 layers have no multiple of 8" in said  # 3 channels, 10 classes
    assert "Not faster" in (tmp_path / "small" / "README.md").read_text()
    quick = [Latency(1, 0.1, 10), Latency(0.5, 0.1, 10)]
    monkeypatch.setattr(exporting, "measure_latency", lambda models, inputs: quick)
    done = export(problem, record, tmp_path / "quick")
    assert "Not faster" not in verdict(done.directory, done.dense, done.small)


def test_the_problem_is_left_as_it_was(problem: Problem, record: Record, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    problem.model.train()
    try:
        export(problem, record, tmp_path / "small")
        assert problem.model.training
    finally:
        problem.model.eval()
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_thop_agrees_and_leaves_the_model_alone(problem: Problem) -> None:
    keys = set(problem.model.state_dict())
    graph = trace(problem.model, problem.example_inputs)
    assert thop_macs(problem.model, problem.example_inputs) == graph.cost().macs
    small = prune(problem.model, graph, PLAN)
    assert thop_macs(small, {"images": problem.example_inputs}) == graph.cost(PLAN).macs
    assert set(problem.model.state_dict()) == keys
    assert not any(module._forward_hooks for module in problem.model.modules())


@pytest.mark.parametrize(
    "inputs", [{"flag": True, "x": torch.zeros(2, 3)}, (True, torch.zeros(2, 3))]
)
def test_thop_counts_per_example_also_where_a_flag_comes_first(inputs: Any) -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, flag: bool, x: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.linear(x)
            return outputs if flag else -outputs

    assert thop_macs(Flagged(), inputs) == 15


def test_thop_says_when_it_cannot_count() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum())

    assert thop_macs(Reads(), torch.zeros(2, 3)) is None


def test_latency_has_repeats_and_spread(problem: Problem) -> None:
    threads = torch.get_num_threads()
    first, second = measure_latency([problem.model, problem.model], problem.example_inputs, 0.05)
    assert first.repeats == second.repeats >= 10
    assert first.milliseconds > 0
    assert first.spread >= 0
    assert torch.get_num_threads() == threads

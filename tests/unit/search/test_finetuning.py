"""The best of a front are trained in the search, once, and are kept as they were measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from paretoprune.experiments.exporting.export import export
from paretoprune.experiments.finetuning import FineTuner
from paretoprune.experiments.training import Training
from paretoprune.search import (
    Batch,
    Completed,
    Direction,
    Failed,
    Finetuning,
    Metric,
    Objective,
    ParetoFront,
    Problem,
    Record,
    SearchInfo,
    SearchInterrupted,
    evaluate,
    read_run,
    search,
)
from paretoprune.search import finetuning as stage
from paretoprune.search.evaluation import Evaluator
from paretoprune.search.front import no_worse
from paretoprune.search.weights import FINETUNED, Weights, trained_weights
from paretoprune.surgery import trace

SETTINGS = Training(epochs=1, learning_rate=0.05)


class Told:
    """Writes down what a search tells."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.ends: list[type | None] = []

    def started(self, info: SearchInfo) -> None:
        self.info = info

    def finished(self, record: Record, front: ParetoFront) -> None:
        self.records.append(record)

    def ended(self, error: BaseException | None) -> None:
        self.ends.append(None if error is None else type(error))


class Interrupting(FineTuner):
    """Ends with Ctrl-C once so many epochs were trained in all."""

    epochs_left = 10**9

    def __call__(
        self,
        network: nn.Module,
        *,
        epochs: int,
        seed: int,
        checkpoint: Path,
        progress: Callable[[str], None],
    ) -> nn.Module:
        def counting(line: str) -> None:
            progress(line)
            Interrupting.epochs_left -= 1
            if not Interrupting.epochs_left:
                raise KeyboardInterrupt

        return super().__call__(
            network, epochs=epochs, seed=seed, checkpoint=checkpoint, progress=counting
        )


def run(
    problem: Problem, run_dir: Path, finetuning: Finetuning | None, told: Sequence[Told] = ()
) -> ParetoFront:
    return search(
        problem,
        0.5,
        4,
        criteria=("l2",),
        sampler="random",  # whose front has two plans, however the others learn
        workers=0,
        run_dir=run_dir,
        finetuning=finetuning,
        listeners=told,
    )


def trained(problem: Problem, kind: type[FineTuner] = FineTuner) -> Finetuning:
    assert not isinstance(problem.calibration, torch.Tensor)
    return Finetuning(kind([*problem.calibration], SETTINGS), epochs=3, top=2)


def test_a_metric_that_ranks_decides_what_is_taken(problem: Problem, tmp_path: Path) -> None:
    def certainty(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.softmax(1).amax(1).mean()

    mine = replace(problem, metrics={"certainty": Metric(certainty)})
    settings = {"criteria": ("l2",), "workers": 0, "run_dir": tmp_path}
    names = ("certainty", "macs")
    front = search(mine, 0.5, 3, objectives=names, finetuning=trained(problem), **settings)  # type: ignore[arg-type]
    graph = trace(mine.model, mine.example_inputs)
    done = [one for one in front.records if one.finetuned is not None]
    assert done
    for record in done:
        assert record.plan is not None
        network = Weights.of_run(tmp_path).network(mine.model, graph, record.plan, FINETUNED)
        after = evaluate(network, mine.validation, metrics=mine.metrics)["certainty"]
        start = Evaluator(mine, graph).final(record.plan, 0)
        before = evaluate(start, mine.validation, metrics=mine.metrics)["certainty"]
        found = record.finetuned_metrics
        assert found["certainty"] == pytest.approx(after, rel=1e-4)
        assert found["certainty_before"] == pytest.approx(before, rel=1e-4)
        assert found["taken"] == float(after >= before)
        assert record.handed_out["certainty"] == pytest.approx(max(before, after), rel=1e-4)


def test_the_best_are_trained_and_kept_as_measured(problem: Problem, tmp_path: Path) -> None:
    inputs, targets = next(iter(problem.calibration))
    problem = replace(problem, calibration=[(inputs[:16], targets[:16])])
    plain = run(problem, tmp_path / "plain", None)
    told = Told()
    problem = replace(problem, refit=[(inputs, targets)])
    front = run(problem, tmp_path, trained(problem), [told])
    assert [one.number for one in front.records] == [one.number for one in plain.records]
    best = sorted(plain.records, key=lambda one: _loss(one))[:2]
    done = [one for one in front.records if one.finetuned is not None]
    assert {one.number for one in done} == {one.number for one in best}
    assert told.ends == [None]
    assert [one.number for one in told.records[:4]] == [0, 1, 2, 3]
    assert [one.number for one in told.records[4:]] == [one.number for one in best]
    graph = trace(problem.model, problem.example_inputs)
    refitted = False
    for record in done:
        assert record.plan is not None
        network = Weights.of_run(tmp_path).network(problem.model, graph, record.plan, FINETUNED)
        measured = evaluate(network, problem.validation)
        start = Evaluator(problem, graph).final(record.plan, 0)  # what else would be handed out
        began = evaluate(start, problem.validation)
        assert began["loss"] <= _loss(record)
        refitted |= began["loss"] < _loss(record)  # the reconstruction on more data is better
        assert record.finetuned_metrics == pytest.approx(
            {
                **measured,
                **{f"{name}_before": value for name, value in began.items()},
                "epochs": 3,
                "taken": float(measured["loss"] <= began["loss"]),
            },
            rel=1e-4,
        )
        assert record.handed_out["loss"] == pytest.approx(
            min(measured["loss"], began["loss"]), rel=1e-4
        )
        before = run_metrics(plain, record.number)
        assert record.outcome == replace_metrics(record, before)  # the trial's own stay
    assert refitted
    assert {one.number: one.finetuned for one in read_run(tmp_path).records} == {
        **{number: None for number in range(4)},
        **{one.number: one.finetuned for one in done},
    }
    assert front.best() == min(front.records, key=lambda one: one.handed_out["loss"])


def test_what_training_made_worse_is_not_handed_out(problem: Problem, tmp_path: Path) -> None:
    wrong = [(inputs, (targets + 1) % 4) for inputs, targets in problem.validation]
    finetuning = Finetuning(FineTuner(wrong, SETTINGS), epochs=20, top=2)
    plain = run(problem, tmp_path / "plain", None)
    front = run(problem, tmp_path, finetuning)
    assert front.best().number == plain.best().number
    for record in front.records:
        if record.finetuned is None:
            continue
        assert record.finetuned_metrics["loss"] > record.finetuned_metrics["loss_before"]
        assert not record.finetuning_taken
        assert trained_weights(record) is None
        assert record.handed_out["loss"] == record.finetuned_metrics["loss_before"]
    exported = export(problem, front.best(), tmp_path / "to", weights=Weights.of_run(tmp_path))
    assert exported.small.search["loss"] == pytest.approx(_loss(front.best()), rel=1e-4)
    card = (tmp_path / "to" / "README.md").read_text()
    assert "fine-tuning for 20 epochs took it from loss" in card
    assert "its weights were not taken" in card


def test_what_training_made_better_is_handed_out(problem: Problem, tmp_path: Path) -> None:
    right = FineTuner([*problem.validation], SETTINGS)
    front = run(problem, tmp_path, Finetuning(right, epochs=20, top=1))
    best = front.best()
    assert best.finetuning_taken
    assert best.handed_out["loss"] == best.finetuned_metrics["loss"] < _loss(best)
    exported = export(problem, best, tmp_path / "to", weights=Weights.of_run(tmp_path))
    assert exported.small.search["loss"] == pytest.approx(best.handed_out["loss"], rel=1e-4)
    assert "then fine-tuned for 20 epochs." in (tmp_path / "to" / "README.md").read_text()


def test_the_first_objective_decides() -> None:
    def objective(name: str, direction: Direction) -> Objective:
        return Objective(name, direction, "", 1.0)

    loss = objective("loss", Direction.MINIMIZE)
    accuracy = objective("accuracy", Direction.MAXIMIZE)
    macs = objective("macs", Direction.MINIMIZE)
    before = {"loss": 0.2, "accuracy": 0.8}
    after = {"loss": 0.3, "accuracy": 0.9}
    assert not no_worse([loss, accuracy], before, after)
    assert no_worse([accuracy, loss], before, after)
    assert no_worse([macs, accuracy], before, after)  # training leaves MACs as they are
    assert not no_worse([macs, objective("cka", Direction.MAXIMIZE)], before, after)
    assert not no_worse([accuracy, loss], before, {**before, "loss": 0.3})
    assert no_worse([loss, macs], before, before)


class Unreadable:
    """Training data that cannot be read for more than one epoch the first time."""

    broken = True
    left = 1

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        if Unreadable.broken and not Unreadable.left:
            raise OSError("the disk is gone")
        Unreadable.left -= 1
        return iter(self._batches)


@pytest.mark.parametrize("told", [True, False], ids=["known", "killed before it was told"])
def test_what_failed_is_tried_again_by_the_next_driver(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    def again() -> ParetoFront:
        tuner = FineTuner(Unreadable([*problem.calibration]), SETTINGS)
        return run(problem, tmp_path, Finetuning(tuner, epochs=2, top=1))

    def killed(*_arguments: object) -> None:
        raise KeyboardInterrupt

    Unreadable.broken, Unreadable.left = True, 1
    with monkeypatch.context() as patched:
        if not told:
            patched.setattr(stage.FinetuningTasks, "tell", killed)
        try:
            (failed,) = (one.finetuned for one in again().records if one.finetuned is not None)
            assert failed == Failed("OSError: the disk is gone")
        except SearchInterrupted:
            assert not told
    assert [*(tmp_path / "weights").glob("*.part")]  # the epoch that was done is kept
    Unreadable.broken = False
    front = again()
    (done,) = (one for one in front.records if one.finetuned is not None)
    assert isinstance(done.finetuned, Completed)
    assert done in read_run(tmp_path).records
    Unreadable.broken, Unreadable.left = True, 0
    assert again() == front  # and what is done is not done again


def _loss(record: Record) -> float:
    assert isinstance(record.outcome, Completed)
    return record.outcome.metrics["loss"]


def run_metrics(front: ParetoFront, number: int) -> dict[str, float]:
    (record,) = (one for one in front.records if one.number == number)
    assert isinstance(record.outcome, Completed)
    return dict(record.outcome.metrics)


def replace_metrics(record: Record, metrics: dict[str, float]) -> Completed:
    assert isinstance(record.outcome, Completed)
    return replace(record.outcome, metrics=metrics)


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_it_goes_on_where_it_was_interrupted(
    problem: Problem, tmp_path: Path, epochs: int
) -> None:
    Interrupting.epochs_left = 10**9
    whole = run(problem, tmp_path / "whole", trained(problem, Interrupting))
    Interrupting.epochs_left = epochs
    told = Told()
    with pytest.raises(SearchInterrupted):
        run(problem, tmp_path / "run", trained(problem, Interrupting), [told])
    assert told.ends == [KeyboardInterrupt]
    Interrupting.epochs_left = left = 10**9
    resumed = run(problem, tmp_path / "run", trained(problem, Interrupting))
    assert left - Interrupting.epochs_left == 6 - epochs  # no epoch is trained again
    for before, after in zip(whole.records, resumed.records, strict=True):
        assert before.finetuned_metrics == after.finetuned_metrics
        if before.finetuned is None:
            continue
        assert before.plan is not None
        files = [
            Weights.of_run(tmp_path / name).file(before.plan, FINETUNED)
            for name in ("whole", "run")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
    Interrupting.epochs_left = 1
    assert run(problem, tmp_path / "run", trained(problem, Interrupting)) == resumed
    left_over = {file.suffix for file in (tmp_path / "run" / "weights").iterdir()}
    assert left_over == {".safetensors", ".log", ".json"}


def cut(file: Path) -> None:
    """Leaves half of a file, as lost power may."""
    file.write_bytes(file.read_bytes()[:100])


def test_trained_weights_that_were_cut_are_said_and_trained_again(
    problem: Problem, tmp_path: Path
) -> None:
    front = run(problem, tmp_path, trained(problem))
    plan = next(one.plan for one in front.records if one.finetuned is not None)
    assert plan is not None
    weights = Weights.of_run(tmp_path)
    file, graph = weights.file(plan, FINETUNED), trace(problem.model, problem.example_inputs)
    before = file.read_bytes()
    cut(file)
    with pytest.raises(ValueError, match=rf"damaged: {file} cannot be read .*; a resumed"):
        weights.network(problem.model, graph, plan, FINETUNED)
    again = run(problem, tmp_path, trained(problem))
    assert file.read_bytes() == before
    for one, other in zip(front.records, again.records, strict=True):
        assert one.finetuned_metrics == other.finetuned_metrics


def test_a_training_whose_beginning_was_cut_begins_anew(problem: Problem, tmp_path: Path) -> None:
    whole = run(problem, tmp_path / "whole", trained(problem))
    Interrupting.epochs_left = 1
    with pytest.raises(SearchInterrupted):
        run(problem, tmp_path / "run", trained(problem, Interrupting))
    Interrupting.epochs_left = 10**9
    (start,) = (tmp_path / "run" / "weights").glob("*-start.safetensors")
    cut(start)
    resumed = run(problem, tmp_path / "run", trained(problem, Interrupting))
    for one, other in zip(whole.records, resumed.records, strict=True):
        assert one.finetuned_metrics == other.finetuned_metrics


def test_a_kill_after_the_last_epoch_costs_no_training(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last epoch and the outcome in the ledger the search split is measured."""

    def killed(*_arguments: object) -> dict[str, float]:
        raise KeyboardInterrupt

    Interrupting.epochs_left = left = 10**9
    with monkeypatch.context() as patched:
        patched.setattr(stage, "evaluate", killed)
        with pytest.raises(SearchInterrupted):
            run(problem, tmp_path, trained(problem, Interrupting))
    run(problem, tmp_path, trained(problem, Interrupting))
    assert left - Interrupting.epochs_left == 6
    assert not [*(tmp_path / "weights").glob("*.part")]
    assert not [*(tmp_path / "weights").glob("*-start.*")]


def test_a_training_that_diverges_costs_no_trial(problem: Problem, tmp_path: Path) -> None:
    wild = FineTuner([*problem.calibration], replace(SETTINGS, learning_rate=1e30))
    front = run(problem, tmp_path, Finetuning(wild, epochs=2, top=1))
    (record,) = (one for one in front.records if one.finetuned is not None)
    assert isinstance(record.finetuned, Failed)
    assert "diverged" in record.finetuned.error
    assert front.best() in front.records
    assert run(problem, tmp_path, Finetuning(wild, epochs=2, top=1)) == front


def test_who_leads_is_decided_before_fine_tuning(problem: Problem, tmp_path: Path) -> None:
    front = run(problem, tmp_path, None)
    first, second = front.leading(2, 10**9)
    worse = replace(second, finetuned=Completed({"loss": 1e-6, "taken": 1.0}, 1.0))
    others = [one for one in front.records if one is not second]
    again = ParetoFront.of([*others, worse], front.objectives)
    assert again.leading(1, 10**9) == [first]
    assert again.best() == worse
    assert front.leading(5, 0) == []


@pytest.mark.parametrize(("field", "value"), [("epochs", -1), ("top", 0), ("recovery", -2)])
def test_numbers_out_of_range(problem: Problem, field: str, value: int) -> None:
    trainer = FineTuner([*problem.calibration])
    with pytest.raises(ValueError, match=f"`{field}` must be at least .*, but got {value}"):
        Finetuning(trainer, **{field: value})


def test_a_fine_tuning_of_nothing(problem: Problem) -> None:
    with pytest.raises(ValueError, match="both 0, so nothing would be trained"):
        Finetuning(FineTuner([*problem.calibration]), top=2)


def test_a_problem_without_training_data_is_told(problem: Problem) -> None:
    with pytest.raises(ValueError, match="'noise' has none; give its field `training`"):
        FineTuner.of(problem, distil=False)

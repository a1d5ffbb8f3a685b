"""Progress is live for people and plain for logs, and leaves nothing behind."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from paretoprune.experiments.commands.long_step import LongStep, clock_time
from paretoprune.experiments.commands.progress import (
    SearchProgress,
    is_live,
    long_step,
    results_console,
)
from paretoprune.experiments.showing.summary import headline
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.tracking.trial_facts import run_name
from paretoprune.search import Completed, Direction, Objective, ParetoFront
from paretoprune.search.record import LAYER, reasons
from tests.unit.experiments.infos import info_of

if TYPE_CHECKING:
    from tests.unit.experiments.conftest import MadeUp


def console(*, terminal: bool, width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    shown = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    return shown, out


def play(
    shown: SearchProgress, view: SearchView, *, before: int = 0, trials: int | None = None
) -> None:
    """Tells progress of a search whose first records are there already."""
    info = info_of(view, view.records[:before], trials or len(view.records))
    with shown:
        shown.started(info)
        for at, record in enumerate(view.records[before:], start=before + 1):
            shown.finished(record, ParetoFront.of(view.records[:at], view.objectives))
        shown.ended(None)


def test_a_log_gets_a_line_for_what_is_new(view: SearchView) -> None:
    target, out = console(terminal=False)
    play(SearchProgress(target), view)
    lines = out.getvalue().splitlines()
    assert "target at most 500.0 k (50.0 %), 7 trials" in lines[1]
    assert [line[:5] for line in lines[2:]] == ["[1/7]", "[2/7]", "[6/7]", "[7/7]"]
    assert "best trial 1: accuracy 95.00 % at 49.8 % of the MACs" in lines[3]
    assert "trial 5 failed: ValueError: not finite" in lines[4]
    assert "0:00 left" in lines[5]


def test_steps_tell_the_time_left_by_the_macs_that_are_to_leave(
    made_up: type[MadeUp], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end at the target, here half of the MACs, and mostly long before their trials do."""
    now = iter(range(0, 10_000, 20))  # so far apart that every trial has a line
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    losses = [(0.9 - 0.1 * at, at) for at in range(5)]  # two trials a step, 10 % of the MACs each
    records = [
        made_up.completed(2 * at + one, loss, 900_000 - 100_000 * at, origin=LAYER)
        for loss, at in losses
        for one in (0, 1)
    ]
    view = replace(made_up.view(*records), target=500_000)
    target, out = console(terminal=False, width=200)
    play(SearchProgress(target, steps=True), view, before=2, trials=100)
    lines = out.getvalue().splitlines()
    assert "at most 100 trials, 2 of them done before" in lines[1]
    first, last = lines[2], lines[-1]
    assert first.startswith("[  3]")
    assert "/100" not in first
    # a quarter of what was left is gone with the first new trial: three times as long is left
    spent = float(first.split("  ")[-1].split(" s/trial")[0])
    assert first.endswith(f"about {clock_time(3 * spent)} left")
    assert last.endswith("about 0:00 left")


def test_a_fine_tuning_that_made_it_worse_is_told(view: SearchView) -> None:
    target, out = console(terminal=False)
    metrics = {"loss": 0.3, "accuracy": 0.94, "loss_before": 0.1, "accuracy_before": 0.96}
    end = Completed({**metrics, "epochs": 5.0, "taken": 0.0}, 9.0)
    told = (*view.records, replace(view.records[1], finetuned=end))
    play(SearchProgress(target), replace(view, records=told))
    line = out.getvalue().splitlines()[-1]
    assert "trial 1 is fine-tuned, but worse than before: not taken" in line
    assert "best trial 1: accuracy 96.00 % before fine-tuning (worse after it) at" in line


def test_loss_is_that_of_the_network_that_is_handed_out(made_up: type[MadeUp]) -> None:
    record = made_up.completed(0, 0.6, 500_000)
    metrics = {"loss": 0.2, "loss_before": 0.5, "epochs": 5.0, "taken": 1.0}
    assert isinstance(record.outcome, Completed)
    known = {k: v for k, v in record.outcome.metrics.items() if k != "accuracy"}
    record = replace(record, outcome=Completed(known, 1.0), finetuned=Completed(metrics, 9.0))
    target, out = console(terminal=False, width=200)
    view = made_up.view(record)
    play(SearchProgress(target), view)
    assert "best trial 0: loss 0.2000 after fine-tuning at" in out.getvalue().splitlines()[-1]
    assert ", loss 0.2000 after fine-tuning (dense 0.1000)" in headline(
        replace(view, dense_metrics={"loss": 0.1})
    )


def test_a_metric_that_ranks_is_named_first(made_up: type[MadeUp]) -> None:
    record = made_up.completed(0, 0.6, 500_000)
    assert isinstance(record.outcome, Completed)
    record = replace(record, outcome=Completed({**record.outcome.metrics, "miou": 0.6123}, 1.0))
    iou = Objective("miou", Direction.MAXIMIZE, "", 0.0)
    view = made_up.view(record)
    view = replace(
        view,
        objectives=(iou, *view.objectives[1:]),
        dense_metrics={**view.dense_metrics, "miou": 0.7},
    )
    target, out = console(terminal=False, width=200)
    play(SearchProgress(target), view)
    assert "best trial 0: miou 0.6123 at 50.0 % of" in out.getvalue().splitlines()[-1]
    assert ", miou 0.6123 (dense 0.7) on the search split" in headline(view)
    assert run_name(record, view) == "t000 miou 0.612 @ 50.0%"


def test_a_failure_that_repeats_is_said_once(view: SearchView) -> None:
    failed = [replace(view.records[5], number=at) for at in range(5)]
    target, out = console(terminal=False)
    play(SearchProgress(target), replace(view, records=tuple(failed)))
    assert out.getvalue().count("not finite") == 2  # when it is new, and with the last trial
    assert reasons(failed) == {"failed: ValueError: not finite": 5}


def test_a_resumed_search_says_what_was_there(view: SearchView) -> None:
    target, out = console(terminal=False)
    play(SearchProgress(target), view, before=4)
    assert "7 trials, 4 of them done before" in out.getvalue()


def test_a_terminal_gets_a_live_view(view: SearchView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    target, out = console(terminal=True)
    play(SearchProgress(target), view)
    text = out.getvalue()
    assert "7/7" in text
    assert "3 members" in text
    assert "(dense 99.00 %)" in text


def test_an_error_in_the_search_ends_the_live_view(
    view: SearchView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    target, out = console(terminal=True)
    shown = SearchProgress(target)
    with pytest.raises(RuntimeError), shown:
        raise RuntimeError
    assert out.getvalue().endswith("\x1b[2K") or "\x1b[?25h" in out.getvalue()  # cursor is back


def test_ci_is_no_place_for_live_views(monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = console(terminal=True)
    monkeypatch.setenv("CI", "true")
    assert not is_live(target)


def test_quiet_is_quiet(view: SearchView) -> None:
    target, out = console(terminal=False)
    play(SearchProgress(target, quiet=True), view)
    with long_step(target, "Training", quiet=True) as say:
        say("epoch 1")
    assert out.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_long_steps_show_their_stages(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    target, out = console(terminal=terminal)
    with long_step(target, "Training") as say:
        say("epoch 1")
        say("epoch 2")
    assert "Training" in out.getvalue()
    if not terminal:  # a log is spared the lines of a fast step
        assert out.getvalue().splitlines() == ["Training …", "  epoch 1"]


def test_a_stage_with_known_parts_tells_the_time_left() -> None:
    target, out = console(terminal=False)
    times = [0.0]
    say = LongStep("Measuring", target, clock=lambda: times[-1])
    for time, done in ((10.0, 0), (20.0, 2), (110.0, 20)):
        times.append(time)
        say("saliencies of cka", done, 20)
    times.append(120.0)
    say("tracing the network")
    assert out.getvalue().splitlines() == [
        "Measuring …",
        "  saliencies of cka, 0 of 20",
        "  saliencies of cka, 2 of 20, 1:30 left",
        "  saliencies of cka, 20 of 20",
        "  tracing the network",
    ]


def test_every_stage_has_a_clock_of_its_own() -> None:
    target, out = console(terminal=False)
    times = [0.0]
    say = LongStep("Measuring", target, clock=lambda: times[-1])
    for time, line, done in ((0.0, "a", 1), (100.0, "b", 0), (104.0, "b", 1)):
        times.append(time)
        say(line, done, 3)
    assert out.getvalue().splitlines()[-1] == "  b, 1 of 3, 0:08 left"


def test_a_search_tells_what_it_measures_before_its_trials(view: SearchView) -> None:
    target, out = console(terminal=False)
    with SearchProgress(target) as shown:
        shown.preparing("saliencies of cka", 3, 20)
    assert "saliencies of cka, 3 of 20" in out.getvalue()
    with SearchProgress(target, quiet=True) as shown:
        shown.preparing("saliencies of kl", 3, 20)
    assert "kl" not in out.getvalue()


def test_results_that_nobody_watches_have_100_columns() -> None:
    assert results_console().width == 100

"""The picture of the best network, and which decisions mattered."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from paretoprune.experiments.showing import importance
from paretoprune.experiments.showing.architecture import architecture_figure, best_widths, title
from paretoprune.experiments.showing.pictures import pictures
from paretoprune.experiments.showing.view import SearchView
from paretoprune.search import Completed, Record, Stopped

if TYPE_CHECKING:
    from tests.unit.experiments.conftest import MadeUp


def test_widths_are_those_of_the_best_plan(made_up: type[MadeUp]) -> None:
    view = made_up.view(
        made_up.completed(0, 0.5, 300_000),
        made_up.completed(1, 0.2, 400_000, removed=("layer1.1",)),
    )
    assert best_widths(view) == {
        "stem": (4, 4),
        "layer1.0.conv1": (4, 8),
        "layer1.1.conv1": (0, 8),
        "layer2.0.conv1": (16, 16),
    }
    dense, left = architecture_figure(view).data
    assert list(dense.x) == [4, 8, 8, 16]
    assert list(left.x) == [4, 4, 0, 16]
    assert list(dense.text) == ["4 of 4", "4 of 8", "block removed", "16 of 16"]


def test_the_best_is_one_that_meets_the_target(made_up: type[MadeUp]) -> None:
    """The front of the strategy `everything` begins above the target."""
    large, small = made_up.completed(0, 0.1, 900_000), made_up.completed(1, 0.5, 300_000)
    view = made_up.view(large, small)
    assert title(view).startswith("Units left per group: trial 1, the best, at 30")
    assert view.to_json()["best"] == 1
    above = made_up.view(large)
    assert title(above).startswith("Units left per group: trial 0")
    assert above.to_json()["best"] is None


def trial(made_up: type[MadeUp], number: int, *, decides: str) -> Record:
    """A trial whose loss follows from its budget and from one other decision."""
    low = number % 2 == 0
    chosen = number % 3 == 0
    loss = (5.0 if low else 0.1) * (2.0 if chosen else 1.0)
    record = made_up.completed(number, loss, 200_000 if low else 400_000)
    assert isinstance(record.outcome, Completed)
    candidate = replace(
        record.candidate,
        criterion="taylor" if chosen == (decides == "criterion") else "l2",
        offsets={"layer2.0.conv1": (0.1 if chosen else -0.1) if decides == "offset" else 0.0},
    )
    if decides == "offset":  # the criterion says nothing: it follows another rhythm
        candidate = replace(candidate, criterion="taylor" if number % 5 < 2 else "l2")
    return replace(record, candidate=candidate)


def decided(made_up: type[MadeUp], decides: str, trials: int = 60) -> SearchView:
    return made_up.view(*(trial(made_up, number, decides=decides) for number in range(trials)))


@pytest.mark.parametrize(
    ("decides", "name"), [("criterion", "criterion"), ("offset", "offset of layer2")]
)
def test_the_decision_that_makes_the_loss_is_found(
    made_up: type[MadeUp], decides: str, name: str
) -> None:
    found = importance.importance(decided(made_up, decides))
    assert found is not None
    assert next(iter(found.shares)) == name
    assert found.shares[name] > 0.9
    assert math.isclose(sum(found.shares.values()), 1)
    assert found.explained > 0.9
    assert "budget" not in found.shares  # its part is taken out
    assert "too little" not in importance.caption(found)


def test_decisions_that_tell_nothing_are_not_drawn(made_up: type[MadeUp]) -> None:
    few = decided(made_up, "criterion", importance.LEAST_TRIALS - 1)
    assert importance.importance(few) is None
    noise = made_up.view(
        *(
            replace(
                record,
                candidate=replace(record.candidate, criterion="l2" if at % 2 else "taylor"),
            )
            for at, record in enumerate(
                made_up.completed(at, 0.1 + (at * 7919 % 31) / 31, 400_000) for at in range(40)
            )
        )
    )
    assert importance.importance(noise) is None
    assert "importance.png" not in dict(pictures(noise, None))


def test_trials_that_were_stopped_early_take_part(made_up: type[MadeUp]) -> None:
    """Here the bad choice was never measured to the end, so that the others tell nothing."""
    whole = decided(made_up, "criterion")
    records = []
    for record in whole.records:
        assert isinstance(record.outcome, Completed)
        metrics = record.outcome.metrics
        if record.candidate.criterion == "taylor":
            record = replace(record, outcome=Stopped(metrics, 0.1))
        records.append(record)
    raced = replace(whole, records=tuple(records))
    completed = [one for one in records if isinstance(one.outcome, Completed)]
    assert len(completed) >= importance.LEAST_TRIALS
    assert importance.importance(replace(whole, records=tuple(completed))) is None
    assert importance.importance(raced) == importance.importance(whole)


def test_every_picture_is_drawn(made_up: type[MadeUp]) -> None:
    view = decided(made_up, "criterion")
    drawn = dict(pictures(view, importance.importance(view)))
    names = ("front", "architecture", "ratios", "hypervolume", "importance")
    assert list(drawn) == [f"{name}.png" for name in names]
    for figure in drawn.values():
        figure.canvas.draw()

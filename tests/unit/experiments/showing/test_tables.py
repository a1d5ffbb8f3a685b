"""Rows and tables say what records say, and fit where people read them."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from paretoprune.experiments.showing.summary import headline
from paretoprune.experiments.showing.tables import (
    dense_numbers,
    front_csv,
    front_json,
    front_table,
    number_heads,
    numbers,
    pruning_ratios,
    stage_ratios,
)
from paretoprune.experiments.showing.view import SearchView
from paretoprune.search import Completed, Record

if TYPE_CHECKING:
    from tests.unit.experiments.conftest import MadeUp


def test_rows_know_their_place(view: SearchView) -> None:
    assert [row.trial for row in view.rows] == [0, 1, 3, 4, 6]
    assert [row.trial for row in view.rows if row.on_front] == [1, 3, 4]
    assert [row.trial for row in view.front_rows] == [1, 3, 4]  # MACs fall
    assert view.front_rows[0].macs_ratio == 0.498


def test_json_and_csv_have_every_member(view: SearchView) -> None:
    members = json.loads(front_json(view.front_rows))
    assert [member["trial"] for member in members] == [1, 3, 4]
    assert members[1]["removed"] == ["layer1.1"]
    lines = list(csv.DictReader(io.StringIO(front_csv(view.front_rows))))
    assert [(line["trial"], line["macs"], line["removed"]) for line in lines] == [
        ("1", "498000", ""),
        ("3", "300000", "layer1.1"),
        ("4", "200000", ""),
    ]


def test_the_table_fits_100_columns_and_shows_the_dense_network(view: SearchView) -> None:
    out = io.StringIO()
    table = front_table(view.front_rows, view.dense, view.dense_metrics)
    Console(file=out, width=100).print(table)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "99.00 %" in text
    assert "95.00 %" in text
    assert "…" not in text
    assert "one-shot" in text


def test_metrics_of_the_problem_have_columns(made_up: type[MadeUp]) -> None:
    record = made_up.completed(0, 0.5, 400_000)
    assert isinstance(record.outcome, Completed)
    metrics = {**record.outcome.metrics, "iou": 0.71234}
    view = made_up.view(replace(record, outcome=replace(record.outcome, metrics=metrics)))
    (row,) = view.rows
    assert row.metrics == {"iou": 0.71234}
    (line,) = csv.DictReader(io.StringIO(front_csv([row])))
    assert line["iou"] == "0.71234"
    assert "metrics" not in line
    dense = {"loss": 0.4, "accuracy": 0.9, "iou": 0.8}
    heads = number_heads(dense)
    assert numbers(row)[heads.index("iou")] == "0.7123"
    assert dense_numbers(view.dense, dense)[heads.index("iou")] == "0.8"


@pytest.mark.parametrize(
    ("width", "absent"),
    [
        (68, "blocks removed"),
        (60, "blocks removed, criterion and allocation"),
        (46, "blocks removed, criterion and allocation, params"),
    ],
)
def test_a_narrow_terminal_gets_fewer_columns_and_whole_numbers(
    view: SearchView, width: int, absent: str
) -> None:
    out = io.StringIO()
    table = front_table(view.front_rows, view.dense, view.dense_metrics)
    Console(file=out, width=width).print(table)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out.getvalue()
    assert " ".join(" ".join(lines).split()).endswith(f"without room for: {absent}")
    for row in view.front_rows:
        for cell in (f"{row.macs / 1000:.1f} k", f"{row.accuracy:.2%}".replace("%", " %")):
            assert cell in out.getvalue()


def test_fine_tuning_is_shown_beside_what_it_began_with(view: SearchView) -> None:
    """Both numbers are there, and which of them is that of the network that is handed out."""

    def told(number: int, after: float, before: float, taken: float) -> Record:
        metrics = {"loss": 1 - after, "accuracy": after, "epochs": 5.0, "taken": taken}
        began = {"loss_before": 1 - before, "accuracy_before": before}
        return replace(view.records[number], finetuned=Completed({**metrics, **began}, 9.0))

    shown = view.told(told(1, 0.9613, 0.9673, 0)).told(told(3, 0.975, 0.94, 1))
    out = io.StringIO()
    table = front_table(shown.front_rows, view.dense, view.dense_metrics)
    Console(file=out, width=100).print(table)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for words in ("96.13 %, not taken", "from 96.73 %", "97.50 %", "from 94.00 %"):
        assert words in text
    same = {"accuracy": 0.95, "accuracy_before": 0.95, "loss": 0.2, "loss_before": 0.1}
    end = Completed({**same, "epochs": 5.0, "taken": 0.0}, 9.0)
    by_loss = view.told(replace(view.records[1], finetuned=end)).front_rows
    Console(file=out, width=100).print(front_table(by_loss, view.dense, view.dense_metrics))
    assert "loss 0.2000, not taken" in out.getvalue()  # not "95 % from 95 %"
    assert "from 0.1000" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 100
    worse, better, other = json.loads(front_json(shown.front_rows))
    assert (worse["finetuned_accuracy"], worse["finetuned_accuracy_before"]) == (0.9613, 0.9673)
    assert [one["finetuning_taken"] for one in (worse, better, other)] == [False, True, None]
    assert shown.best is not None
    assert shown.best.number == 3  # loss 0.025 after fine-tuning, trial 1 has 0.0327 without
    alone = view.told(told(1, 0.9613, 0.9673, 0))
    assert "accuracy 96.73 % before fine-tuning (worse after it) (dense" in headline(alone)
    assert "accuracy 97.50 % after fine-tuning (dense" in headline(shown)


def test_ratios_count_what_is_removed(view: SearchView) -> None:
    ratios = pruning_ratios(view.records[3], view.sizes, view.blocks)
    assert ratios == {
        "stem": 0.0,
        "layer1.0.conv1": 0.5,
        "layer1.1.conv1": 1.0,  # its block is gone
        "layer2.0.conv1": 0.0,
    }
    assert pruning_ratios(view.records[2], view.sizes, view.blocks) == {}  # no plan
    assert stage_ratios(ratios, view.sizes) == {"stem": 0.0, "layer1": 0.75, "layer2": 0.0}


def test_a_network_of_one_stage_is_summed_up_in_thirds() -> None:
    sizes = {f"features.{at}": 10 for at in range(6)}
    ratios = {f"features.{at}": at / 10 for at in range(6)}
    stages = stage_ratios(ratios, sizes)
    assert list(stages) == ["first third", "second third", "last third"]
    assert stages["first third"] == 0.05
    assert stage_ratios({}, {}) == {}

"""Fronts and hypervolumes, against closed forms and brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib import pyplot
from matplotlib.figure import Figure
from numpy.typing import NDArray

from paretoprune.search import (
    Candidate,
    Completed,
    Direction,
    Failed,
    Infeasible,
    Objective,
    ParetoFront,
    Record,
    hypervolume,
    non_dominated,
)
from paretoprune.surgery import Cost, PruningPlan

Points = NDArray[np.float64]
SIDE = 5
LOSS = Objective("loss", Direction.MINIMIZE, "nats", 2.0)
MACS = Objective("macs", Direction.MINIMIZE, "MACs", 100.0)
ACCURACY = Objective("accuracy", Direction.MAXIMIZE, "fraction", 0.0)


def grids(least_dim: int = 1, most_dim: int = 4) -> st.SearchStrategy[Points]:
    """Points with whole coordinates, some of them outside the reference SIDE."""
    return st.integers(least_dim, most_dim).flatmap(
        lambda dim: arrays.arrays(
            np.float64,
            st.tuples(st.integers(0, 7), st.just(dim)),
            elements=st.integers(0, SIDE + 1).map(float),
        )
    )


def cells(points: Points) -> int:
    """The number of unit cells that whole-numbered points dominate below SIDE."""
    corners = itertools.product(range(SIDE), repeat=points.shape[1])
    return sum(any((point <= corner).all() for point in points) for corner in corners)


def record(number: int, **metrics: float) -> Record:
    plan, cost = PruningPlan(), Cost(int(metrics["macs"]), 1)
    return Record(number, Candidate("l2", 1.0), plan, cost, Completed(metrics, 1.0))


@given(grids())
def test_non_dominated_is_what_no_other_point_dominates(points: Points) -> None:
    expected = [
        not any(
            all(a <= b for a, b in zip(other, point, strict=True)) and tuple(other) != tuple(point)
            for other in points
        )
        for point in points
    ]
    assert non_dominated(points).tolist() == expected


@given(grids())
def test_hypervolume_counts_dominated_cells(points: Points) -> None:
    reference = np.full(points.shape[1], float(SIDE))
    assert hypervolume(points, reference) == pytest.approx(cells(points))


@given(grids(2, 3), st.randoms())
def test_hypervolume_knows_no_order_and_no_duplicates(points: Points, random: object) -> None:
    reference = np.full(points.shape[1], float(SIDE))
    shuffled = np.concatenate([points, points])[::-1]
    assert hypervolume(shuffled, reference) == pytest.approx(hypervolume(points, reference))


@given(grids(2, 3))
def test_hypervolume_never_falls_with_another_point(points: Points) -> None:
    reference = np.full(points.shape[1], float(SIDE))
    values = [hypervolume(points[:n], reference) for n in range(len(points) + 1)]
    assert values == sorted(values)


@pytest.mark.parametrize("n", [1, 2, 17])
def test_hypervolume_of_a_staircase(n: int) -> None:
    points = np.array([[i, n - 1 - i] for i in range(n)], dtype=np.float64)
    assert hypervolume(points, np.array([float(n), float(n)])) == n * (n + 1) / 2


def test_hypervolume_of_nothing_is_zero() -> None:
    assert hypervolume(np.zeros((0, 3)), np.ones(3)) == 0


def test_front_is_sorted_by_macs_and_leaves_out_what_did_not_complete() -> None:
    candidate = Candidate("l2", 1.0)
    records = [
        record(0, loss=0.9, macs=10),
        record(1, loss=0.1, macs=90),
        record(2, loss=0.5, macs=50),
        record(3, loss=0.6, macs=60),
        Record(4, candidate, PruningPlan(), Cost(1, 1), Failed("RuntimeError")),
        Record(5, candidate, None, None, Infeasible("too small")),
    ]
    front = ParetoFront.of(records, (LOSS, MACS))
    assert [r.number for r in front.records] == [1, 2, 0]


def test_of_equal_records_the_earliest_stands_for_all() -> None:
    records = [record(n, loss=0.5, macs=50) for n in (2, 0, 1)]
    assert [r.number for r in ParetoFront.of(records, (LOSS, MACS)).records] == [0]


def test_a_maximised_objective_is_flipped_once() -> None:
    records = [record(0, accuracy=0.9, macs=50), record(1, accuracy=0.8, macs=50)]
    front = ParetoFront.of(records, (ACCURACY, MACS))
    assert [r.number for r in front.records] == [0]
    assert front.hypervolume == pytest.approx(0.9 * 0.5)  # accuracy as it is, MACs in references


def test_hypervolume_of_a_front_is_in_units_of_the_references() -> None:
    front = ParetoFront.of([record(0, loss=0.5, macs=25)], (LOSS, MACS))
    assert front.hypervolume == pytest.approx((1.5 / 2) * 0.75)
    assert ParetoFront.of([], (LOSS, MACS)).hypervolume == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=12))
def test_front_of_a_front_and_one_more_is_the_front_of_all(points: list[tuple[int, int]]) -> None:
    records = [record(n, loss=loss, macs=macs) for n, (loss, macs) in enumerate(points)]
    front = ParetoFront.of([], (LOSS, MACS))
    for one in records:
        front = ParetoFront.of((*front.records, one), (LOSS, MACS))
    assert front == ParetoFront.of(records, (LOSS, MACS))


def test_best_is_best_in_the_first_objective_within_the_macs() -> None:
    records = [record(0, loss=0.9, macs=10), record(1, loss=0.1, macs=90)]
    front = ParetoFront.of(records, (LOSS, MACS))
    assert front.best().number == 1
    assert front.best(90).number == 1
    assert front.best(89).number == 0
    with pytest.raises(ValueError, match=r"at most 9 MACs; the smallest has 10\."):
        front.best(9)
    with pytest.raises(ValueError, match="no trial has completed"):
        ParetoFront.of([], (LOSS, MACS)).best()


def test_the_smallest_has_the_fewest_macs_among_the_accurate() -> None:
    front = ParetoFront.of(
        [
            record(0, loss=0.9, macs=10, accuracy=0.5),
            record(1, loss=0.5, macs=50, accuracy=0.8),
            record(2, loss=0.1, macs=90, accuracy=0.9),
        ],
        (LOSS, MACS),
    )
    assert front.smallest(0.9).number == 2
    assert front.smallest(0.6).number == 1
    assert front.smallest(0).number == 0
    with pytest.raises(ValueError, match=r"accuracy of 95\.00% .* the best has 90\.00%"):
        front.smallest(0.95)
    with pytest.raises(ValueError, match="measured no accuracy"):
        ParetoFront.of([record(0, loss=0.9, macs=10)], (LOSS, MACS)).smallest(0.5)
    with pytest.raises(ValueError, match="no trial has completed"):
        ParetoFront.of([], (LOSS, MACS)).smallest(0.5)


def shown_front() -> ParetoFront:
    """Two records with accuracy, MACs falling: 1 and 0."""
    records = [
        record(0, loss=0.9, macs=10, params=5, accuracy=0.5),
        record(1, loss=0.1, macs=9000, params=7, accuracy=0.875),
    ]
    return ParetoFront.of(records, (LOSS, MACS))


def test_a_data_frame_has_a_row_per_record() -> None:
    frame = shown_front().to_dataframe()
    assert frame["trial"].tolist() == [1, 0]
    assert frame["macs"].tolist() == [9000, 10]
    assert frame["macs"].dtype.kind == frame["params"].dtype.kind == "i"
    assert frame["accuracy"].tolist() == [0.875, 0.5]
    assert frame["criterion"].tolist() == ["l2", "l2"]
    assert ParetoFront.of([], (LOSS, MACS)).to_dataframe().empty


def test_notebooks_show_a_table() -> None:
    text = shown_front()._repr_html_()
    (table,) = ElementTree.fromstring(f"<div>{text}</div>")
    head, *rows = ([cell.text for cell in row] for row in table.iter("tr"))
    assert head[:5] == ["trial", "macs", "params", "loss", "accuracy"]
    assert [row[:5] for row in rows] == [
        ["1", "9,000", "7", "0.1000", "0.8750"],
        ["0", "10", "5", "0.9000", "0.5000"],
    ]
    assert "no trial has completed" in ParetoFront.of([], (LOSS, MACS))._repr_html_()


def test_names_of_others_are_text_in_the_table() -> None:
    evil = replace(record(0, loss=0.1, macs=1), candidate=Candidate("<script>", 1.0))
    text = ParetoFront.of([evil], (LOSS, MACS))._repr_html_()
    assert "&lt;script&gt;" in text
    assert "<script>" not in text


def test_one_line_says_how_large_the_front_is() -> None:
    assert repr(shown_front()) == "<ParetoFront: 2 records, 10 to 9,000 MACs>"
    assert repr(ParetoFront.of([], (LOSS, MACS))) == "<ParetoFront: no records>"


def test_the_plot_has_every_record_and_its_line_never_falls() -> None:
    records = [
        record(0, loss=0.9, macs=10, accuracy=0.5),
        record(1, loss=0.8, macs=20, accuracy=0.4),
        record(2, loss=0.1, macs=90, accuracy=0.9),
    ]
    front = ParetoFront.of(records, (LOSS, MACS))
    axes = front.plot()
    line, points = axes.lines
    assert np.array_equal(line.get_xydata(), [[10, 0.5], [20, 0.5], [90, 0.9]])
    assert np.array_equal(points.get_xydata(), [[10, 0.5], [20, 0.4], [90, 0.9]])
    assert {text.get_text() for text in axes.texts} == {"0", "1", "2"}
    assert front.plot(axes) is axes
    pyplot.close("all")


def test_the_plot_shows_the_first_objective_where_there_is_no_accuracy() -> None:
    axes = Figure().add_subplot()
    records = [record(0, loss=0.9, macs=10), record(1, loss=0.2, macs=20)]
    ParetoFront.of(records, (LOSS, MACS)).plot(axes)
    assert np.array_equal(axes.lines[0].get_xydata(), [[10, 0.9], [20, 0.2]])
    assert axes.get_ylabel() == "loss, search split"
    assert not pyplot.get_fignums(), "given axes need no pyplot"
    ParetoFront.of([], (LOSS, MACS)).plot(axes)

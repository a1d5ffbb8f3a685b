"""Plots and the page show every trial in its role; what they look like is judged by eye."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from paretoprune.experiments.showing import page, plots, summary
from paretoprune.experiments.showing.view import SearchView

if TYPE_CHECKING:
    from tests.unit.experiments.conftest import MadeUp


def test_the_step_line_never_promises_more_than_the_front_has(view: SearchView) -> None:
    xs, ys = summary.steps(view, "loss")
    assert xs == pytest.approx([20, 30, 30, 49.8, 49.8, 50])
    assert ys == [0.9, 0.9, 0.3, 0.3, 0.2, 0.2]
    assert summary.steps(view, "accuracy")[1] == [70, 70, 93, 93, 95, 95]


def test_a_better_loss_with_a_worse_accuracy_does_not_lower_the_line(
    made_up: type[MadeUp],
) -> None:
    view = made_up.view(
        made_up.completed(0, 0.3, 200_000, accuracy=0.9),
        made_up.completed(1, 0.2, 400_000, accuracy=0.8),
    )
    assert summary.steps(view, "accuracy")[1] == [90, 90, 90, 90]


def test_the_headline_states_the_best_beside_the_dense_network(view: SearchView) -> None:
    text = summary.headline(view)
    assert "trial 1 keeps 49.8 % of the MACs (498.0 k of 1.00 M)" in text
    assert "accuracy 95.00 % (dense 99.00 %) on the search split" in text
    assert summary.counts(view) == "5 trials completed, 1 infeasible, 1 failed"


def test_failing_baselines_do_not_flatten_the_plot(made_up: type[MadeUp]) -> None:
    good = [made_up.completed(at, 0.2 - at / 100, 480_000 + at, accuracy=0.95) for at in range(9)]
    view = made_up.view(*good, made_up.completed(9, 2.3, 490_000, accuracy=0.10))
    low, high = summary.accuracy_range(view)
    assert 90 < low < 95
    assert high < 100


def test_a_dense_network_that_knows_the_split_by_heart_does_not_flatten_the_plot(
    made_up: type[MadeUp],
) -> None:
    near = made_up.view(made_up.completed(0, 0.05, 400_000), made_up.completed(1, 0.4, 300_000))
    assert summary.loss_range(near)[0] < near.dense_metrics["loss"]
    far = made_up.view(made_up.completed(0, 0.5, 400_000), made_up.completed(1, 0.9, 300_000))
    low, high = summary.loss_range(far)
    assert 0.4 < low < 0.5 < 0.9 < high
    assert "dense network: 0.01, below the axis" in page.front_page(far)


def test_the_page_is_self_contained_and_tells_each_trial(view: SearchView) -> None:
    text = page.front_page(view)
    assert 'src="http' not in text
    for word in (
        "budget 50",
        "trial 4",
        "criterion l2",
        "removed blocks: layer1.1",
        "one-shot baseline",
    ):
        assert word in text


def test_names_are_escaped(made_up: type[MadeUp]) -> None:
    record = made_up.completed(0, 0.2, 400_000, removed=("<script>x</script>",))
    assert "<script>x" not in page.front_page(made_up.view(record))


@pytest.mark.parametrize("figure", [plots.front_png, plots.ratios_png, plots.hypervolume_png])
def test_png_plots_are_drawn(view: SearchView, figure: object) -> None:
    out = io.BytesIO()
    assert callable(figure)
    figure(view).savefig(out)
    assert out.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize("accuracy", [0.2, 0.99, 1.0])
def test_one_trial_is_enough_for_a_plot(made_up: type[MadeUp], accuracy: float) -> None:
    view = made_up.view(made_up.completed(0, 0.001, 400_000, accuracy=accuracy))
    for figure in (plots.front_png, plots.ratios_png, plots.hypervolume_png):
        figure(view).savefig(io.BytesIO())  # a plot that does not fit its page warns
    assert "1 trial completed" in page.front_page(view)


def test_a_problem_without_accuracy_is_plotted_by_loss(made_up: type[MadeUp]) -> None:
    view = made_up.view(
        made_up.completed(0, 0.3, 200_000, accuracy=None),
        made_up.completed(1, 0.2, 400_000, accuracy=None),
    )
    assert summary.measured(view) == ["loss"]
    assert len(plots.front_png(view).axes) == 1
    assert "loss 0.2000" in page.front_page(view)


def test_the_pruning_ratios_are_those_of_the_front(view: SearchView) -> None:
    names, matrix = summary.ratio_matrix(view)
    assert names == list(view.sizes)
    assert matrix[names.index("layer1.1.conv1")] == [0.0, 1.0, 0.0]
    assert matrix[names.index("layer1.0.conv1")] == [0.5, 0.5, 0.5]


def test_the_hypervolume_rises_with_completed_trials_alone(view: SearchView) -> None:
    series = view.hypervolumes()
    assert [number for number, _ in series] == [0, 1, 3, 4, 6]
    values = [value for _, value in series]
    assert values == sorted(values)
    assert values[-1] == view.front.hypervolume

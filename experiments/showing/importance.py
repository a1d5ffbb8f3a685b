"""Which decisions mattered for the loss at equal MACs: permutation importance of a forest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paretoprune.experiments.showing.plots import FRONT, new_figure
from paretoprune.experiments.showing.tables import stage_of
from paretoprune.experiments.showing.view import SearchView
from paretoprune.search import Completed, Record, Stopped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_TRIALS = 20
"""Fewer trials with a loss tell nothing about several decisions."""
_REPEATS = 10
_RELIABLE = 0.3


@dataclass(frozen=True, slots=True)
class Importance:
    """How much each decision tells about the loss.

    Attributes:
        shares: Per decision, its share of the sum, falling; they sum to 1.
        explained: Share of the variance that the forest explains in trials that it has not seen
            (out-of-bag R^2), above 0; near 0 the shares mean little.
    """

    shares: Mapping[str, float]
    explained: float


def importance(view: SearchView) -> Importance | None:
    """Returns the importance of the decisions; None where the trials tell nothing about it.

    A random forest (Breiman, Machine Learning 45, 2001) learns from the decisions by how much the
    logarithm of the loss differs from its mean over the trials of the same budget; a decision's
    importance is what shuffling it adds to the squared error. Without the budget's part, which
    every search would show first, the others can be told apart.

    Trials that were stopped early take part with their estimate of the loss on the whole split
    (see `search.racing`): the trials that completed are the better ones, and what makes a network
    bad would not be seen in them.
    """
    from sklearn.ensemble import RandomForestRegressor

    losses_of = [
        (record, record.outcome.metrics["loss"])  # or its estimate
        for record in view.records
        if isinstance(record.outcome, Completed | Stopped) and record.outcome.metrics["loss"] > 0
    ]
    if len(losses_of) < LEAST_TRIALS:
        return None
    records = [record for record, _ in losses_of]
    columns = _columns(records, view)
    losses = _beside_the_budget(records, np.log([loss for _, loss in losses_of]))
    if not columns or np.ptp(losses) == 0:
        return None
    owners = [name for name, values in columns.items() for _ in range(values.shape[1])]
    table = np.concatenate(list(columns.values()), axis=1)
    forest = RandomForestRegressor(100, min_samples_leaf=2, oob_score=True, random_state=0)
    forest.fit(table, losses)
    error = _error(forest, table, losses)
    generator = np.random.default_rng(0)
    added = {}
    for name in columns:
        own = [at for at, owner in enumerate(owners) if owner == name]
        errors = []
        for _ in range(_REPEATS):
            shuffled = table.copy()
            shuffled[:, own] = table[generator.permutation(len(table))][:, own]
            errors.append(_error(forest, shuffled, losses))
        added[name] = max(float(np.mean(errors)) - error, 0.0)
    whole = sum(added.values())
    if whole == 0 or forest.oob_score_ <= 0:
        return None
    falling = sorted(added, key=lambda name: -added[name])
    return Importance({name: added[name] / whole for name in falling}, float(forest.oob_score_))


def _beside_the_budget(
    records: Sequence[Record], losses: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Returns the log losses minus their mean over the trials of the same budget."""
    own = np.asarray([record.candidate.budget for record in records])
    beside = losses.copy()
    for budget in np.unique(own):
        beside[own == budget] -= losses[own == budget].mean()
    return beside


def _error(forest: Any, table: NDArray[np.float64], losses: NDArray[np.float64]) -> float:
    return float(np.mean((forest.predict(table) - losses) ** 2))


def _columns(records: Sequence[Record], view: SearchView) -> dict[str, NDArray[np.float64]]:
    """Returns the decisions that differ between trials, each shape (trials, columns)."""
    stages = stage_of(list(view.sizes))
    candidates = [record.candidate for record in records]
    decided: dict[str, list[list[float]]] = {}
    for name in ("criterion", "allocation"):
        known = sorted({getattr(one, name) for one in candidates})
        decided[name] = [
            [float(getattr(candidate, name) == one) for one in known] for candidate in candidates
        ]
    decided["blocks removed"] = [
        [float(block in record.removed) for block in view.blocks] for record in records
    ]
    for stage in dict.fromkeys(stages.values()):
        members = [name for name in stages if stages[name] == stage]
        decided[f"offset of {stage}"] = [
            [float(np.mean([candidate.offsets.get(name, 0.0) for name in members]))]
            for candidate in candidates
        ]
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in decided.items()}
    return {name: one for name, one in columns.items() if one.size and np.ptp(one, axis=0).any()}


def caption(found: Importance) -> str:
    """Returns how to read the picture."""
    return (
        f"At equal MACs: what shuffling one decision adds to the error of a random forest that "
        f"predicts the log loss, as shares of the sum. The forest explains {found.explained:.0%} "
        f"of the variance in trials that it has not seen"
        + ("." if found.explained > _RELIABLE else ": too little to rely on.")
    )


def importance_png(found: Importance) -> Figure:
    """Returns the picture of an importance."""
    figure, (axis,) = new_figure(7.4, 1.6 + 0.28 * len(found.shares), 1)
    axis.barh(list(found.shares), [100 * one for one in found.shares.values()], color=FRONT)
    axis.invert_yaxis()
    axis.set_xlabel("share of the importance for the loss, %", fontsize=9)
    axis.set_title(
        f"Importance of the decisions at equal MACs ({found.explained:.0%} of variance explained)",
        loc="left",
        fontsize=10,
    )
    return figure


def importance_figure(found: Importance) -> Any:
    """Returns the plotly figure of an importance."""
    import plotly.graph_objects as go

    bars = go.Bar(
        x=list(found.shares.values()), y=list(found.shares), orientation="h", marker_color=FRONT,
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(bars)
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text="share of the importance for the loss", tickformat=".0%")
    return figure

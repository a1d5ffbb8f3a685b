"""Pareto fronts and hypervolume: pure functions of records.

Everything below `ParetoFront` minimises: `minimised` is the one place where the sign of a
maximised objective is flipped, and its reference point with it. Arrays of points have shape
(n_points, n_objectives).

Hypervolume for three and more objectives follows WFG: While, Bradstreet and Barone, "A fast way
of calculating exact hypervolumes", IEEE Transactions on Evolutionary Computation 16(1), 2012.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from paretoprune.search.problem import Direction, Objective
from paretoprune.search.record import Completed, Record
from paretoprune.search.show import draw, html_table, metrics_of, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

Points = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class ParetoFront:
    """The completed records that no other completed record dominates.

    Attributes:
        records: Sorted by MACs, most first. Of records that are equal in every objective the
            earliest stands for all.
        objectives: What the search optimises, in order.
    """

    records: tuple[Record, ...]
    objectives: tuple[Objective, ...]

    @staticmethod
    def of(records: Iterable[Record], objectives: Sequence[Objective]) -> ParetoFront:
        """Returns the front of `records`; those that are not completed take no part."""
        completed = sorted(
            (record for record in records if isinstance(record.outcome, Completed)),
            key=lambda record: record.number,
        )
        points = _points(completed, objectives)
        first = {tuple(point): index for index, point in reversed([*enumerate(points.tolist())])}
        front = [
            completed[i] for i in np.flatnonzero(non_dominated(points)) if i in first.values()
        ]
        front.sort(key=lambda record: (-metrics_of(record)["macs"], record.number))
        return ParetoFront(tuple(front), tuple(objectives))

    @property
    def hypervolume(self) -> float:
        """The volume dominated up to the reference point; 0 for an empty front.

        Every objective is in units of its reference (as it is where the reference is 0), so that
        objectives with references above 0 that are minimised towards 0 give a number in [0, 1].
        """
        reference = np.array([_flip(o, o.reference) for o in self.objectives])
        scale = np.where(reference == 0, 1.0, np.abs(reference))
        return hypervolume(_points(self.records, self.objectives) / scale, reference / scale)

    def best(self, max_macs: int | None = None) -> Record:
        """Returns the record of the front that is best in the first objective.

        Records that were fine-tuned count with the better of before and after it; see
        `Record.handed_out`.

        Args:
            max_macs: Only records with at most so many MACs; None takes all.

        Raises:
            ValueError: If there is no such record.
        """
        if not self.records:
            raise ValueError("the front is empty: no trial has completed.")
        fitting = [
            record
            for record in self.records
            if max_macs is None or metrics_of(record)["macs"] <= max_macs
        ]
        if not fitting:
            smallest = int(metrics_of(self.records[-1])["macs"])
            raise ValueError(
                f"no record of the front has at most {max_macs:,} MACs; the smallest has "
                f"{smallest:,}."
            )
        return min(fitting, key=lambda one: self._rank(one.handed_out))

    def leading(self, count: int, max_macs: int) -> list[Record]:
        """Returns the records that are best in the first objective before any fine-tuning.

        Args:
            count: At most so many.
            max_macs: Only records with at most so many MACs.
        """
        fitting = [one for one in self.records if metrics_of(one)["macs"] <= max_macs]
        return sorted(fitting, key=lambda one: self._rank(metrics_of(one)))[:count]

    def _rank(self, metrics: Mapping[str, float]) -> float:
        """Returns the first objective, smaller better."""
        return _flip(self.objectives[0], metrics[self.objectives[0].name])

    def smallest(self, min_accuracy: float) -> Record:
        """Returns the record of the front with the fewest MACs that is accurate enough.

        Args:
            min_accuracy: Least accuracy on the search split, a fraction, of the network that is
                handed out; see `Record.handed_out`.

        Raises:
            ValueError: If there is no such record, or accuracy was not measured.
        """
        if not self.records:
            raise ValueError("the front is empty: no trial has completed.")
        accuracies = [record.handed_out.get("accuracy") for record in self.records]
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        if not known:
            raise ValueError("the search measured no accuracy; choose by FLOPs or trial.")
        for record, accuracy in reversed([*zip(self.records, accuracies, strict=True)]):
            if accuracy is not None and accuracy >= min_accuracy:
                return record
        raise ValueError(
            f"no record of the front has an accuracy of {min_accuracy:.2%} on the search split; "
            f"the best has {max(known):.2%}."
        )

    def to_dataframe(self) -> DataFrame:
        """Returns a row per record, MACs falling: its trial, decisions and metrics."""
        from pandas import DataFrame

        return DataFrame([values_of(record) for record in self.records])

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draws the front over MACs: accuracy if it was measured, else the first objective.

        Args:
            axes: Where to draw; None takes a new figure of pyplot, which notebooks show.
        """
        return draw(self.records, self.objectives[0], axes)

    def __repr__(self) -> str:
        """Returns one line; that of every plan would fill pages."""
        if not self.records:
            return "<ParetoFront: no records>"
        most, least = (int(metrics_of(self.records[at])["macs"]) for at in (0, -1))
        return f"<ParetoFront: {len(self.records)} records, {least:,} to {most:,} MACs>"

    def _repr_html_(self) -> str:
        """Returns the front as a table, for notebooks."""
        return html_table([values_of(record) for record in self.records])


def no_worse(
    objectives: Sequence[Objective], before: Mapping[str, float], after: Mapping[str, float]
) -> bool:
    """Returns whether a network came out of a training no worse than it went in.

    The first objective decides that was measured of both, the next ones where it is equal; where
    there is none, the loss.

    Args:
        objectives: What the search optimises, in order.
        before: Metrics of the network on the search split before the training.
        after: After it.
    """
    measured = [one for one in objectives if one.name in before and one.name in after]
    if not measured:
        return after["loss"] <= before["loss"]
    ranks = [[_flip(one, of[one.name]) for one in measured] for of in (after, before)]
    return ranks[0] <= ranks[1]


def _flip(objective: Objective, value: float) -> float:
    """Returns `value` such that smaller is better."""
    return value if objective.direction is Direction.MINIMIZE else -value


def _points(records: Sequence[Record], objectives: Sequence[Objective]) -> Points:
    """Returns what each record reached in each objective, smaller better."""
    rows = [[_flip(o, metrics_of(record)[o.name]) for o in objectives] for record in records]
    return np.array(rows, dtype=np.float64).reshape(len(records), len(objectives))


def non_dominated(points: Points) -> NDArray[np.bool_]:
    """Returns which points no other point dominates, shape (n_points,); equal points all stay.

    Args:
        points: Shape (n_points, n_objectives), smaller is better.
    """
    stays = np.ones(len(points), dtype=np.bool_)
    for index, point in enumerate(points):
        dominating = (points <= point).all(1) & (points < point).any(1)
        stays[index] = not dominating.any()
    return stays


def hypervolume(points: Points, reference: Points) -> float:
    """Returns the exact volume that `points` dominate up to `reference`.

    Args:
        points: Shape (n_points, n_objectives), smaller is better. Points that are not better
            than the reference in every objective add nothing.
        reference: Shape (n_objectives,), finite.
    """
    inside = points[(points < reference).all(1)]
    inside = np.unique(inside[non_dominated(inside)], axis=0)  # sorted by the first objective
    return _volume(inside, reference)


def _volume(points: Points, reference: Points) -> float:
    """Returns the volume of points that lie inside the reference and are sorted by the first."""
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 2:
        above = np.append(reference[1], np.minimum.accumulate(points[:, 1])[:-1])
        heights = np.maximum(above - points[:, 1], 0.0)
        return float(((reference[0] - points[:, 0]) * heights).sum())
    return sum(_exclusive(points, index, reference) for index in range(len(points)))


def _exclusive(points: Points, index: int, reference: Points) -> float:
    """Returns the volume that `points[index]` dominates and no later point does (WFG, Fig. 4)."""
    point = points[index]
    limited = np.maximum(points[index + 1 :], point)
    limited = np.unique(limited[non_dominated(limited)], axis=0)
    return float(np.prod(reference - point)) - _volume(limited, reference)

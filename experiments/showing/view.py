"""SearchView: everything that tables, plots and tracking show of a search, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from paretoprune.experiments.showing.tables import Row, rows_of
from paretoprune.search import Completed, Objective, ParetoFront, Record, SearchInfo
from paretoprune.surgery import Cost


@dataclass(frozen=True)
class SearchView:
    """A search as it stands; a pure function of its records.

    Attributes:
        name: Name of the problem.
        dense: Cost of the dense network.
        dense_metrics: Its `loss` and `accuracy` on the search split, and `latency` where that is
            an objective.
        target: MACs that a plan may keep at most.
        objectives: What the search optimises, in order.
        records: All trials so far, by number.
        sizes: Units of each prunable group of the dense network, in network order.
        blocks: For each removable block, the groups that go with it.
    """

    name: str
    dense: Cost
    dense_metrics: Mapping[str, float]
    target: int
    objectives: tuple[Objective, ...]
    records: tuple[Record, ...]
    sizes: Mapping[str, int]
    blocks: Mapping[str, Sequence[str]]

    @staticmethod
    def of(info: SearchInfo) -> SearchView:
        """Returns the view of a search as it starts, with the records already there."""
        return SearchView(
            name=info.problem,
            dense=info.dense,
            dense_metrics=info.metrics,
            target=info.target,
            objectives=info.objectives,
            records=tuple(info.records),
            sizes=info.sizes,
            blocks=info.blocks,
        )

    @cached_property
    def front(self) -> ParetoFront:
        """The non-dominated records."""
        return ParetoFront.of(self.records, self.objectives)

    @cached_property
    def best(self) -> Record | None:
        """The best of the front that meets the target; None if there is none yet."""
        fitting = self.front.leading(1, self.target)
        return self.front.best(self.target) if fitting else None

    @property
    def shown(self) -> Record:
        """The best of the front that meets the target, else the best; there must be a front."""
        return self.best or self.front.best()

    def told(self, record: Record) -> SearchView:
        """Returns the view with one more record, or with one that was fine-tuned since."""
        others = [one for one in self.records if one.number != record.number]
        ordered = sorted((*others, record), key=lambda one: one.number)
        return replace(self, records=tuple(ordered))

    @cached_property
    def rows(self) -> list[Row]:
        """One row per completed trial, by number."""
        return rows_of(self.records, self.front, self.dense)

    @cached_property
    def front_rows(self) -> list[Row]:
        """The rows of the front, MACs falling."""
        return rows_of(self.front.records, self.front, self.dense)

    def row(self, record: Record) -> Row:
        """Returns the row of a member of the front."""
        return next(row for row in self.front_rows if row.trial == record.number)

    @property
    def target_ratio(self) -> float:
        """The target as a share of the dense MACs."""
        return self.target / self.dense.macs

    def count(self, *kinds: type) -> int:
        """Returns how many records ended in one of the outcome types."""
        return sum(isinstance(record.outcome, kinds) for record in self.records)

    def to_json(self) -> dict[str, Any]:
        """Returns what was asked and found as plain values, for JSON."""
        return {
            "dense": {**asdict(self.dense), **self.dense_metrics},
            "target_macs": self.target,
            "trials": len(self.records),
            "completed": len(self.rows),
            "best": None if self.best is None else self.best.number,
            "front": [asdict(row) for row in self.front_rows],
        }

    def hypervolumes(self) -> list[tuple[int, float]]:
        """Returns (trial number, hypervolume of the front after it) per completed trial."""
        series: list[tuple[int, float]] = []
        front = ParetoFront.of((), self.objectives)
        for record in sorted(self.records, key=lambda one: one.number):
            if isinstance(record.outcome, Completed):
                front = ParetoFront.of((*front.records, record), self.objectives)
                series.append((record.number, front.hypervolume))
        return series

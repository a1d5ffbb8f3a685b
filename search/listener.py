"""Listener and SearchInfo: how others follow a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from paretoprune.search.front import ParetoFront
from paretoprune.search.problem import Direction, Objective
from paretoprune.search.record import Record
from paretoprune.surgery import Cost


@dataclass(frozen=True)
class SearchInfo:
    """What a search is about, and the records that it has.

    Attributes:
        problem: Name of the problem.
        dense: Cost of the dense network.
        metrics: The dense network's `loss` and, for a classifier, `accuracy` on the search split;
            its `latency` in milliseconds where that is an objective.
        target: Most MACs that a plan may have.
        trials: How many trials are to be finished.
        objectives: What the search optimises, in order.
        criteria: Names of the criteria in the search space.
        sizes: Units of every group that can be pruned, in execution order.
        blocks: For each removable block, the groups that go with it.
        records: The records that are there, by number.
    """

    problem: str
    dense: Cost
    metrics: Mapping[str, float]
    target: int
    trials: int
    objectives: tuple[Objective, ...]
    criteria: tuple[str, ...]
    sizes: Mapping[str, int]
    blocks: Mapping[str, tuple[str, ...]]
    records: tuple[Record, ...] = ()

    @property
    def front(self) -> ParetoFront:
        """The front of the records."""
        return ParetoFront.of(self.records, self.objectives)

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the records as plain values, for JSON."""
        return {
            "problem": self.problem,
            "dense": {"macs": self.dense.macs, "params": self.dense.params},
            "metrics": dict(self.metrics),
            "target": self.target,
            "trials": self.trials,
            "objectives": [
                {
                    "name": objective.name,
                    "direction": objective.direction.value,
                    "unit": objective.unit,
                    "reference": objective.reference,
                }
                for objective in self.objectives
            ],
            "criteria": list(self.criteria),
            "sizes": dict(self.sizes),
            "blocks": {block: list(groups) for block, groups in self.blocks.items()},
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], records: tuple[Record, ...] = ()) -> SearchInfo:
        """Returns what `to_json` wrote, with records."""
        return SearchInfo(
            problem=data["problem"],
            dense=Cost(**data["dense"]),
            metrics=dict(data["metrics"]),
            target=data["target"],
            trials=data["trials"],
            objectives=tuple(
                Objective(**{**item, "direction": Direction(item["direction"])})
                for item in data["objectives"]
            ),
            criteria=tuple(data["criteria"]),
            sizes=dict(data["sizes"]),
            blocks={block: tuple(groups) for block, groups in data["blocks"].items()},
            records=records,
        )


class Listener(Protocol):
    """Follows a search; called in the driver, one call at a time.

    What a listener raises ends the search; the records until then are in the study.
    """

    def started(self, info: SearchInfo) -> None:
        """The search begins, or goes on with the records in `info`."""
        ...

    def finished(self, record: Record, front: ParetoFront) -> None:
        """A trial has its outcome; `front` is the front with it.

        A record whose number was told before takes its place: it has been fine-tuned.
        """
        ...

    def ended(self, error: BaseException | None) -> None:
        """The search is over: all is done, or `error` ended it before, and it can be resumed.

        Where the user ended it, that is a KeyboardInterrupt.
        """
        ...

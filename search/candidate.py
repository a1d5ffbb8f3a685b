"""Candidate: one suggested decision, and nothing that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """What a sampler decides; `decode` turns it into a plan on budget.

    Attributes:
        criterion: Name of the criterion that ranks units.
        budget: Fraction of the dense network's MACs that the plan may keep, in (0, 1].
        allocation: `global` ranks all units together, `joint` units and blocks together;
            `uniform` takes the same share of every group.
        offsets: Per group, added to the logarithms of its units' saliencies before ranking:
            positive keeps more of the group. Missing is 0.
        removed: Names of the blocks that are removed whole.
    """

    criterion: str
    budget: float
    allocation: str = "global"
    offsets: Mapping[str, float] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the candidate as plain values, for JSON."""
        return {
            "criterion": self.criterion,
            "budget": self.budget,
            "allocation": self.allocation,
            "offsets": dict(self.offsets),
            "removed": list(self.removed),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Candidate:
        """Returns the candidate that `to_json` wrote."""
        return Candidate(
            criterion=data["criterion"],
            budget=data["budget"],
            allocation=data["allocation"],
            offsets=dict(data["offsets"]),
            removed=tuple(data["removed"]),
        )

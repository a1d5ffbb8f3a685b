"""PruningPlan: which units of which groups stay, and which blocks go."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """The decision that turns a dense network into a smaller one; names only, never modules.

    Attributes:
        kept: For each group that loses units, the sorted indices of the units that stay; at
            least one. A group that is not named is kept whole.
        removed: Sorted names of the residual blocks that are removed whole.

    Raises:
        TypeError: If an index is no integer.
        ValueError: If indices are empty, negative or repeated.
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)  # a search asks for it very often

    def __post_init__(self) -> None:
        kept: dict[str, tuple[int, ...]] = {}
        for name in sorted(self.kept):
            units = tuple(sorted(map(operator.index, self.kept[name])))
            if not units or units[0] < 0 or len(set(units)) != len(units):
                raise ValueError(
                    f"a plan keeps at least one unit of a group, each once and none negative, "
                    f"but got {units} for group {name!r}."
                )
            kept[name] = units
        object.__setattr__(self, "kept", MappingProxyType(kept))
        object.__setattr__(self, "removed", tuple(sorted(set(self.removed))))
        object.__setattr__(self, "_hash", hash((tuple(kept.items()), self.removed)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy does not pickle
        return PruningPlan, (dict(self.kept), self.removed)

    def then(self, other: PruningPlan) -> PruningPlan:
        """Returns the one plan that equals this plan followed by `other`.

        Args:
            other: A plan in the unit numbers of the network that this plan leaves.

        Raises:
            ValueError: If `other` names a unit that this plan does not leave.
        """
        kept = dict(self.kept)
        for name, units in other.kept.items():
            before = self.kept.get(name)
            if before is None:
                kept[name] = units
                continue
            if units[-1] >= len(before):
                raise ValueError(
                    f"group {name!r} has {len(before)} units left, so unit {units[-1]} does not "
                    f"exist; units are 0 to {len(before) - 1}."
                )
            kept[name] = tuple(before[unit] for unit in units)
        return PruningPlan(kept, (*self.removed, *other.removed))

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain lists and strings, for JSON."""
        return {
            "kept": {name: list(units) for name, units in self.kept.items()},
            "removed": list(self.removed),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PruningPlan:
        """Returns the plan that `to_json` wrote.

        Raises:
            ValueError: If `data` has another form.
        """
        try:
            if isinstance(data["removed"], str):
                raise TypeError("a name is no list of names")
            return PruningPlan(
                {str(name): tuple(units) for name, units in data["kept"].items()},
                tuple(str(name) for name in data["removed"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"a plan has the fields 'kept' (lists of unit numbers by group) and 'removed' "
                f"(a list of block names), but got {data!r}."
            ) from error

"""Bounds: what may be pruned of every group, whatever the ranking says."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from paretoprune.criteria.units import Units
from paretoprune.surgery import PrunableGroup, PruningGraph

_EXACT = 1e-9  # of the units of a group: 0.3 * 10 is not 3 in floating point


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which unit counts a plan may keep; the defaults allow all.

    A group may always keep all of its units, whatever their multiple: no rounding can widen it.
    Where the bounds leave no count at all, keeping comes before removing: the group keeps the
    fewest units that `minimum`, `multiple` and `max_ratio` allow, although `min_ratio` asks for
    fewer.

    Attributes:
        minimum: Units that stay in every group; a smaller group stays whole.
        multiple: The channels that a group leaves to each of its layers are a multiple of this,
            as kernels like them. A unit may be several channels, as an attention head is.
        min_ratio: Least pruning ratio of every group, in [0, 1).
        max_ratio: Largest pruning ratio of every group, in [0, 1]. A block that is removed whole
            is no pruned group; `exclude` keeps blocks.
        exclude: Patterns as of a shell (`*`, `?`, `[…]`; `*` matches dots, too) of groups, blocks
            and modules that stay whole: with a module, what lies in it. All channels that such a
            layer or norm puts out stay, and a block that has some of them is not removed.

    Raises:
        ValueError: If a number is out of range.
    """

    minimum: int = 1
    multiple: int = 1
    min_ratio: float = 0.0
    max_ratio: float = 1.0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("minimum", "multiple"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is a whole number of at least 1, but got {value!r}.")
        if not (0 <= self.min_ratio <= self.max_ratio <= 1 and self.min_ratio < 1):
            raise ValueError(
                f"pruning ratios must be 0 <= min_ratio <= max_ratio <= 1 and min_ratio < 1, but "
                f"got {self.min_ratio} and {self.max_ratio}."
            )
        if isinstance(self.exclude, str):
            raise ValueError(f"`exclude` is a sequence of patterns, but got {self.exclude!r}.")
        object.__setattr__(self, "exclude", tuple(self.exclude))

    def check(self, graph: PruningGraph) -> None:
        """Verifies that every pattern excludes something.

        Raises:
            ValueError: If one matches nothing; lists groups and blocks.
        """
        known = {*graph.groups, *graph.blocks, *_modules(graph)} if self.exclude else set()
        for pattern in self.exclude:
            if not any(_matches(name, pattern) for name in known):
                raise ValueError(
                    f"no group, block or module matches {pattern!r}; groups: "
                    f"{', '.join(graph.groups)}; blocks: {', '.join(graph.blocks) or 'none'}."
                )

    def counts(self, graph: PruningGraph, group: PrunableGroup) -> Tensor:
        """Returns the numbers of units that a group may keep, float64, ascending, at least one."""
        size = group.size
        if self.exclude and group.name in _whole(graph, self.exclude):
            return torch.tensor([float(size)], dtype=torch.float64)
        least = max(min(self.minimum, size), math.ceil(size * (1 - self.max_ratio) - _EXACT))
        step = _step(group, self.multiple)
        counts = [*range(-(-least // step) * step, size, step), size]
        most = max(math.floor(size * (1 - self.min_ratio) + _EXACT), counts[0])
        return torch.tensor([each for each in counts if each <= most], dtype=torch.float64)

    def blocks(self, graph: PruningGraph) -> tuple[str, ...]:
        """Returns the names of the blocks that may be removed whole, in execution order."""
        if not self.exclude:
            return tuple(graph.blocks)
        whole = _whole(graph, self.exclude)
        stay = {name for name in _modules(graph) if _excluded(name, self.exclude)}
        return tuple(
            name
            for name, block in graph.blocks.items()
            if whole.isdisjoint(block.groups)
            and not any(f"{each}.".startswith(f"{name}.") for each in stay)
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the bounds as plain values, for JSON."""
        return {**asdict(self), "exclude": list(self.exclude)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Bounds:
        """Returns the bounds that `to_json` wrote."""
        return Bounds(**{**data, "exclude": tuple(data["exclude"])})


def _step(group: PrunableGroup, multiple: int) -> int:
    """Returns the least number of units whose channels are a multiple in every layer.

    Layers are told by their parameters: what is called a weight. Others, such as a table of
    positions with a column per attention head, are not computed in blocks of channels.
    """
    weights = [each for each in group.slices if each.parameter.endswith("weight")]
    widths = [len(each.indices[0]) for each in weights or group.slices]
    return multiple // math.gcd(multiple, *widths)


def _matches(name: str, pattern: str) -> bool:
    """Whether a name, or that of a module around it, matches."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _excluded(name: str, patterns: tuple[str, ...]) -> bool:
    return any(_matches(name, pattern) for pattern in patterns)


@functools.lru_cache(maxsize=8)  # asked for again with every plan of a search
def _whole(graph: PruningGraph, patterns: tuple[str, ...]) -> frozenset[str]:
    """Returns the names of the groups that stay whole."""
    makers = {name for name in _makers(graph) if _excluded(name, patterns)}
    found = {name for name in graph.groups if _excluded(name, patterns)}
    return frozenset(found.union(*(_makers(graph)[name] for name in makers)))


@functools.lru_cache(maxsize=8)
def _makers(graph: PruningGraph) -> Mapping[str, frozenset[str]]:
    """Returns, for every module that puts out units, the groups that these belong to."""
    owned = Units(graph).owned
    made: dict[str, set[str]] = {}
    for group in graph.groups.values():
        for each in group.slices:
            if owned.get(each.parameter) == each.axis:
                module = each.parameter.rpartition(".")[0]
                made.setdefault(module, set()).add(group.name)
    return {module: frozenset(groups) for module, groups in made.items()}


def _modules(graph: PruningGraph) -> set[str]:
    """Returns the names of the modules that compute something or have parameters."""
    return {
        node.target.rpartition(".")[0] if node.kind == "parameter" else node.module
        for node in graph.program.nodes.values()
    }


UNBOUNDED = Bounds()
"""Every count from one unit up, and every block."""

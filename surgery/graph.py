"""PruningGraph: everything that surgery knows about one dense network, computed once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paretoprune.surgery.cost import Cost, Polynomial
from paretoprune.surgery.groups import Block, PrunableGroup
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.program import Program

if TYPE_CHECKING:
    from paretoprune.surgery.recorded import Recording


@dataclass(frozen=True)
class Extent:
    """The part of the program that a block covers: nodes that go, and where its output goes on.

    Attributes:
        source: Name of the value that enters the block.
        result: Name of the value that leaves it; equals `source` once the block is removed.
        nodes: Names of all its nodes.
        branches: Names of the values that are added to the shortcut.
    """

    source: str
    result: str
    nodes: frozenset[str]
    branches: frozenset[str]


@dataclass(frozen=True)
class Number:
    """A size in the code that counts units, and must follow those that stay.

    Attributes:
        value: The size in the dense network.
        units: For every position it counts the units there, as in `PruningGraph.units`; shape
            (value, anything). A position stays when any of them does.
    """

    value: int
    units: Tensor

    def kept(self, mask: Tensor) -> int:
        """Returns the size after surgery, given `kept_mask`."""
        return int(mask[self.units].any(1).sum())


@dataclass(frozen=True)
class Cut:
    """A slice or split of a channel dim.

    Attributes:
        dim: The dim.
        units: The unit at each position along it.
        stops: Where the dim is cut.
    """

    dim: int
    units: Tensor
    stops: tuple[int, ...]

    def kept(self, mask: Tensor) -> tuple[int, ...]:
        """Returns where the dim is cut after surgery, given `kept_mask`."""
        return tuple(int(mask[self.units[:stop]].sum()) for stop in self.stops)


class PruningGraph:
    """Prunable groups, removable blocks and costs of a dense network; picklable, no modules.

    Attributes:
        groups: Prunable groups by name, in execution order; frozen ones say why.
        blocks: Removable residual blocks by name, in execution order.
        program: The dense network as operations.
        units: For every parameter axis with channels, the unit at each position, as an index
            over all units of all groups in order; -1 where the position always stays.
        pads: Likewise for what channel-padding modules return, by module.
        layouts: Likewise for values whose size is written in the program, by node; one tensor
            that broadcasts to the value's shape.
        extents: The nodes of every block.
        numbers: Sizes in the code, by module.
        cuts: Slices and splits of channel dims, by node.
        statistics: For every node that averages over units: (dim, the unit at each position).
        recorded: Modules that lose their code when they lose units, with what stands for it.
        divisors: The (parameter, axis) that are not zeroed where units are masked, see
            `find_divisors`.
    """

    def __init__(
        self,
        program: Program,
        groups: Mapping[str, PrunableGroup],
        blocks: Mapping[str, Block],
        *,
        units: Mapping[tuple[str, int], Tensor],
        pads: Mapping[str, tuple[int, Tensor]],
        layouts: Mapping[str, Tensor],
        extents: Mapping[str, Extent],
        numbers: Mapping[str, tuple[Number, ...]],
        cuts: Mapping[str, Cut],
        statistics: Mapping[str, tuple[int, Tensor]],
        recorded: Mapping[str, Recording],
        divisors: Collection[tuple[str, int]],
        macs: Polynomial,
        params: Polynomial,
    ) -> None:
        self.program = program
        self._groups = dict(groups)
        self._blocks = dict(blocks)
        self.units = dict(units)
        self.pads = dict(pads)
        self.layouts = dict(layouts)
        self.extents = dict(extents)
        self.numbers = dict(numbers)
        self.cuts = dict(cuts)
        self.statistics = dict(statistics)
        self.recorded = dict(recorded)
        self.divisors = frozenset(divisors)
        self._macs = macs
        self._params = params
        self._sizes = torch.tensor([g.size for g in groups.values()], dtype=torch.float64)
        self._index = {name: index for index, name in enumerate(groups)}
        self._block_index = {name: index for index, name in enumerate(blocks)}
        starts = torch.zeros(len(groups) + 1, dtype=torch.int64)
        starts[1:] = self._sizes.cumsum(0)
        self._starts = starts.tolist()

    @property
    def groups(self) -> Mapping[str, PrunableGroup]:
        """Prunable groups by name, in execution order."""
        return MappingProxyType(self._groups)

    @property
    def blocks(self) -> Mapping[str, Block]:
        """Removable residual blocks by name, in execution order."""
        return MappingProxyType(self._blocks)

    @property
    def open_groups(self) -> tuple[PrunableGroup, ...]:
        """The groups that are not frozen."""
        return tuple(group for group in self._groups.values() if group.frozen is None)

    def cost(self, plan: PruningPlan | None = None) -> Cost:
        """Returns the cost of the dense network or of a plan, without a forward pass.

        Raises:
            ValueError: If the plan does not fit this network.
        """
        plan = plan or PruningPlan()
        self.check(plan)
        counts = self._sizes.clone()
        for name, kept in plan.kept.items():
            counts[self._index[name]] = len(kept)
        removed = self.removed_vector(plan.removed)
        macs = self._macs(counts[None], removed)
        params = self._params(counts[None], removed)
        return Cost(macs=round(macs.item()), params=round(params.item()))

    def macs(self, counts: Tensor, removed: Tensor) -> Tensor:
        """Returns the MACs of many plans, float64, shape (n_plans,).

        Args:
            counts: Kept units per group in the order of `groups`, float64, shape
                (n_plans, n_groups).
            removed: From `removed_vector`.
        """
        return self._macs(counts, removed)

    def removed_vector(self, removed: tuple[str, ...]) -> Tensor:
        """Returns 1 for every block named in `removed`, float64, shape (n_blocks,).

        Raises:
            ValueError: If a name is no removable block.
        """
        vector = torch.zeros(len(self._blocks), dtype=torch.float64)
        for name in removed:
            if name not in self._block_index:
                known = ", ".join(self._blocks) or "none"
                raise ValueError(f"{name!r} is no removable block; removable: {known}.")
            vector[self._block_index[name]] = 1
        return vector

    def check(self, plan: PruningPlan) -> None:
        """Verifies that a plan fits this network.

        Raises:
            ValueError: If it names an unknown or frozen group, a unit that does not exist, or
                an unknown block.
        """
        self.removed_vector(plan.removed)
        for name, kept in plan.kept.items():
            group = self._groups.get(name)
            if group is None:
                raise ValueError(
                    f"the plan names group {name!r}, which this network does not have; it has: "
                    f"{', '.join(self._groups)}."
                )
            if group.frozen is not None and len(kept) < group.size:
                raise ValueError(f"group {name!r} is frozen ({group.frozen}) and loses no unit.")
            if kept[-1] >= group.size:
                raise ValueError(
                    f"group {name!r} has units 0 to {group.size - 1}, "
                    f"but the plan keeps {kept[-1]}."
                )

    def kept_mask(self, plan: PruningPlan) -> Tensor:
        """Returns whether each unit stays, bool, shape (all units + 1,); the last is True.

        The last entry stands for positions that always stay, so that `mask[units]` works for
        unit -1.

        Raises:
            ValueError: If the plan does not fit this network.
        """
        self.check(plan)
        mask = torch.ones(self._starts[-1] + 1, dtype=torch.bool)
        for name, kept in plan.kept.items():
            start = self._starts[self._index[name]]
            mask[start : start + self._groups[name].size] = False
            mask[start + torch.tensor(kept)] = True
        return mask

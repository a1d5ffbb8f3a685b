"""PrunableGroup, ChannelSlice, Block: what can be removed, by qualified names."""

from __future__ import annotations

from dataclasses import dataclass


def layer_of(parameter: str) -> str:
    """Returns the module that a parameter belongs to, given its qualified name.

    A layer whose weight is parametrized keeps what that is made of in a module inside it. A
    parameter of the network itself stands for itself.
    """
    layer, parametrized, _ = parameter.partition(".parametrizations.")
    return layer if parametrized else parameter.rpartition(".")[0] or parameter


@dataclass(frozen=True, slots=True)
class ChannelSlice:
    """Where the units of a group lie along one axis of one parameter.

    Attributes:
        parameter: Qualified name of a parameter or buffer.
        axis: The axis along which units lie.
        indices: Per unit, its positions along that axis; every unit has equally many.
    """

    parameter: str
    axis: int
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class PrunableGroup:
    """Coupled channels: units that are removed from all their slices together.

    Zeroing all slices of a unit, but for `PruningGraph.divisors`, masks it: the dense network then
    computes what the pruned one does.

    Attributes:
        name: Qualified name of the first layer that produces the units.
        size: Number of units.
        slices: Every place where the units lie.
        frozen: None, or the reason why the units cannot be removed.
        statistics: Qualified names of the modules that average over the units (layer norms and
            the like). They average over the units that stay, so that a pruned network equals the
            masked one only with the masked units left out of their averages.
    """

    name: str
    size: int
    slices: tuple[ChannelSlice, ...]
    frozen: str | None = None
    statistics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block that can be removed whole: without its branch it is the identity.

    Attributes:
        name: Qualified name of the module that becomes an identity.
        groups: Names of the groups that lie inside it alone and disappear with it.
    """

    name: str
    groups: tuple[str, ...] = ()

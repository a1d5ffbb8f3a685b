"""Bottlenecks: layers of which a global ranking removes little, and how to widen them.

Nonnenmacher et al., ICLR 2022, arXiv:2110.11395: layers that SOSP hardly prunes at a medium or
high ratio hold the network back. Widened by a factor of 2, trained again and pruned back to the
old budget, the network does better than one widened uniformly. Below half of the global pruning
ratio a layer counts as a bottleneck; that threshold is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.criteria.units import Units
from paretoprune.surgery import PruningGraph, PruningPlan
from paretoprune.surgery.attributes import follow_weights

SHARE = 0.5
"""A layer that loses less than this share of the global pruning ratio is a bottleneck."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """How much of a group a plan removes.

    Attributes:
        group: Its name.
        units: Its size.
        removed: Units that the plan removes.
        bottleneck: Whether that is markedly less than elsewhere.
    """

    group: str
    units: int
    removed: int
    bottleneck: bool

    @property
    def ratio(self) -> float:
        """The pruning ratio, in [0, 1)."""
        return self.removed / self.units


def pressures(graph: PruningGraph, plan: PruningPlan) -> list[Pressure]:
    """Returns the pressure on every open group, the tightest bottleneck first.

    Args:
        graph: The dense network's graph.
        plan: From a global ranking, such as SOSP's, at a medium or small budget.
    """
    gone = {g.name: g.size - len(plan.kept.get(g.name, range(g.size))) for g in graph.open_groups}
    total = sum(group.size for group in graph.open_groups)
    limit = SHARE * sum(gone.values()) / max(1, total)
    found = [
        Pressure(g.name, g.size, gone[g.name], gone[g.name] / g.size < limit)
        for g in graph.open_groups
    ]
    return sorted(found, key=lambda pressure: pressure.ratio)


def widen(
    model: nn.Module, graph: PruningGraph, groups: Sequence[str], factor: float = 2.0
) -> nn.Module:
    """Returns a copy in which some groups have more units, and which computes the same.

    New units copy old ones in turn, and what reads a unit that has copies is shared out among
    them (Net2WiderNet, Chen, Goodfellow & Shlens, ICLR 2016, arXiv:1511.05641), so that outputs
    stay equal wherever no norm runs over the widened channels. Copies stay equal under training,
    too: `reset` the parameters to train from scratch.

    Args:
        model: The dense network; left untouched.
        graph: Its graph.
        groups: Names of the groups to widen.
        factor: How many times as wide they become, above 1; sizes are rounded up.

    Raises:
        ValueError: If a name is no open group, or the factor is not above 1.
    """
    if not factor > 1:
        raise ValueError(f"a widening factor lies above 1, but got {factor}.")
    counts = _counts(graph, groups, factor)
    owned = Units(graph).owned
    parameters = dict(model.named_parameters(remove_duplicate=False))
    memo: dict[int, Any] = {}
    for name, tensor in (
        *parameters.items(),
        *model.named_buffers(remove_duplicate=False),
    ):
        data = tensor.detach().clone()
        for (parameter, axis), units in graph.units.items():
            if parameter != name:
                continue
            times = counts[units]
            if name in parameters and owned.get(name) != axis:
                data = data / _along(times.to(data), axis, data.ndim)
            positions = _repeated(units, times)
            data = data.index_select(axis, positions.to(data.device))
        if id(tensor) not in memo or data.shape != tensor.shape:
            keep = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if keep else data
    wide = copy.deepcopy(model, memo)
    for module in wide.modules():
        follow_weights(module)
    for name, (dim, units) in graph.pads.items():
        pad: Any = wide.get_submodule(name)
        widths = list(pad.padding)
        before, after = widths[2 * dim], widths[2 * dim + 1]
        times = counts[units]
        widths[2 * dim] = int(times[:before].sum())
        widths[2 * dim + 1] = int(times[len(times) - after :].sum())
        pad.padding = tuple(widths)
    return wide


def reset(model: nn.Module, seed: int = 0) -> nn.Module:
    """Returns a copy with new initial weights, for training from scratch.

    Args:
        model: Left untouched.
        seed: Of the draw; torch's generators stay as they are.
    """
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for module in fresh.modules():
            renew: Any = getattr(module, "reset_parameters", None)
            if callable(renew):
                renew()
    return fresh


def _counts(graph: PruningGraph, groups: Sequence[str], factor: float) -> Tensor:
    """Returns how often each unit is to be there; the last entry is for what always stays."""
    names = {group.name: group.size for group in graph.open_groups}
    for name in groups:
        if name not in names:
            raise ValueError(f"{name!r} is no prunable group here; prunable: {', '.join(names)}.")
    counts = []
    for group in graph.groups.values():
        times = torch.ones(group.size, dtype=torch.int64)
        if group.name in groups:
            new = -int(-group.size * factor // 1) - group.size
            times += torch.arange(new).remainder(group.size).bincount(minlength=group.size)
        counts.append(times)
    return torch.cat([*counts, torch.ones(1, dtype=torch.int64)])


def _along(values: Tensor, axis: int, rank: int) -> Tensor:
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def _repeated(units: Tensor, times: Tensor) -> Tensor:
    """Returns positions in which every run of a unit's positions follows itself `times` times.

    Runs and not positions, because a flattened unit or a head owns several in a row.
    """
    starts = torch.ones(len(units), dtype=torch.bool)
    starts[1:] = units[1:] != units[:-1]
    runs = torch.tensor_split(torch.arange(len(units)), starts.nonzero().squeeze(1)[1:])
    return torch.cat([run.repeat(int(times[run[0]])) for run in runs])

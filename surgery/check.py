"""The self-check: the pruned network must compute what the masked dense network does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from paretoprune.surgery.execute import Execution
from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.program import as_call, shared_copy
from paretoprune.surgery.prune import masked_tensors, prune

TOLERANCE = 1e-3
"""Largest accepted difference, relative to the largest output; a miswired network is far off."""


def half_plan(graph: PruningGraph, names: Sequence[str]) -> PruningPlan:
    """Returns a plan that keeps every second unit of the named groups."""
    kept = {
        name: tuple(range(0, graph.groups[name].size, 2))
        for name in names
        if graph.groups[name].size > 1
    }
    return PruningPlan(kept)


def broken(
    model: nn.Module, graph: PruningGraph, example_inputs: Any
) -> tuple[dict[str, str], set[str]]:
    """Returns the groups (with reasons) and the blocks whose removal is not exact.

    Args:
        model: The dense network.
        graph: Its graph.
        example_inputs: Inputs of the comparison.
    """
    dense = shared_copy(model).eval()
    reasons: dict[str, str] = {}

    def group_fails(names: Sequence[str]) -> bool:
        plan = half_plan(graph, names)
        masked = masked_tensors(dense, graph, plan)
        args, kwargs = as_call(example_inputs)
        problem = _differs(
            lambda: functional_call(dense, masked, args, kwargs),
            lambda: prune(dense, graph, plan)(*args, **kwargs),
        )
        for name in names:
            reasons[name] = f"the self-check failed: {problem}"
        return problem is not None

    def block_fails(names: Sequence[str]) -> bool:
        plan = PruningPlan(removed=tuple(names))
        branches = [branch for name in names for branch in graph.extents[name].branches]
        args, kwargs = as_call(example_inputs)
        reference = Execution(graph).run(dense, example_inputs, zeroed=branches)
        problem = _differs(
            lambda: list(reference.values()),
            lambda: prune(dense, graph, plan)(*args, **kwargs),
        )
        return problem is not None

    open_names = [group.name for group in graph.open_groups]
    guilty = _bisect(open_names, group_fails)
    blocks = set(_bisect(list(graph.blocks), block_fails))
    return {name: reasons[name] for name in guilty}, blocks


def _bisect(names: list[str], fails: Callable[[Sequence[str]], bool]) -> list[str]:
    """Returns the names that make `fails` true, alone or together with others of the list."""
    if not names or not fails(names):
        return []
    if len(names) == 1:
        return names
    middle = len(names) // 2
    guilty = _bisect(names[:middle], fails) + _bisect(names[middle:], fails)
    rest = [name for name in names if name not in guilty]
    if rest and (not guilty or fails(rest)):  # only the combination fails: keep none of it
        return names if not guilty else guilty + _bisect_rest(rest, fails)
    return guilty


def _bisect_rest(names: list[str], fails: Callable[[Sequence[str]], bool]) -> list[str]:
    return [name for name in names if fails([name])] or names


def _differs(reference: Callable[[], Any], pruned: Callable[[], Any]) -> str | None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = _tensors(reference())
        try:
            actual = _tensors(pruned())
        except Exception as error:  # the code of the model depends on a size that changed
            first = (str(error).splitlines() or [""])[0]
            return f"the pruned network raises {type(error).__name__}: {first[:120]}"
    for a, b in zip(expected, actual, strict=True):
        if a.shape != b.shape:
            return f"an output has shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        scale = a.abs().max().clamp_min(1e-12)
        error_ = ((a - b).abs().max() / scale).item()
        if not error_ <= TOLERANCE:
            return f"outputs differ by {error_:.1e} of their size"
    return None


def _tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

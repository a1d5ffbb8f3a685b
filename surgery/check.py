"""The self-check: the pruned network must compute what the masked dense network does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from paretoprune.surgery.copying import kept_activations
from paretoprune.surgery.execute import Execution
from paretoprune.surgery.export import unfused
from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.program import Instead, as_call, own_copy
from paretoprune.surgery.prune import masked_tensors, prune
from paretoprune.surgery.trial_plans import half_plan, other_half

_ONE_BY_ONE = 6
TOLERANCE = 1e-3
"""Differences above it, relative to the largest output, are no rounding in single precision."""
_HALF = {torch.float16, torch.bfloat16}
ROUNDING = 1e-5
"""Differences below it are; those in between are looked at again in double precision."""


def masked_outputs(
    model: nn.Module, graph: PruningGraph, plan: PruningPlan, inputs: Any
) -> list[Tensor]:
    """Returns what the dense network computes once the units that go are zero: the oracle.

    Averages over channels (layer norms and the like) leave the zeroed ones out.

    Args:
        model: The dense network.
        graph: Its graph.
        plan: Its removed blocks are ignored.
        inputs: A tensor, tuple of arguments or dict of keyword arguments.
    """
    masked = masked_tensors(model, graph, plan)
    mask = graph.kept_mask(plan)
    instead = {
        name: _over_kept(dim, mask[units])
        for name, (dim, units) in graph.statistics.items()
        if not bool(mask[units].all())
    }
    if instead:
        values = Execution(graph).run(masked, inputs, instead=instead)
        return [values[name] for name in graph.program.outputs]
    args, kwargs = as_call(own_copy(inputs))
    # Tying is left to `_in_place`: torch's own puts a tensor twice into a module of two names, and
    # takes it out once.
    placed = _in_place(model, masked)
    with unfused():
        return _tensors(functional_call(model, placed, args, kwargs, tie_weights=False))


def _in_place(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors given by first names by every place in a module, each place once."""
    named = (*model.named_parameters(), *model.named_buffers())
    first = {id(tensor): name for name, tensor in named}
    return {
        f"{path}.{key}" if path else key: tensors[first[id(tensor)]]
        for path, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _over_kept(dim: int, kept: Tensor) -> Instead:
    """Returns what applies an operator that averages over `dim` to the kept positions alone."""
    positions = kept.nonzero().squeeze(1)

    def computed(operator: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        whole: Tensor = args[0]
        index = positions.to(whole.device)
        args = [whole.index_select(dim, index), *args[1:]]
        if "norm" not in str(operator):
            return operator(*args, **kwargs)
        if "group_norm" not in str(operator):
            args[1] = list(args[0].shape[-len(args[1]) :])
            axis = dim - (whole.ndim - len(args[1]))
        else:
            axis = 0
        args[2:4] = [
            value.index_select(axis, index) if isinstance(value, Tensor) else value
            for value in args[2:4]
        ]
        return torch.zeros_like(whole).index_copy(dim, index, operator(*args, **kwargs))

    return computed


@dataclass(frozen=True)
class Attempt:
    """A run of a pruned network.

    Attributes:
        outputs: Its floating-point outputs; None if it raised.
        error: What it raised, in one line.
        module: The innermost module with code of the user's that raised; empty for the network.
    """

    outputs: list[Tensor] | None
    error: str = ""
    module: str = ""


def attempt(
    dense: nn.Module, graph: PruningGraph, plan: PruningPlan, example_inputs: Any
) -> Attempt:
    """Returns what the pruned network does, of whatever kind its errors are.

    Args:
        dense: The dense network.
        graph: Its graph.
        plan: What to keep.
        example_inputs: Inputs of the run.
    """
    try:
        small = prune(dense, graph, plan)
    except Exception as error:  # a module refuses to be copied, or the size it is given
        return Attempt(None, f"pruning raises {_in_one_line(error)}")
    names = {module: name for name, module in small.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        outer = running[-1] if running else ""  # of a layer that code makes as it runs
        running.append(names.get(module, outer))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        running.pop()

    args, kwargs = as_call(own_copy(example_inputs))
    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        with _comparable(), unfused():
            return Attempt(_tensors(small(*args, **kwargs)))
    except Exception as error:  # the code of the model depends on a size that changed
        said = f"the pruned network raises {_in_one_line(error)}"
        path = running[-1] if running else ""
        while path and _is_of_torch(dense.get_submodule(path)):
            path = path.rpartition(".")[0]
        if not path and not _is_of_torch(dense):
            said += "; wrapped, as in nn.Sequential(network), its code could be recorded"
        return Attempt(None, said, path)
    finally:
        for hook in hooks:
            hook.remove()


def _is_of_torch(module: nn.Module) -> bool:
    """Returns whether a module's code is torch's own, which follows the sizes of its weights."""
    return type(module).__module__.startswith("torch.")


@contextmanager
def _comparable() -> Iterator[None]:
    """Without gradients and warnings, and with the same random numbers for every run.

    Some networks draw in eval mode, too: the latent values of an autoencoder.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield


def _in_one_line(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:120]}"


def broken(
    dense: nn.Module,
    graph: PruningGraph,
    example_inputs: Any,
    runs: Mapping[PruningPlan, Attempt],
    *,
    exhaustive: bool = False,
) -> tuple[dict[str, str], set[str]]:
    """Returns the groups (with reasons) and the blocks whose removal is not exact.

    Args:
        dense: The dense network, as `telling_copy` returns it.
        graph: Its graph.
        example_inputs: Inputs of the comparison.
        runs: The attempts at the `trial_plans`.
        exhaustive: Also lose every unit of every group once, without the others, and every block
            alone.
    """
    reasons: dict[str, str] = {}

    def plan_fails(plan: PruningPlan) -> bool:
        run = runs.get(plan) or attempt(dense, graph, plan, example_inputs)
        error = _error(run, lambda: masked_outputs(dense, graph, plan, example_inputs))
        fails = isinstance(error, str) or not error <= ROUNDING
        if isinstance(error, float) and ROUNDING < error <= _tolerance(dense, run):
            fails = not _is_rounding(dense, graph, plan, example_inputs, error)
        said = error if isinstance(error, str) else f"outputs differ by {error:.1e} of their size"
        if fails:
            reasons.update(dict.fromkeys(plan.kept, f"the self-check failed: {said}"))
        return fails

    def block_fails(names: Sequence[str]) -> bool:
        plan = PruningPlan(removed=tuple(names))
        branches = [branch for name in names for branch in graph.extents[name].branches]
        run = attempt(dense, graph, plan, example_inputs)
        execution = Execution(graph)

        def without() -> list[Any]:
            values = execution.run(dense, example_inputs, zeroed=branches)
            return [values[name] for name in graph.program.outputs]

        error = _error(run, without)
        return isinstance(error, str) or not error <= _tolerance(dense, run)

    names = [group.name for group in graph.open_groups]
    guilty: list[str] = []
    for plan in runs:
        kept = plan.kept

        def part_fails(some: Sequence[str], kept: Mapping[str, tuple[int, ...]] = kept) -> bool:
            return plan_fails(PruningPlan({name: kept[name] for name in some}))

        left = [name for name in names if name in kept and name not in guilty]
        guilty += _guilty(left, part_fails)
    blocks = set(_guilty(list(graph.blocks), block_fails))
    if exhaustive:
        for name in names:
            if name not in guilty and (
                plan_fails(half_plan(graph, [name])) or plan_fails(other_half(graph, name))
            ):
                guilty.append(name)
        blocks |= {name for name in graph.blocks if name not in blocks and block_fails([name])}
    return {name: reasons[name] for name in guilty}, blocks


def telling_copy(model: nn.Module) -> nn.Module:
    """Returns a copy in eval mode, sharing tensors, whose every unit has a say in the outputs.

    Fresh networks have layers of zeros and scales that are all equal, behind which any wrong
    wiring would compute the right thing: such parameters and statistics become random.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {
        **kept_activations(model),
        **{id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())},
    }
    statistics = [
        tensor
        for module in model.modules()
        if isinstance(module, _NormBase)
        for tensor in (module.running_mean, module.running_var)
        if tensor is not None
    ]
    for tensor in (*model.parameters(), *statistics):
        flat = tensor.detach()
        if (
            not tensor.is_floating_point()
            or tensor.numel() < 2
            or bool((flat != flat.reshape(-1)[0]).any())
        ):
            continue
        random = torch.rand(tensor.shape, generator=generator) + 0.5
        if tensor.squeeze().ndim > 1:
            random = (random - 1) / tensor[0].numel() ** 0.5
        random = random.to(tensor.device, tensor.dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(random, tensor.requires_grad) if is_parameter else random
    return copy.deepcopy(model, memo).eval()


def _guilty(names: list[str], fails: Callable[[Sequence[str]], bool]) -> list[str]:
    """Returns the names that make `fails` true, alone or together with others of the list.

    Halves the list down to a few names, which are then tried one by one: where one layer of a kind
    fails, its neighbours usually do, and trying each is cheaper than halving on.
    """
    if not names or not fails(names):
        return []
    if len(names) <= _ONE_BY_ONE:
        guilty = [name for name in names if fails([name])] if len(names) > 1 else names
    else:
        middle = len(names) // 2
        guilty = _guilty(names[:middle], fails) + _guilty(names[middle:], fails)
    rest = [name for name in names if name not in guilty]
    while rest and (not guilty or fails(rest)):  # only a combination fails: keep none of it
        guilty = [*guilty, *_combination(rest, fails)]
        rest = [name for name in names if name not in guilty]
    return guilty


def _combination(names: list[str], fails: Callable[[Sequence[str]], bool]) -> list[str]:
    """Returns some of the names, which fail together, that do so without the others.

    The shortest beginning of the list that fails ends with one of them, which is held while the
    next is looked for in front of it.
    """
    held: list[str] = []
    while names and (not held or not fails(held)):
        low, high = 0, len(names)  # so many from the list do not fail, and do
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fails([*names[:middle], *held]) else (middle, high)
        held.append(names[high - 1])
        names = names[: high - 1]
    return held


def _error(run: Attempt, reference: Callable[[], Iterable[Any]]) -> float | str:
    """Returns how far a run is off, relative to the largest output, or why nobody can say."""
    if run.outputs is None:
        return run.error
    with _comparable():
        expected = _tensors(list(reference()))
    worst = 0.0
    for a, b in zip(expected, run.outputs, strict=True):
        if a.shape != b.shape:
            return f"an output has shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        scale = a.abs().max().clamp_min(1e-12)
        error = ((a - b).abs().max() / scale).item()
        worst = error if not error <= worst else worst
    return worst


def _tolerance(dense: nn.Module, run: Attempt) -> float:
    """Returns the largest difference that may be rounding, in the least precise of all types."""
    tensors = [*dense.parameters(), *(run.outputs or ())]
    return max([TOLERANCE, *(16 * torch.finfo(t.dtype).eps for t in tensors if t.dtype in _HALF)])


def _is_rounding(
    dense: nn.Module, graph: PruningGraph, plan: PruningPlan, example_inputs: Any, found: float
) -> bool:
    """Whether a small error is gone in double precision.

    A channel that is wired wrongly may matter as little as rounding does. Code that casts to
    single precision casts to double here; what takes no doubles even so cannot be asked: its
    errors count as rounding up to `TOLERANCE`.
    """

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    precise = copy.deepcopy(dense).double()
    inputs = torch.utils._pytree.tree_map(double, example_inputs)
    with _in_double():
        run = attempt(precise, graph, plan, inputs)
        try:
            error = _error(run, lambda: masked_outputs(precise, graph, plan, inputs))
        except RuntimeError as raised:
            error = str(raised)
    return found <= TOLERANCE if isinstance(error, str) else error <= ROUNDING**2


@contextmanager
def _in_double() -> Iterator[None]:
    """Makes every tensor that would be made in single precision in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubling():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)


class _Doubling(TorchDispatchMode):
    """Has operators that are asked for single precision return double precision."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        wanted = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **wanted)


def _tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

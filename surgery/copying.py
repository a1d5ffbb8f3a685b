"""Copies of a module tree with other tensors or children in place of some.

`copy.deepcopy` with a memo does it, and spends most of its time on the empty tables of hooks that
every module has. Here only attributes that hold something mutable go through it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

_PLAIN = frozenset(
    (int, float, str, bool, NoneType, FunctionType, type, torch.dtype, torch.device, torch.Size)
)
_STATE = frozenset(("_parameters", "_buffers", "_modules"))
_TABLES = frozenset((dict, OrderedDict, list, set))


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Returns what `copy.deepcopy(model, memo)` does.

    Args:
        model: The module tree; left untouched.
        memo: By `id` of a module, parameter or buffer, what stands for it in the copy.
    """
    for identity, kept in kept_activations(model).items():
        memo.setdefault(identity, kept)
    modules = _outside(model, memo)
    if not all(_is_ordinary(type(module)) for module in modules):
        return copy.deepcopy(model, memo)
    for module in modules:
        memo[id(module)] = object.__new__(type(module))
    for module in modules:
        attributes = memo[id(module)].__dict__
        for name, value in module.__dict__.items():
            if name == "_compiled_call_impl":  # as nn.Module leaves it out of copies
                continue
            if _is_plain(value):
                attributes[name] = value
            elif _is_empty(value):
                attributes[name] = type(value)()
            elif type(value) is dict and name in _STATE:
                attributes[name] = {
                    key: item
                    if item is None
                    else memo[id(item)]
                    if id(item) in memo
                    else copy.deepcopy(item, memo)
                    for key, item in value.items()
                }
            else:
                attributes[name] = copy.deepcopy(value, memo)
    return memo[id(model)]  # type: ignore[no-any-return]


def kept_activations(model: nn.Module) -> dict[int, Tensor]:
    """Returns, by `id`, what stands in a copy for the activations that modules keep in attributes.

    Auxiliary losses, attention maps and what hooks store: torch copies no tensor with a history,
    and none that an export left there.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        values = [value for name, value in vars(module).items() if name not in _STATE]
        for leaf in tree_leaves([v for v in values if not (_is_plain(v) or _is_empty(v))]):
            if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
                if isinstance(leaf, FakeTensor):
                    found[id(leaf)] = leaf
                elif leaf.grad_fn is not None:
                    found[id(leaf)] = leaf.detach()
    return found


def _outside(model: nn.Module, memo: dict[int, Any]) -> dict[nn.Module, None]:
    """Returns the modules of a tree that nothing stands for, each once."""
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module not in found and id(module) not in memo:
            found[module] = None
            waiting += [child for child in module._modules.values() if child is not None]
    return found


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, value)))


def _is_empty(value: Any) -> bool:
    return type(value) in _TABLES and not value


def _is_ordinary(kind: type[nn.Module]) -> bool:
    """Whether a class leaves it to Python how its instances are copied."""
    return (
        not hasattr(kind, "__deepcopy__")
        and kind.__reduce_ex__ is nn.Module.__reduce_ex__
        and kind.__getstate__ is nn.Module.__getstate__
    )

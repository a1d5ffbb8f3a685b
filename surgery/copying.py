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
from torch import nn

_PLAIN = frozenset(
    (int, float, str, bool, NoneType, FunctionType, type, torch.dtype, torch.device, torch.Size)
)
_TABLES = frozenset((dict, OrderedDict, list, set))


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Returns what `copy.deepcopy(model, memo)` does.

    Args:
        model: The module tree; left untouched.
        memo: By `id` of a module, parameter or buffer, what stands for it in the copy.
    """
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
            kind = type(value)
            if kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, value))):
                attributes[name] = value
            elif kind in _TABLES and not value:
                attributes[name] = kind()
            elif kind is dict and name in ("_parameters", "_buffers", "_modules"):
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


def _is_ordinary(kind: type[nn.Module]) -> bool:
    """Whether a class leaves it to Python how its instances are copied."""
    return (
        not hasattr(kind, "__deepcopy__")
        and kind.__reduce_ex__ is nn.Module.__reduce_ex__
        and kind.__getstate__ is nn.Module.__getstate__
    )

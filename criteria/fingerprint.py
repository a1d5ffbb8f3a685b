"""fingerprint: a short text that tells networks, data and settings apart by their content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn


def of_model(model: nn.Module) -> str:
    """Returns the fingerprint of all parameters and buffers, by name and content."""
    return _digest(
        (name, tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())
    )


def of_batches(batches: Iterable[tuple[Any, Any]]) -> str:
    """Returns the fingerprint of the examples and targets of all batches."""
    return _digest(
        (f"{number}.{place}", leaf)
        for number, batch in enumerate(batches)
        for place, leaf in enumerate(torch.utils._pytree.tree_leaves(batch))
    )


def of_data(batches: Iterable[tuple[Any, Any]]) -> str:
    """Returns what tells training data apart, without reading an epoch, which may be drawn.

    That is the first batch of a sequence, and of others how they show themselves.
    """
    if isinstance(batches, Sequence) and batches:
        return of_batches([batches[0]])
    return of_setting(batches)


def of_setting(setting: object) -> str:
    """Returns a text of a setting that a training has, the same in every process.

    Functions are told by their name, their code and what is bound to them; other things by how
    they show themselves, without their address in memory.
    """
    match setting:
        case partial():
            parts: list[object] = [setting.func, *setting.args, *setting.keywords.items()]
        case FunctionType():
            code = setting.__code__
            constants = [one for one in code.co_consts if not isinstance(one, CodeType)]
            bound = [cell.cell_contents for cell in setting.__closure__ or ()]
            parts = [code.co_code.hex(), code.co_names, *constants, setting.__defaults__, *bound]
            parts = [setting.__module__, setting.__qualname__, *parts]
        case MethodType():
            parts = [setting.__func__, setting.__self__]
        case tuple():
            parts = [*setting]
        case nn.Module():
            # `repr` leaves out what a loss was given, such as its label smoothing
            parts = [repr(setting), of_model(setting), *map(_numbers, setting.modules())]
        case Tensor():
            return _digest([("", setting)])
        case _:
            return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(setting))
    return _digest((str(at), of_setting(part)) for at, part in enumerate(parts))


def _numbers(module: nn.Module) -> tuple[object, ...]:
    """Returns the numbers and words that a module holds, beside whether it is in training."""
    plain = {name: value for name, value in vars(module).items() if name != "training"}
    return tuple(
        (name, value)
        for name, value in sorted(plain.items())
        if isinstance(value, (bool, int, float, str))
    )


def _digest(items: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in items:
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()

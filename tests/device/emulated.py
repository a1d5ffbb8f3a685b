"""A second device made of CPU memory, which mixes with the CPU no more than a GPU does.

Importing this registers the device `emulated` for the whole process. What a GPU refuses is refused
here: operands on two devices, indices on another device than the indexed tensor is, and generators
of the CPU. So code that forgets to move a tensor fails without a GPU, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "emulated"


class _Module:
    """What torch asks of `torch.emulated`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        """Nothing: random numbers are the CPU's."""

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        """Nothing: random numbers are the CPU's."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)
torch.__future__.set_overwrite_module_params_on_conversion(True)  # `Module.to` changes the class
_CPU = torch.device("cpu")
_ATEN = torch.ops.aten
_COPIES = {_ATEN._to_copy.default, _ATEN.copy_.default, _ATEN._local_scalar_dense.default}
_INDEXED = {
    _ATEN.index.Tensor,
    _ATEN._unsafe_index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default,
}
_MADE = (
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
    "linspace",
    "rand",
    "randn",
    "randint.low",
    "randperm",
    "randperm.generator",
    "scalar_tensor",
)


class Emulated(Tensor):
    """A tensor on the device; its values are in `raw`, on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Emulated:
        tensor: Emulated = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        tensor.raw = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _run(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns what an operator returns, computed on the CPU and put where CUDA would put it."""
    flat, form = tree_flatten((tuple(args), dict(kwargs)))
    here = any(isinstance(leaf, Emulated) for leaf in flat)
    if operator is _ATEN.copy_.default or operator in _INDEXED:
        result_here = isinstance(args[0], Emulated)
    elif kwargs.get("device") is not None:
        result_here = torch.device(kwargs["device"]).type == NAME
    else:
        result_here = here
    known: dict[int, Tensor] = {}
    plain: list[Any] = []
    for leaf in flat:
        if isinstance(leaf, torch.Generator) and result_here:
            raise RuntimeError(f"{operator}: a generator of the CPU for a tensor on {NAME}")
        if isinstance(leaf, Tensor):
            _check_place(operator, leaf, here, result_here)
            values = leaf.raw if isinstance(leaf, Emulated) else leaf
            known[id(values)] = leaf  # what is changed in place is returned as itself
            plain.append(values)
        else:
            plain.append(_CPU if leaf == DEVICE or leaf == torch.device(NAME) else leaf)

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (
            known[id(value)] if id(value) in known else Emulated(value) if result_here else value
        )

    arguments, named = tree_unflatten(plain, form)
    return tree_map(placed, operator(*arguments, **named))


def _check_place(operator: Any, tensor: Tensor, here: bool, result_here: bool) -> None:
    """Raises where CUDA would: single numbers and copies alone may come from the CPU."""
    there = not isinstance(tensor, Emulated)
    if operator in _COPIES or not there or not here or tensor.dim() == 0:
        return
    if operator in _INDEXED and result_here and not tensor.is_floating_point():
        return  # indices may lie on the CPU
    raise RuntimeError(f"{operator}: a tensor {tuple(tensor.shape)} on the CPU among {NAME} ones")


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    values = target.raw if isinstance(target, Emulated) else target
    values.copy_(source.raw if isinstance(source, Emulated) else source)
    return target


def _making(operator: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _run(operator, args, kwargs)


_KERNELS = library.Library("aten", "IMPL")
for _name in _MADE:
    _packet, _, _overload = _name.partition(".")
    _operator = getattr(getattr(_ATEN, _packet), _overload or "default")
    _KERNELS.impl(_name, _making(_operator), "PrivateUse1")
_KERNELS.impl("_copy_from", _copy_from, "PrivateUse1")  # torch.tensor(..., device=...)

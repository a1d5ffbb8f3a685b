"""Attributes of layers that repeat the shape of their weights, and must follow it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.padding import _ConstantPadNd

from paretoprune.surgery.attention import PrunedMultiheadAttention

SHAPE_ATTRIBUTES: Mapping[type[nn.Module], tuple[str, ...]] = MappingProxyType(
    {
        _ConvNd: ("in_channels", "out_channels", "groups"),
        nn.Linear: ("in_features", "out_features"),
        _NormBase: ("num_features",),
        nn.GroupNorm: ("num_groups", "num_channels"),
        nn.LayerNorm: ("normalized_shape",),
        nn.RMSNorm: ("normalized_shape",),
        nn.Embedding: ("num_embeddings", "embedding_dim"),
        nn.PReLU: ("num_parameters",),
        _ConstantPadNd: ("padding",),
        nn.MultiheadAttention: ("embed_dim", "kdim", "vdim", "num_heads"),
        nn.RNNBase: ("input_size", "hidden_size", "proj_size"),
        nn.RNNCellBase: ("input_size", "hidden_size"),
        nn.Unflatten: ("unflattened_size",),
    }
)
"""Layer types and the attributes that surgery rewrites; an export stores exactly these."""


_IN_SPACE = re.compile(
    r"(image|img|input|patch|window|kernel|grid|pool).*size|stride|dilation|padding|length|"
    r"resolution|depth|layers"
)


def size_attributes(module: nn.Module) -> dict[str, int | tuple[int, ...]]:
    """Returns the attributes of a module that surgery may rewrite: sizes and tuples of sizes.

    Of torch's own layers those that are known to hold sizes; of other modules all integers.
    """
    for kind, names in SHAPE_ATTRIBUTES.items():
        if isinstance(module, kind):
            return {name: _plain(getattr(module, name)) for name in names}
    if type(module).__module__.startswith("torch."):
        return {}
    return {
        name: _plain(value)
        for name, value in vars(module).items()
        if type(value) is int
        or (
            isinstance(value, (tuple, list)) and value and all(type(item) is int for item in value)
        )
    }


def has_known_sizes(module: nn.Module) -> bool:
    """Whether it is known which attributes of a module hold sizes: those of torch's layers.

    Of other modules any integer may be one, and code may set some only when it runs.
    """
    known = isinstance(module, tuple(SHAPE_ATTRIBUTES))
    return known or type(module).__module__.startswith("torch.")


def _plain(value: Any) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else tuple(value)


def set_attribute(module: nn.Module, name: str, value: int | Sequence[int]) -> None:
    """Sets a size, or several as the tuple or list that the module has there."""
    old = getattr(module, name)
    if isinstance(value, int):
        setattr(module, name, value)
    else:
        setattr(module, name, list(value) if isinstance(old, list) else tuple(value))


def has_numbers(module: nn.Module) -> bool:
    """Whether sizes in a module's code may be in its attributes alone.

    Torch's own layers have weights to follow, except norms that are built without any, and what
    only views.
    """
    if isinstance(module, nn.Unflatten) or not type(module).__module__.startswith("torch."):
        return True
    norms = (_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    tensors = (*module._parameters.values(), *module._buffers.values())
    return isinstance(module, norms) and all(tensor is None for tensor in tensors)


def follow_numbers(
    module: nn.Module,
    numbers: Mapping[int, Collection[int]],
    sequences: Mapping[tuple[int, ...], tuple[int, ...]],
    own: Callable[[str], int | None],
) -> None:
    """Rewrites the attributes of a module that hold sizes its code writes.

    An attribute is known by its value. Where one value stands for several sizes of which only
    some change (8 heads of 8 channels), the attribute's name decides: heads and groups change.
    Sizes of images, windows and the like may be as large by chance and stay.

    Args:
        module: One that `has_numbers`.
        numbers: For every size in its code, what it becomes; several if it counts several things.
        sequences: For every list of sizes in its code, what it becomes.
        own: Returns what an attribute becomes if it repeats a size of the module's own weights,
            asked where one value stands for several sizes.
    """
    for name, value in size_attributes(module).items():
        if _IN_SPACE.search(name):
            continue
        if isinstance(value, tuple):
            if value in sequences:
                set_attribute(module, name, sequences[value])
            elif len(value) == 1 and len(new_sizes := set(numbers.get(value[0], ()))) == 1:
                set_attribute(module, name, tuple(new_sizes))
            continue
        changed = {new for new in numbers.get(value, ()) if new != value}
        unchanged = value in numbers.get(value, ())
        if len(changed) == 1 and (not unchanged or re.search(r"head(?!.*dim)|group", name)):
            set_attribute(module, name, changed.pop())
        elif changed and (size := own(name)) is not None:
            set_attribute(module, name, size)


def follow_weights(module: nn.Module) -> None:
    """Sets the attributes of a layer from the shapes that its weights have after surgery."""
    if isinstance(module, _ConvNd):
        whole = module.in_channels if module.transposed else module.out_channels
        if module.groups > 1:  # whole groups went
            module.groups = module.groups * module.weight.shape[0] // whole
        reads, makes = (0, 1) if module.transposed else (1, 0)
        sizes: dict[str, int] = {
            "out_channels": module.weight.shape[makes] * (module.groups if makes else 1),
            "in_channels": module.weight.shape[reads] * (module.groups if reads else 1),
        }
        _set(module, sizes)
    elif isinstance(module, nn.Linear):
        _set(module, {"out_features": len(module.weight), "in_features": module.weight.shape[1]})
    elif isinstance(module, _NormBase):
        tensor = module.weight if module.weight is not None else module.running_mean
        if tensor is not None:
            module.num_features = len(tensor)
    elif isinstance(module, nn.MultiheadAttention):
        _follow_attention(module)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        groups = module.num_groups * len(module.weight) // module.num_channels
        module.num_groups = max(1, groups)  # a single group goes on with fewer channels
        module.num_channels = len(module.weight)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding):
        _set(
            module,
            {"num_embeddings": len(module.weight), "embedding_dim": module.weight.shape[1]},
        )
    elif isinstance(module, nn.RNNBase):
        _follow_recurrent(module)
    elif isinstance(module, nn.RNNCellBase):
        _set(
            module,
            {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]},
        )


def _follow_recurrent(module: nn.RNNBase) -> None:
    reads: Any = module.weight_ih_l0
    writes: Any = module.weight_hr_l0 if module.proj_size else module.weight_hh_l0
    _set(module, {"input_size": reads.shape[1], "hidden_size": writes.shape[1]})
    if module.proj_size:
        module.proj_size = len(writes)
    remember_weights(module)


def remember_weights(module: nn.RNNBase) -> None:
    """Makes a recurrent layer, in place, run the parameters that it has now."""
    module._init_flat_weights()


def _follow_attention(module: nn.MultiheadAttention) -> None:
    packed = module.in_proj_weight is not None
    rows, inputs = (module.in_proj_weight if packed else module.q_proj_weight).shape
    if module.num_heads > 1:  # whole heads went; of a single one, channels
        module.num_heads = (rows // 3 if packed else rows) // module.head_dim
    module.embed_dim = inputs
    module.kdim = inputs if packed else module.k_proj_weight.shape[1]
    module.vdim = inputs if packed else module.v_proj_weight.shape[1]
    PrunedMultiheadAttention.convert_unless_whole(module)


def _set(module: nn.Module, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value)

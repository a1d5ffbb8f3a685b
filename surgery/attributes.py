"""Attributes of layers that repeat the shape of their weights, and must follow it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.padding import _ConstantPadNd

SHAPE_ATTRIBUTES: Mapping[type[nn.Module], tuple[str, ...]] = MappingProxyType(
    {
        _ConvNd: ("in_channels", "out_channels", "groups"),
        nn.Linear: ("in_features", "out_features"),
        _NormBase: ("num_features",),
        nn.GroupNorm: ("num_groups", "num_channels"),
        nn.LayerNorm: ("normalized_shape",),
        nn.Embedding: ("num_embeddings", "embedding_dim"),
        nn.PReLU: ("num_parameters",),
        _ConstantPadNd: ("padding",),
    }
)
"""Layer types and the attributes that surgery rewrites; an export stores exactly these."""


def attribute_names(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the attributes of `module` that surgery may rewrite."""
    for kind, names in SHAPE_ATTRIBUTES.items():
        if isinstance(module, kind):
            return names
    return ()


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
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_groups = module.num_groups * len(module.weight) // module.num_channels
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding):
        _set(
            module,
            {"num_embeddings": len(module.weight), "embedding_dim": module.weight.shape[1]},
        )


def _set(module: nn.Module, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value)

"""What is known about one network of the zoo: how to build it, and what `trace` must find."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

OUTPUT = "reaches the model's output"
UNREAD = "reaches no output in eval mode"


@dataclass(frozen=True)
class Specimen:
    """One network of the zoo.

    Attributes:
        build: Returns the network with fresh weights.
        shape: Shape of the input of two examples, or an example input.
        opened: Sizes of the groups that may be pruned.
        frozen: For every other group, a part of its reason.
        blocks: The removable blocks.
        statistics: By group, the modules that average over its units.
        recorded: The modules that become recordings.
    """

    build: Callable[[], nn.Module]
    shape: Any
    opened: Mapping[str, int]
    frozen: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    statistics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    recorded: tuple[str, ...] = ()

    def network(self) -> nn.Module:
        """Returns the network in eval mode, with weights and statistics as if trained."""
        torch.manual_seed(0)
        model = self.build()
        settle(model)
        return model.eval()

    def inputs(self, batch: int = 2) -> Any:
        """Returns random inputs of `batch` examples."""
        torch.manual_seed(1)
        return draw(self.shape, batch)


def settle(model: nn.Module) -> None:
    """Gives norms, and all that starts as zeros or ones, values as if trained, in place.

    Behind zeros and equal scales, any wrong wiring would compute the right thing.
    """
    for module in model.modules():
        if isinstance(module, _NormBase):
            _settle(module.weight)
            _settle(module.bias)
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
    for parameter in model.parameters():
        _settle(parameter)


def _settle(parameter: Tensor | None) -> None:
    if parameter is None or parameter.numel() == 1:
        return
    first = parameter.detach().reshape(-1)[0]
    if bool((parameter == first).all()):
        if first == 0:
            nn.init.normal_(parameter, 0, 0.5)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)


def draw(shape: Any, batch: int) -> Any:
    """Returns random inputs in the form of `shape`; a str shape means tokens."""
    if isinstance(shape, dict):
        return {name: draw(item, batch) for name, item in shape.items()}
    if isinstance(shape, list):
        return tuple(draw(item, batch) for item in shape)
    if isinstance(shape, str):
        return torch.randint(9, (batch, int(shape)))
    return torch.randn(batch, *shape)

"""Versioned: a network that keeps more than tensors in its state dict, as torch lets it."""

from __future__ import annotations

from torch import nn


class Versioned(nn.Sequential):
    """Layers in a row, and the version of what they are."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.version = state["version"]

"""Checkpoint: where a training stands after an epoch, in one file that unpickles nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from paretoprune.criteria.drafts import drafted
from paretoprune.surgery.progress import Lines

_OPTIMIZER = "optimizer/"
_STEP = "step"  # optimizers count on the CPU, or every step would wait for the GPU


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file that holds networks and an optimizer's state; written whole or not at all.

    Attributes:
        file: Where; its folder exists.
        key: Tells trainings apart: a file with another key is not read.
    """

    file: Path
    key: str

    def write(
        self, epochs: int, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
    ) -> None:
        """Writes what a training is after `epochs` epochs.

        Args:
            epochs: How many are done.
            networks: By name; the first is the one that the optimizer trains.
            optimizer: Its state is kept by the names of the parameters.
        """
        tensors = {
            f"{name}/{key}": value
            for name, network in networks.items()
            for key, value in network.state_dict().items()
            if isinstance(value, Tensor)  # a module's extra state may be anything
        }
        for name, parameter in next(iter(networks.values())).named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{_OPTIMIZER}{key}/{name}"] = value
        whole = {name: value.contiguous().clone() for name, value in tensors.items()}
        with drafted(self.file) as draft:
            save_file(whole, draft, metadata={"key": self.key, "epochs": str(epochs)})

    def read(
        self,
        networks: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        progress: Lines,
    ) -> int:
        """Takes over what `write` wrote; returns how many epochs are done, 0 without a file.

        Args:
            networks: As they were given to `write`.
            optimizer: Likewise.
            progress: Receives a line where the file is that of another training, or damaged.
        """
        try:
            with safe_open(self.file, "pt") as stored:
                noted = stored.metadata() or {}
                if noted.get("key") != self.key:
                    progress(
                        f"{self.file} is of a training with another network, other data or other "
                        f"settings; it is not taken, and this one begins anew"
                    )
                    return 0
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return 0
        except (OSError, SafetensorError) as error:  # half written when power was lost
            progress(f"{self.file} cannot be read ({error}); this training begins anew")
            return 0
        for name, network in networks.items():
            own = network.state_dict()
            network.load_state_dict({k: tensors.get(f"{name}/{k}", v) for k, v in own.items()})
        parameters = dict(next(iter(networks.values())).named_parameters())
        for name, value in tensors.items():
            if name.startswith(_OPTIMIZER):
                key, parameter = name.removeprefix(_OPTIMIZER).split("/", 1)
                owner = parameters[parameter]
                if key != _STEP:  # which stays on the CPU; others are laid out as what they are of
                    value = torch.empty_like(owner, dtype=value.dtype).copy_(value)
                optimizer.state[owner][key] = value
        return int(noted["epochs"])

"""Weights: what a run keeps of networks that were trained; their plans do not give it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paretoprune.criteria.drafts import drafted
from paretoprune.search.ledger import key_of
from paretoprune.search.record import LAYER, NEURONS, Record
from paretoprune.surgery import PruningGraph, PruningPlan, prune

FOLDER = "weights"
"""Folder of weights in a run's folder."""
RECOVERED = "recovered"
"""Weights of a candidate of the strategy `everything`."""
FINETUNED = "finetuned"
"""Weights after the fine-tuning of the best of a front."""
EXTRA_STATE = "_extra_state"
"""How torch ends the name of what `get_extra_state` of a module returns, often no tensor."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A folder with the weights of plans, as safetensors.

    Attributes:
        folder: Made when the first weights are written.
    """

    folder: Path

    @staticmethod
    def of_run(run_dir: Path) -> Weights:
        """Returns the weights of a run."""
        return Weights(run_dir.resolve() / FOLDER)

    def file(self, plan: PruningPlan, kind: str) -> Path:
        """Returns where the weights of a plan are; `kind` tells several of one plan apart."""
        return self.folder / f"{key_of(plan)}-{kind}.safetensors"

    def whole(self, plan: PruningPlan, kind: str) -> bool:
        """Returns whether the weights of a plan are there; lost power may leave half a file."""
        try:
            with safe_open(self.file(plan, kind), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def write(self, network: nn.Module, plan: PruningPlan, kind: str) -> None:
        """Writes the weights of the network of a plan whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_weights(network, self.file(plan, kind))

    def network(
        self, model: nn.Module, graph: PruningGraph, plan: PruningPlan, kind: str
    ) -> nn.Module:
        """Returns the network of a plan with its weights.

        Args:
            model: The dense network; left untouched.
            graph: Its graph.
            plan: The plan.
            kind: As they were written.

        Raises:
            ValueError: If they are not there, damaged, or those of another network.
        """
        file = self.file(plan, kind)
        if not file.exists():
            raise ValueError(
                f"trained weights are missing: {file} is not there; on a cluster all nodes need "
                f"the run's folder under the same path."
            )
        try:
            state = load_file(file)
        except SafetensorError as error:
            again = "; a resumed search trains them again" if kind == FINETUNED else ""
            raise ValueError(
                f"trained weights are damaged: {file} cannot be read ({error}){again}."
            ) from error
        network = prune(model, graph, plan)
        odd = network.load_state_dict(state, strict=False)
        lacking = [name for name in odd.missing_keys if not name.endswith(EXTRA_STATE)]
        if names := [*lacking, *odd.unexpected_keys]:
            raise ValueError(
                f"{file} does not fit {type(network).__name__}: tensor {names[0]!r} is in one of "
                f"them only."
            )
        return network.eval()


def write_weights(network: nn.Module, file: Path) -> None:
    """Writes the weights of a network into a file, whole or not at all.

    What a module keeps beside its tensors is built with the network and not written.
    """
    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in network.state_dict().items()
        if isinstance(value, Tensor)
    }
    with drafted(file) as draft:
        save_file(state, draft)


def trained_weights(record: Record) -> str | None:
    """Returns which weights a record's network is handed out with; None if its plan gives them."""
    if record.finetuning_taken:
        return FINETUNED
    return RECOVERED if record.origin in (LAYER, NEURONS) else None

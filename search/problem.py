"""Problem and Objective: what a search optimises, on which network and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Any, Any]
"""(inputs, targets); inputs as `surgery.trace` takes them: a tensor, a tuple or a dict.

Targets are a tensor, or tensors in a tuple, list or dict, as of several heads. All of both have
the examples first.
"""


class Epochs(Protocol):
    """A re-iterable of a known number of batches; every iteration is an epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Direction(Enum):
    """Whether smaller or larger values of an objective are better."""

    MINIMIZE = "minimize"
    MAXIMIZE = "maximize"


@runtime_checkable
class Tally(Protocol):
    """What counts over batches, for what is no mean over examples; torchmetrics has them."""

    def reset(self) -> object: ...

    def update(self, outputs: Any, targets: Any, /) -> object: ...

    def compute(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of one's own of how good a network is; an objective, if a search is asked for it.

    Attributes:
        measure: (outputs, targets) of a batch -> the mean over its examples, a finite number; or
            a `Tally`, of which a copy is used.
        direction: Which way is better.
        unit: Unit, for people.
    """

    measure: Callable[[Any, Any], Any] | Tally
    direction: Direction = Direction.MAXIMIZE
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Objective:
    """A measured quantity that the search optimises.

    Attributes:
        name: Key of the quantity among a record's metrics.
        direction: Which way is better.
        unit: Unit, for people.
        reference: Worst value counted in the hypervolume: of a cost the dense network's, of a loss
            that of the uniform guess.
    """

    name: str
    direction: Direction
    unit: str
    reference: float


@dataclass(frozen=True, slots=True)
class Problem:
    """A trained network with the data that a search needs; what a recipe yields.

    Attributes:
        model: The dense network, trained.
        example_inputs: A tensor, tuple of arguments or dict of keyword arguments; batch first.
        calibration: A re-iterable of (inputs, targets) batches of training data without
            augmentation, for criteria and reconstruction.
        validation: A re-iterable of batches held out of the training data: the search split, on
            which candidates are compared. Never the test split.
        recalibration: A re-iterable of training batches with the training augmentation, for
            BatchNorm statistics; None takes `calibration`.
        refit: A re-iterable of batches like those of `calibration`, and more of them, on which
            the network that is handed out is reconstructed once more; None for none.
        training: Training batches with the training augmentation, of which every iteration is an
            epoch, for fine-tuning; none of them is in `validation`. None where there are none.
        test: Called for the final report alone, returns a re-iterable of test batches; None
            where there is no test split.
        loss: (outputs, targets) -> scalar mean loss.
        metrics: What else is measured on the search split and the test split, by name, such as
            the mean IoU.
        name: For people and file names.
        reference: Where the architecture can be built again, as `package.module:function` or
            `torchvision:NAME`; None if unknown.
        arguments: Keyword arguments of `reference`.
    """

    model: nn.Module
    example_inputs: Any
    calibration: Iterable[Batch]
    validation: Iterable[Batch]
    recalibration: Iterable[Batch] | None = None
    refit: Iterable[Batch] | None = None
    training: Epochs | None = None
    test: Callable[[], Iterable[Batch]] | None = None
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    name: str = "model"
    reference: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sent(self) -> Problem:
        """The problem as workers get it: without the splits that no evaluation reads."""
        return replace(self, recalibration=None, refit=None, training=None, test=None)

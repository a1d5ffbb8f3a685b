"""A made-up search on a made-up network, for everything that only shows searches.

Untrained weights for what runs them.
"""

from __future__ import annotations

import locale
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paretoprune.experiments.models import digits_resnet
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.tracking.mlflow_runs import connect
from paretoprune.search import (
    Candidate,
    Completed,
    Direction,
    Failed,
    Infeasible,
    Objective,
    Record,
)
from paretoprune.surgery import Cost, PruningPlan

SIZES = {"stem": 4, "layer1.0.conv1": 8, "layer1.1.conv1": 8, "layer2.0.conv1": 16}
BLOCKS = {"layer1.1": ("layer1.1.conv1",)}
DENSE = Cost(macs=1_000_000, params=20_000)
OBJECTIVES = (
    Objective("loss", Direction.MINIMIZE, "nats", math.log(10)),
    Objective("macs", Direction.MINIMIZE, "MACs", 1e6),
)


class MadeUp:
    """Makes records and views."""

    @staticmethod
    def completed(
        number: int,
        loss: float,
        macs: int,
        *,
        accuracy: float | None = 0.9,
        removed: tuple[str, ...] = (),
        origin: str = "sampler",
    ) -> Record:
        """Returns a completed trial with half of one group's units removed."""
        plan = PruningPlan({"layer1.0.conv1": (0, 1, 2, 3)}, removed)
        metrics = {"loss": loss, "macs": float(macs), "params": macs / 50}
        if accuracy is not None:
            metrics["accuracy"] = accuracy
        return Record(
            number,
            Candidate("l2", macs / 1e6, "global", {}, removed),
            plan,
            Cost(macs, macs // 50),
            Completed(metrics, 1.5),
            origin,
        )

    @staticmethod
    def view(*records: Record) -> SearchView:
        """Returns a view of these records."""
        return SearchView(
            name="made-up",
            dense=DENSE,
            dense_metrics={"loss": 0.01, "accuracy": 0.99},
            target=500_000,
            objectives=OBJECTIVES,
            records=records,
            sizes=SIZES,
            blocks=BLOCKS,
        )


@pytest.fixture
def made_up() -> type[MadeUp]:
    """Makes records and views."""
    return MadeUp


@pytest.fixture
def ascii_locale() -> Iterator[None]:
    """A locale whose files are ASCII unless they say what they are."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a digits network, so that the recipe does not train."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(digits_resnet().state_dict(), file)
    return str(file)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="session")
def view() -> SearchView:
    """Five completed trials, 1, 3 and 4 of them on the front; one infeasible, one failed."""
    candidate = Candidate("taylor", 0.3)
    return MadeUp.view(
        MadeUp.completed(0, 0.5, 495_000, accuracy=0.80, origin="seed"),
        MadeUp.completed(1, 0.2, 498_000, accuracy=0.95),
        Record(2, candidate, None, None, Infeasible("no plan has 0 MACs")),
        MadeUp.completed(3, 0.3, 300_000, accuracy=0.93, removed=("layer1.1",)),
        MadeUp.completed(4, 0.9, 200_000, accuracy=0.70, origin="seed"),
        Record(5, candidate, PruningPlan(), Cost(1, 1), Failed("ValueError: not finite")),
        MadeUp.completed(6, 0.95, 300_000, accuracy=0.60),
    )

"""Where MLflow keeps searches, as values; knows nothing of MLflow itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Store:
    """Where MLflow keeps runs.

    Attributes:
        uri: Tracking URI: a SQLite file or a server.
        artifacts: URI under which new experiments put artifacts; None lets the server decide.
    """

    uri: str
    artifacts: str | None = None


def store_of(runs_dir: Path) -> Store:
    """Returns the store of `MLFLOW_TRACKING_URI` if that is set, else SQLite in `runs_dir`."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return Store(uri)
    folder = runs_dir.resolve()
    return Store(f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlartifacts").as_uri())


@dataclass(frozen=True, slots=True)
class ExportPlace:
    """Where an export belongs in MLflow.

    Attributes:
        uri: Tracking URI.
        experiment: Id of the search's experiment.
        search_id: What the search's runs are tagged with.
        trial: Number of the exported trial.
        name: Name of the registered model; MLflow counts its versions.
    """

    uri: str
    experiment: str
    search_id: str
    trial: int
    name: str

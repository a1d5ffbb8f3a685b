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
    """Returns the store of `MLFLOW_TRACKING_URI` if that is set, else SQLite in `runs_dir`.

    A relative one is made absolute, because the server of `paretoprune ui` runs elsewhere.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return Store(_anchored_folder(anchored(uri)))
    folder = runs_dir.resolve()
    return Store(f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlartifacts").as_uri())


def anchored(url: str) -> str:
    """Returns the URL of a database with the path of a SQLite file made absolute."""
    scheme, _, path = url.partition(":///")
    if scheme.split("+")[0] == "sqlite" and path and not path.startswith((":", "file:")):
        return f"{scheme}:///{Path(path).resolve()}"
    return url


def _anchored_folder(uri: str) -> str:
    """Returns a tracking URI with the path of a folder made absolute."""
    kind, colon, path = uri.partition(":")
    if colon and (kind != "file" or path.startswith("/")):
        return uri
    if not colon and uri.startswith(("databricks", "uc")):  # words that MLflow knows
        return uri
    return Path(path if colon else uri).resolve().as_uri()


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

"""Where MLflow keeps searches, as values; knows nothing of MLflow itself."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from paretoprune.experiments.runs import TRACKING_FILE, RunSpec
from paretoprune.experiments.tracking.saved_view import front_link, view_link


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
class Tracked:
    """Where a search lies in MLflow.

    Attributes:
        name: Name of the run.
        uri: Tracking URI.
        experiment: Id of the experiment.
        parent: Id of the parent run.
        search_id: What its child runs are tagged with.
    """

    name: str
    uri: str
    experiment: str
    parent: str
    search_id: str

    @staticmethod
    def of(folder: Path, spec: RunSpec) -> Tracked:
        """Returns where the run of a folder lies in MLflow.

        Raises:
            ValueError: If MLflow has nothing of it, or its database file is gone; MLflow would
                begin a new one without a word.
        """
        name, note = folder.name, folder / TRACKING_FILE
        if not note.exists():
            raise ValueError(
                f"MLflow has nothing of run {name!r} yet; `paretoprune resume {name}` writes it."
            )
        where = json.loads(note.read_text())
        database = where["uri"].removeprefix("sqlite:///")
        if database != where["uri"] and not Path(database).exists():
            raise ValueError(
                f"the MLflow database {database} is not there; `paretoprune resume {name}` "
                f"writes it anew."
            )
        return Tracked(name, where["uri"], where["experiment"], where["run"], spec.id)

    @property
    def is_remote(self) -> bool:
        """Whether a server is there already."""
        return self.uri.startswith(("http://", "https://"))

    def links(self, server: str) -> str:
        """Returns the two addresses that show the front."""
        return (
            f"front, interactive:  {front_link(server, self.experiment, self.parent)}\n"
            f"front, as runs:      {view_link(server, self.experiment, self.search_id)}"
        )

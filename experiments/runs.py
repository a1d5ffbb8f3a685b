"""Run folders: `runs/NAME/run.json` says how to build a search again; the study lies beside it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paretoprune.criteria import UNBOUNDED, Bounds
from paretoprune.criteria.drafts import drafted
from paretoprune.experiments.units import format_target
from paretoprune.search.checks import DAMAGE
from paretoprune.search.ties import Granularity

SCHEMA = 1
"""Version of run.json; a newer one is refused rather than misread."""
SALIENCY_DIR = ".saliency"
"""In the folder of runs: saliencies that all of them share."""
RUN_FILE = "run.json"
TRACKING_FILE = "mlflow.json"
"""In the run folder: where the search lies in MLflow, for links."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LIBRARIES = ("paretoprune", "torch", "torchvision", "optuna", "ray", "mlflow", "numpy")


def library_versions() -> dict[str, str]:
    """Returns the installed version of each library that shapes a result."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class RunSpec:
    """Everything needed to build the search of a run again.

    Attributes:
        model: Recipe or model reference, as given on the command line.
        flops: Share of the dense MACs (float) or MACs (int) that a plan may keep at most.
        trials: Trials asked for.
        criteria: Names of the criteria in the search space.
        objectives: Names of the metrics that are optimised; the first one ranks.
        granularity: Which groups share an offset: `group`, `stage` or `uniform`.
        bounds: Which unit counts groups may keep, and what stays whole.
        data: Data reference; None takes the recipe's.
        weights: Path of the trained weights; None takes the recipe's.
        sampler: Name of the sampler; None where the strategy has none.
        strategy: `optuna` or `everything`.
        finetune: Epochs that the best of the front are fine-tuned for.
        top: How many of the front are fine-tuned.
        distil: Whether they learn from the dense network's outputs, too.
        recovery: Epochs that candidates of the strategy `everything` are trained for.
        learning_rate: The peak of all training; None takes what suits the network.
        reports: What is measured beyond the objectives: names of `reports.REPORTS`.
        seed: Seed of data splits and sampler.
        workers: Parallel evaluations; None lets the executor decide.
        address: Ray cluster; None runs locally.
        gpus_per_trial: GPUs of each evaluation; None lets the executor decide.
        trial_timeout: Seconds that an evaluation may take; None sets no limit.
        storage: Database URL of the study; None takes a journal in the run's folder.
        libraries: Versions at the time of the search.
        id: Tells two runs of the same name apart where their trials are tracked.
    """

    model: str
    flops: float | int
    trials: int
    criteria: tuple[str, ...]
    objectives: tuple[str, ...] = ("loss", "macs")
    granularity: Granularity = "group"
    bounds: Bounds = UNBOUNDED
    data: str | None = None
    weights: str | None = None
    sampler: str | None = DAMAGE
    strategy: str = "optuna"
    finetune: int = 0
    top: int = 3
    distil: bool = False
    recovery: int = 0
    learning_rate: float | None = None
    reports: tuple[str, ...] = ()
    seed: int = 0
    workers: int | None = None
    address: str | None = None
    gpus_per_trial: float | None = None
    trial_timeout: float | None = None
    storage: str | None = None
    libraries: Mapping[str, str] = field(default_factory=library_versions)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def to_json(self) -> dict[str, Any]:
        """Returns the run as plain values, for JSON."""
        lists = {name: list(getattr(self, name)) for name in ("criteria", "objectives", "reports")}
        return {"version": SCHEMA, **asdict(self), **lists, "bounds": self.bounds.to_json()}

    @staticmethod
    def from_json(data: Any) -> RunSpec:
        """Returns the run that `to_json` wrote.

        Raises:
            ValueError: If the schema is another one, or fields are missing.
        """
        schema = data.get("version") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"this version reads schema {SCHEMA}, but got {schema!r}; use the paretoprune "
                f"that wrote it."
            )
        known = {name.name for name in fields(RunSpec)}
        values = {name: value for name, value in data.items() if name in known}
        try:
            values["criteria"] = tuple(values["criteria"])
            values["reports"] = tuple(values["reports"])
            values["bounds"] = Bounds.from_json(values["bounds"])
            values["objectives"] = tuple(values["objectives"])
            return RunSpec(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"run.json is incomplete ({error}).") from error


def list_runs(runs_dir: Path) -> list[str]:
    """Returns the names of the runs in a folder, the newest first."""
    files = sorted(runs_dir.glob(f"*/{RUN_FILE}"), key=lambda file: file.stat().st_mtime)
    return [file.parent.name for file in reversed(files)]


def default_name(runs_dir: Path, problem: str, flops: float | int) -> str:
    """Returns the next free name, such as `resnet56-cifar10-50pct-1`."""
    return _next_name(runs_dir, f"{_label(problem)}-{format_target(flops).replace('%', 'pct')}")


def comparison_dir(runs_dir: Path, problem: str) -> Path:
    """Returns the next free folder of a comparison, such as `runs/comparisons/digits-1`."""
    folder = runs_dir / "comparisons"
    return folder / _next_name(folder, _label(problem))


def _label(problem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", problem).strip("-._") or "run"


def _next_name(folder: Path, stem: str) -> str:
    number = 1
    while (folder / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def check_name(runs_dir: Path, name: str) -> Path:
    """Returns the folder that a new run of this name will have; creates nothing.

    Raises:
        ValueError: If the name is no plain file name, or is taken.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a run name has letters, digits, '.', '_' and '-' and starts with a letter or "
            f"digit, but got {name!r}."
        )
    folder = runs_dir / name
    if (folder / RUN_FILE).exists():
        raise ValueError(
            f"run {name!r} exists already in {runs_dir}; continue it with `paretoprune resume "
            f"{name}`, or take another --run name."
        )
    if folder.exists():
        raise ValueError(f"{folder} exists already and is no run; take another --run name.")
    return folder


def create_run(runs_dir: Path, name: str, spec: RunSpec) -> Path:
    """Returns the new folder of a run, with its run.json written atomically.

    Raises:
        ValueError: If the name is unusable or taken.
        OSError: If the folder cannot be written.
    """
    folder = check_name(runs_dir, name)
    runs_dir.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:  # another process took the name since it was checked
        check_name(runs_dir, name)
        raise
    write_json(folder / RUN_FILE, spec.to_json())
    return folder


def load_run(runs_dir: Path, name: str) -> tuple[Path, RunSpec]:
    """Returns the folder of a run and what its run.json says.

    Raises:
        ValueError: If there is no such run (the message lists those there are), or its run.json
            cannot be read.
    """
    folder = runs_dir / name
    file = folder / RUN_FILE
    if not _NAME.fullmatch(name) or not file.exists():
        raise ValueError(_unknown(runs_dir, name))
    try:
        return folder, RunSpec.from_json(json.loads(file.read_text()))
    except ValueError as error:  # JSON's own error is one, too
        raise ValueError(f"{file} cannot be read: {error}") from error


def _unknown(runs_dir: Path, name: str) -> str:
    known = list_runs(runs_dir)
    if not known:
        return (
            f"no run {name!r}: {runs_dir} holds no runs yet; start one with `paretoprune search`."
        )
    shown = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
    return f"no run {name!r} in {runs_dir}; there are: {shown}."


def write_json(file: Path, data: object) -> None:
    """Writes JSON so that a reader sees the old file or the whole new one, never a part."""
    with drafted(file) as draft:
        draft.write_text(json.dumps(data, indent=2) + "\n")

"""The options of `search`, checked before anything that takes long."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from paretoprune.criteria import CRITERIA, Bounds
from paretoprune.experiments.measuring.reports import parse_reports
from paretoprune.experiments.references import LIBRARIES
from paretoprune.experiments.runs import RunSpec
from paretoprune.experiments.tracking.store import anchored
from paretoprune.experiments.units import names, parse_flops, parse_fraction
from paretoprune.search import checks
from paretoprune.search.loop import DEFAULTS
from paretoprune.search.objectives import MEASURED
from paretoprune.search.ties import Granularity


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """The options of `search` as they were given; see its help."""

    model: str
    flops: str
    data: str | None = None
    weights: str | None = None
    trials: int = 100
    criteria: str | None = None
    sampler: str | None = None
    seed: int = 0
    workers: int | None = None
    address: str | None = None
    gpus_per_trial: float | None = None
    trial_timeout: float | None = None
    storage: str | None = None
    strategy: str = "optuna"
    finetune: int = 0
    top: int | None = None
    distil: bool = False
    recovery: int = 0
    learning_rate: float | None = None
    report: str = ""
    objectives: str = "loss,macs"
    granularity: str = "group"
    multiple: int = 1
    min_ratio: str = "0"
    max_ratio: str = "1"
    exclude: str = ""

    @property
    def _measured(self) -> Iterable[str] | None:
        """What can be an objective; not known yet where a function may return a Problem."""
        kind, colon, _ = self.model.partition(":")
        return None if colon and kind not in LIBRARIES else MEASURED

    def checked(self) -> RunSpec:
        """Returns the run that they describe.

        Raises:
            ValueError: If one of them cannot be meant.
        """
        checks.check_name("strategy", self.strategy, DEFAULTS)
        criteria = names(self.criteria or "") or DEFAULTS[self.strategy]
        for name in criteria:
            checks.check_name("criterion", name, CRITERIA)
        objectives = names(self.objectives)
        bounds = bounds_of(self.multiple, self.min_ratio, self.max_ratio, self.exclude)
        checks.check_search(
            self.strategy,
            criteria,
            objectives=objectives,
            measured=self._measured,
            granularity=self.granularity,
            bounds=bounds,
            sampler=self.sampler,
            recovery=self.recovery,
            trials=self.trials,
            seed=self.seed,
            workers=self.workers,
            gpus_per_trial=self.gpus_per_trial,
            trial_timeout=self.trial_timeout,
        )
        if self.address is None:
            checks.check_gpus(self.gpus_per_trial)
        top = RunSpec.top if self.top is None else self.top
        checks.check_count("--finetune", self.finetune, 0)
        checks.check_count("--top", top, 1)
        if self.top is not None and not self.finetune:
            raise ValueError(
                f"--top {self.top} says how many are fine-tuned, but none are: give --finetune "
                f"EPOCHS, or leave --top out."
            )
        if not self.finetune and not self.recovery:
            for name, given in (
                ("--distill", self.distil),
                ("--learning-rate", self.learning_rate),
            ):
                if given:
                    raise ValueError(f"{name} needs a training: give --finetune EPOCHS.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate is positive, but got {self.learning_rate}.")
        return RunSpec(
            model=self.model,
            flops=parse_flops(self.flops),
            trials=self.trials,
            criteria=criteria,
            objectives=objectives,
            granularity=cast("Granularity", self.granularity),
            bounds=bounds,
            data=_anchored(self.data),
            weights=_absolute(self.weights),
            sampler=None if self.strategy == "everything" else self.sampler or checks.DAMAGE,
            strategy=self.strategy,
            finetune=self.finetune,
            top=top,
            distil=self.distil,
            recovery=self.recovery,
            learning_rate=self.learning_rate,
            reports=parse_reports(self.report),
            seed=self.seed,
            workers=self.workers,
            address=self.address,
            gpus_per_trial=self.gpus_per_trial,
            trial_timeout=self.trial_timeout,
            storage=None if self.storage is None else _database(self.storage),
        )


def bounds_of(multiple: int, min_ratio: str, max_ratio: str, exclude: str) -> Bounds:
    """Returns the bounds that options describe; see their help.

    Raises:
        ValueError: If one of them cannot be meant.
    """
    checks.check_count("--multiple", multiple, 1)
    low, high = (parse_fraction(text, "a pruning ratio") for text in (min_ratio, max_ratio))
    return Bounds(multiple=multiple, min_ratio=low, max_ratio=high, exclude=names(exclude))


def _anchored(data: str | None) -> str | None:
    """Returns a data reference with its folder made absolute, so that any folder can resume.

    Those of functions have none, even where a folder is named like one.
    """
    kind, _, path = (data or "").partition(":")
    if kind not in ("cifar10", "imagefolder") or not path:
        return data
    return f"{kind}:{Path(path).expanduser().resolve()}"


def _database(url: str) -> str:
    """Returns the URL of a database with the path of a SQLite file made absolute.

    Raises:
        ValueError: If it is SQLite in memory, or by a name that SQLite reads as a URI of its own.
    """
    scheme, _, path = url.partition("://")
    file = path.removeprefix("/").partition("?")[0]
    if scheme.split("+")[0] == "sqlite" and (not file or file.startswith((":memory:", "file:"))):
        raise ValueError(
            f"--storage keeps the trials in a file, so that no kill loses them, but got {url}; "
            f"name one as in sqlite:///trials.db."
        )
    return anchored(url)


def _absolute(weights: str | None) -> str | None:
    """Returns the path of weights made absolute; a library's own have a name and no path."""
    return str(Path(weights).resolve()) if weights and Path(weights).is_file() else weights

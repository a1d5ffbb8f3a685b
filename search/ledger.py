"""Tasks and their ledger: what is to be evaluated, and what was, before anyone is told.

A worker writes each outcome to the ledger before it returns it. If the driver is killed between
the two, the next driver finds the outcome there, and the plan is not evaluated again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from paretoprune.criteria.drafts import drafted
from paretoprune.search.evaluation import Evaluate, attempt
from paretoprune.search.record import Outcome, outcome_from_json, outcome_to_json
from paretoprune.surgery import PruningPlan


def key_of(plan: PruningPlan) -> str:
    """Returns a name for a plan: equal plans, and only they, have equal names."""
    text = json.dumps(plan.to_json(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True, slots=True)
class Task:
    """A plan to evaluate.

    Attributes:
        plan: The plan.
        seed: Seed of the evaluation.
        parent: The plan of the network that it goes on from; None where that is the dense one.
        rival: Mean losses of the batches of the search split, of the best plan that costs no
            more; empty where there is none to race against.
    """

    plan: PruningPlan
    seed: int
    parent: PruningPlan | None = None
    rival: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """Name of the plan."""
        return key_of(self.plan)

    def to_json(self) -> dict[str, Any]:
        """Returns the task as plain values, for JSON."""
        parent = None if self.parent is None else self.parent.to_json()
        return {
            "plan": self.plan.to_json(),
            "seed": self.seed,
            "parent": parent,
            "rival": list(self.rival),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Task:
        """Returns the task that `to_json` wrote."""
        parent = data["parent"]
        return Task(
            PruningPlan.from_json(data["plan"]),
            data["seed"],
            None if parent is None else PruningPlan.from_json(parent),
            tuple(data["rival"]),
        )


@dataclass(frozen=True, slots=True)
class Ledger:
    """A folder with one file per evaluated plan.

    Attributes:
        folder: Created when the first outcome is written.
        run: What tells the run apart from others; outcomes of another are not taken. On a node
            without shared storage the folder of an earlier run of the same name may be left.
    """

    folder: Path
    run: str = ""

    def evaluate(self, evaluate: Evaluate, task: Task) -> Outcome:
        """Returns the outcome of a task, from the ledger where it is there."""
        known = self.read(task.key)
        if known is not None:
            return known
        if task.parent is not None:
            evaluate = partial(evaluate, parent=task.parent)
        if task.rival:
            evaluate = partial(evaluate, rival=task.rival)
        outcome = attempt(evaluate, task.plan, task.seed)
        with suppress(OSError):  # a full or absent disk must not cost the evaluation itself
            self.write(task.key, outcome)
        return outcome

    def read(self, key: str) -> Outcome | None:
        """Returns the outcome of a plan; None if it is not there whole."""
        try:
            data = json.loads((self.folder / f"{key}.json").read_text())
            return outcome_from_json(data) if data["run"] == self.run else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def forget(self, key: str) -> None:
        """Deletes the outcome of a plan, if it is there: the plan is evaluated again."""
        (self.folder / f"{key}.json").unlink(missing_ok=True)

    def write(self, key: str, outcome: Outcome) -> None:
        """Writes an outcome whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with drafted(self.folder / f"{key}.json") as draft:
            draft.write_text(json.dumps({**outcome_to_json(outcome), "run": self.run}))

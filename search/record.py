"""Record: the permanent fact of one trial, with a typed outcome."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, assert_never

from paretoprune.search.candidate import Candidate
from paretoprune.surgery import Cost, PruningPlan

SEED = "seed"
"""Origin of a trial that the search began with: a one-shot allocation."""
SAMPLER = "sampler"
"""Origin of a trial that the sampler suggested."""
LAYER = "layer"
"""Origin of a trial of the strategy `everything` in which a block was removed."""
NEURONS = "neurons"
"""Origin of a trial of the strategy `everything` in which units were removed."""
BEFORE = "_before"
"""Ends the names of what fine-tuning measured of the network that it began with."""
TAKEN = "taken"
"""What fine-tuning notes beside its metrics: 1 where its network is handed out, else 0."""


@dataclass(frozen=True)
class Completed:
    """The candidate was evaluated.

    Attributes:
        metrics: Measured quantities by name: `loss` and `accuracy` on the search split, `macs`,
            `params`, and other objectives.
        seconds: Wall time of the evaluation; 0 where an earlier trial had the same plan, whose
            metrics it takes.
        losses: Mean loss of every batch of the search split, for candidates to be compared with;
            empty where it was not kept.
    """

    metrics: Mapping[str, float]
    seconds: float
    losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy does not pickle
        return Completed, (dict(self.metrics), self.seconds, self.losses)


@dataclass(frozen=True)
class Stopped:
    """The evaluation ended early: a plan that costs no more is better beyond doubt.

    Attributes:
        metrics: An estimate of `loss` on the search split, and `macs` and `params`.
        seconds: Wall time of the evaluation; 0 where an earlier trial had the same plan.
    """

    metrics: Mapping[str, float]
    seconds: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Stopped, (dict(self.metrics), self.seconds)


Failure = Literal["error", "memory", "not finite", "timeout", "worker"]
"""Kinds of failure: the evaluation raised, ran out of memory (the GPU's too), measured something
that is not a finite number, went on past its time limit, or killed every worker that tried it."""


@dataclass(frozen=True)
class Failed:
    """The evaluation went wrong.

    Attributes:
        error: How, in one line.
        kind: What went wrong, for programs.
    """

    error: str
    kind: Failure = "error"


@dataclass(frozen=True)
class Infeasible:
    """No plan realises the candidate on its budget; it was not evaluated."""

    reason: str


Outcome = Completed | Stopped | Failed | Infeasible


@dataclass(frozen=True)
class Record:
    """One trial: what was decided, what it became, how it ended.

    Attributes:
        number: Number of the trial within its search, from 0.
        candidate: The decision.
        plan: The plan it decoded to; None where it is infeasible.
        cost: Cost of the plan; None where it is infeasible.
        outcome: How it ended.
        origin: `seed` for a one-shot allocation that the search began with, else `sampler`; with
            the strategy `everything` what its step removed, `layer` or `neurons`.
        finetuned: How its fine-tuning ended; None without one. Its metrics are `loss` and
            `accuracy` after it, `loss_before` and `accuracy_before` of the network that it began
            with, `epochs`, and `taken`: whether it is no worse and thus handed out.
    """

    number: int
    candidate: Candidate
    plan: PruningPlan | None
    cost: Cost | None
    outcome: Outcome
    origin: str = SAMPLER
    finetuned: Completed | Failed | None = None

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of the blocks removed whole."""
        return () if self.plan is None else self.plan.removed

    @property
    def finetuned_metrics(self) -> Mapping[str, float]:
        """What was measured after fine-tuning, taken or not; empty without one."""
        return self.finetuned.metrics if isinstance(self.finetuned, Completed) else {}

    @property
    def finetuning_taken(self) -> bool:
        """Whether the fine-tuned network is handed out: it is no worse than without."""
        return bool(self.finetuned_metrics.get(TAKEN))

    @property
    def handed_out(self) -> Mapping[str, float]:
        """What is known of the network that is handed out; empty unless the trial completed.

        Where it was fine-tuned, what was measured after that, or, if it came out worse, of the
        network that it began with; else as the search evaluated the candidate.
        """
        if not isinstance(self.outcome, Completed):
            return {}
        end = "" if self.finetuning_taken else BEFORE
        measured = self.finetuned_metrics
        quality = {n: measured[n + end] for n in self.outcome.metrics if n + end in measured}
        return {**self.outcome.metrics, **quality}


def reasons(records: Iterable[Record]) -> dict[str, int]:
    """Returns why trials did not complete, and how many for each reason, most first."""
    counted: Counter[str] = Counter()
    for record in records:
        match record.outcome:
            case Failed(error=error):
                counted[f"failed: {error}"] += 1
            case Infeasible():
                counted["infeasible"] += 1
            case Stopped():
                counted["stopped early, as dominated"] += 1
    return dict(counted.most_common(4))


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """Returns the outcome as plain values, for JSON."""
    match outcome:
        case Completed():
            return {
                "outcome": "completed",
                "metrics": dict(outcome.metrics),
                "seconds": outcome.seconds,
                "losses": list(outcome.losses),
            }
        case Stopped():
            return {
                "outcome": "stopped",
                "metrics": dict(outcome.metrics),
                "seconds": outcome.seconds,
            }
        case Failed():
            return {"outcome": "failed", "error": outcome.error, "kind": outcome.kind}
        case Infeasible():
            return {"outcome": "infeasible", "reason": outcome.reason}
        case _:
            assert_never(outcome)


def outcome_from_json(data: Mapping[str, Any]) -> Outcome:
    """Returns the outcome that `outcome_to_json` wrote.

    Raises:
        ValueError: If `data` has another form.
    """
    try:
        match data["outcome"]:
            case "completed":
                return Completed(data["metrics"], data["seconds"], tuple(data["losses"]))
            case "stopped":
                return Stopped(metrics=data["metrics"], seconds=data["seconds"])
            case "failed":
                return Failed(error=data["error"], kind=data["kind"])
            case "infeasible":
                return Infeasible(reason=data["reason"])
            case other:
                raise ValueError(
                    f"an outcome is completed, stopped, failed or infeasible, but got {other!r}."
                )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an outcome: {data!r}.") from error


def attributes_of(record: Record) -> dict[str, Any]:
    """Returns all but the number of a record as flat JSON values, as a study keeps them.

    Candidate and plan are JSON strings: thousands of unit numbers are slow to copy otherwise.
    """
    cost = record.cost
    return {
        "candidate": json.dumps(record.candidate.to_json()),
        "plan": None if record.plan is None else json.dumps(record.plan.to_json()),
        "cost": None if cost is None else {"macs": cost.macs, "params": cost.params},
        "origin": record.origin,
        **outcome_to_json(record.outcome),
    }


def record_from_attributes(number: int, attributes: Mapping[str, Any]) -> Record:
    """Returns the record whose `attributes_of` these are."""
    plan, cost = attributes["plan"], attributes["cost"]
    return Record(
        number=number,
        candidate=Candidate.from_json(json.loads(attributes["candidate"])),
        plan=None if plan is None else PruningPlan.from_json(json.loads(plan)),
        cost=None if cost is None else Cost(**cost),
        outcome=outcome_from_json(attributes),
        origin=attributes["origin"],
    )

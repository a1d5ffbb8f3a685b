"""What MLflow shows of a trial, as plain values: its name, tags, metrics and params."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from paretoprune.experiments.showing.tables import (
    Row,
    columns_of,
    pruning_ratios,
    stage_ratios,
)
from paretoprune.experiments.showing.view import SearchView
from paretoprune.search import Completed, Failed, Infeasible, Record
from paretoprune.search.objectives import own_metrics


def run_name(record: Record, view: SearchView) -> str:
    """Returns a name that MLflow's narrow column does not cut: `t012 91.3% @ 49.8%` (of MACs)."""
    name = f"t{record.number:03d}"
    if not isinstance(record.outcome, Completed):
        return f"{name} {outcome_word(record)}"
    metrics = record.outcome.metrics
    share = f"{100 * metrics['macs'] / view.dense.macs:.1f}%"
    ranked_by = view.objectives[0].name
    if ranked_by in own_metrics(metrics):
        return f"{name} {ranked_by} {metrics[ranked_by]:.3g} @ {share}"
    if "accuracy" in metrics:
        return f"{name} {100 * metrics['accuracy']:.1f}% @ {share}"
    return f"{name} loss {metrics['loss']:.3f} @ {share}"


def outcome_word(record: Record) -> str:
    """Returns `completed`, `stopped`, `failed` or `infeasible`."""
    return type(record.outcome).__name__.lower()


def tags_of(record: Record) -> dict[str, str]:
    """Returns what a trial can be found by; its place on the front is tagged apart."""
    tags = {
        "kind": "trial",
        "trial": str(record.number),
        "outcome": outcome_word(record),
        "criterion": record.candidate.criterion,
        "origin": record.origin,
    }
    match record.finetuned:  # the reason is empty where one of an earlier attempt may be there
        case Failed(error=error):
            tags |= {"finetuned": "failed", "finetuning_reason": error}
        case Completed() if record.finetuning_taken:
            tags |= {"finetuned": "taken", "finetuning_reason": ""}
        case Completed():
            worse = "it came out worse than it began, so the network before it is exported"
            tags |= {"finetuned": "worse", "finetuning_reason": worse}
    if isinstance(record.outcome, Failed):
        tags["reason"] = record.outcome.error
    if isinstance(record.outcome, Infeasible):
        tags["reason"] = record.outcome.reason
    return tags


def metrics_of(record: Record, view: SearchView) -> dict[str, float]:
    """Returns the measured quantities, rounded for people; none unless it completed."""
    if not isinstance(record.outcome, Completed):
        return {}
    metrics = {name: round(value, 4) for name, value in record.outcome.metrics.items()}
    ratio = record.outcome.metrics["macs"] / view.dense.macs
    metrics |= {"macs_ratio": round(ratio, 4), "flops_reduction": round(1 - ratio, 4)}
    metrics |= {"seconds": round(record.outcome.seconds, 2)}
    after = {f"finetuned_{name}": round(v, 4) for name, v in record.finetuned_metrics.items()}
    return metrics | after


def params_of(record: Record, view: SearchView) -> dict[str, str]:
    """Returns the decision in few values: MLflow draws no more than about six at once."""
    candidate = record.candidate
    removed = record.plan.removed if record.plan is not None else candidate.removed
    ratios = pruning_ratios(record, view.sizes, view.blocks)
    return {
        "criterion": candidate.criterion,
        "allocation": candidate.allocation,
        "budget": f"{candidate.budget:.4f}",
        "removed": " ".join(removed) or "none",
    } | {
        f"pruning_ratio.{stage}": f"{ratio:.3f}"
        for stage, ratio in stage_ratios(ratios, view.sizes).items()
    }


def table_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns rows in the form in which MLflow shows a table."""
    columns = columns_of(rows)
    data = [[_cell((asdict(row) | dict(row.metrics))[name]) for name in columns] for row in rows]
    return {"columns": columns, "data": data}


def _cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return round(value, 4) if isinstance(value, float) else value

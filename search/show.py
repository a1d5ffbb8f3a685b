"""A Pareto front for notebooks: rows, a table and a plot of its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING

from paretoprune.search.objectives import MEASURED
from paretoprune.search.problem import Direction, Objective
from paretoprune.search.record import Completed, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def values_of(record: Record) -> dict[str, object]:
    """Returns a completed record's trial, decisions and metrics by name.

    `removed` has the names of the blocks removed whole, joined by spaces.
    """
    candidate = record.candidate
    metrics = dict(metrics_of(record))
    metrics |= {f"finetuned_{name}": value for name, value in record.finetuned_metrics.items()}
    return {
        "trial": record.number,
        **{name: int(metrics.pop(name)) for name in ("macs", "params") if name in metrics},
        **metrics,
        "criterion": candidate.criterion,
        "allocation": candidate.allocation,
        "removed": " ".join(record.removed),
        "origin": record.origin,
    }


def html_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Returns rows as an HTML table; its caption says how many there are."""
    caption = f"Pareto front of {len(rows)} record{'' if len(rows) == 1 else 's'}"
    if not rows:
        return f"<p>{caption}: no trial has completed.</p>"
    names = dict.fromkeys(name for row in rows for name in row)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(row.get(n, '')))}</td>" for n in names) + "</tr>"
        for row in rows
    )
    return (
        f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def draw(records: Sequence[Record], objective: Objective, axes: Axes | None) -> Axes:
    """Draws records over their MACs and returns where.

    The line is the best value at or below so many MACs. It never promises more than the front
    has, nor does it fall where records differ in another objective than the one drawn.

    Args:
        records: Completed records, MACs falling.
        objective: What to draw where no accuracy was measured, or if it is the problem's own.
        axes: Where to draw; None takes a new figure of pyplot.
    """
    from matplotlib.ticker import EngFormatter, PercentFormatter

    if axes is None:
        from matplotlib import pyplot

        _, axes = pyplot.subplots(layout="constrained")
    metrics = [metrics_of(record) for record in reversed(records)]
    by_accuracy = objective.name in MEASURED and all("accuracy" in m for m in metrics)
    name = "accuracy" if by_accuracy else objective.name
    better = max if by_accuracy or objective.direction is Direction.MAXIMIZE else min
    xs, ys = [one["macs"] for one in metrics], [one[name] for one in metrics]
    (line,) = axes.plot(xs, list(accumulate(ys, better)), drawstyle="steps-post")
    axes.plot(xs, ys, "o", color=line.get_color())
    for at, (record, x, y) in enumerate(zip(reversed(records), xs, ys, strict=True)):
        below = at % 2 == 1  # neighbours may be close
        axes.annotate(
            str(record.number), (x, y), (4, -12 if below else 4), textcoords="offset points"
        )
    axes.xaxis.set_major_formatter(EngFormatter())
    if by_accuracy:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="MACs", ylabel=f"{name}, search split", title="Pareto front, by trial")
    return axes


def metrics_of(record: Record) -> Mapping[str, float]:
    """Returns the metrics of a completed record."""
    if not isinstance(record.outcome, Completed):
        raise TypeError(f"trial {record.number} has no metrics: {record.outcome}.")
    return record.outcome.metrics

"""Records as rows: the one place that decides what tables, plots and pages show of a trial."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from paretoprune.experiments.units import format_count, format_percent
from paretoprune.search import Completed, ParetoFront, Record
from paretoprune.search.objectives import own_metrics
from paretoprune.search.record import LAYER, NEURONS, Failed
from paretoprune.surgery import Cost, PruningPlan


@dataclass(frozen=True, slots=True)
class Row:
    """One completed trial for people.

    Attributes:
        trial: Number of the trial.
        macs: MACs of one forward pass of one example.
        macs_ratio: Share of the dense network's MACs that is left.
        params: Trainable scalars.
        loss: Mean loss on the search split.
        accuracy: Share of the search split that is classified rightly; None where targets are no
            classes.
        criterion: Name of the criterion that ranked units.
        allocation: `global`, `joint` or `uniform`.
        removed: Names of the blocks removed whole.
        origin: `seed` for a one-shot baseline, else `sampler`; with the strategy `everything`
            what its step removed, `layer` or `neurons`.
        seconds: Wall time of the evaluation.
        on_front: Whether no other trial dominates it.
        finetuned_loss: Loss after fine-tuning; None without one.
        finetuned_accuracy: Accuracy after fine-tuning; None without one.
        finetuned_loss_before: Loss of the network that fine-tuning began with, which would be
            handed out without it; None without one.
        finetuned_accuracy_before: Its accuracy; None likewise.
        finetuning_taken: Whether the fine-tuned network is no worse and handed out; None without.
        finetuning_error: Why fine-tuning failed; None unless it did.
        latency: Milliseconds of a forward pass; None where it is no objective.
        metrics: What else was measured, by name: metrics of the problem's own.
    """

    trial: int
    macs: int
    macs_ratio: float
    params: int
    loss: float
    accuracy: float | None
    criterion: str
    allocation: str
    removed: tuple[str, ...]
    origin: str
    seconds: float
    on_front: bool
    finetuned_loss: float | None = None
    finetuned_accuracy: float | None = None
    finetuned_loss_before: float | None = None
    finetuned_accuracy_before: float | None = None
    finetuning_taken: bool | None = None
    finetuning_error: str | None = None
    latency: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def rows_of(records: Iterable[Record], front: ParetoFront, dense: Cost) -> list[Row]:
    """Returns one row per completed record, in the order of `records`.

    Args:
        records: Records of any outcome; those that did not complete have no row.
        front: The front that decides `on_front`.
        dense: Cost of the dense network, the whole of `macs_ratio`.
    """
    members = {record.number for record in front.records}
    return [
        _row(record, record.outcome, dense, record.number in members)
        for record in records
        if isinstance(record.outcome, Completed)
    ]


def _row(record: Record, outcome: Completed, dense: Cost, on_front: bool) -> Row:
    metrics, after = outcome.metrics, record.finetuned_metrics
    return Row(
        trial=record.number,
        macs=int(metrics["macs"]),
        macs_ratio=metrics["macs"] / dense.macs,
        params=int(metrics["params"]),
        loss=metrics["loss"],
        accuracy=metrics.get("accuracy"),
        criterion=record.candidate.criterion,
        allocation=record.candidate.allocation,
        removed=record.removed,
        origin=record.origin,
        seconds=outcome.seconds,
        on_front=on_front,
        finetuned_loss=after.get("loss"),
        finetuned_accuracy=after.get("accuracy"),
        finetuned_loss_before=after.get("loss_before"),
        finetuned_accuracy_before=after.get("accuracy_before"),
        finetuning_taken=record.finetuning_taken if after else None,
        finetuning_error=record.finetuned.error if isinstance(record.finetuned, Failed) else None,
        latency=metrics.get("latency"),
        metrics=own_metrics(metrics),
    )


def front_json(rows: Sequence[Row]) -> str:
    """Returns rows as JSON: a list of objects with the fields of `Row`."""
    return json.dumps([asdict(row) for row in rows], indent=2)


def front_csv(rows: Sequence[Row]) -> str:
    """Returns rows as CSV with a header line; removed blocks are joined by spaces."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns_of(rows), extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow(asdict(row) | {"removed": " ".join(row.removed)} | dict(row.metrics))
    return out.getvalue()


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Returns the columns of a whole table: the fields, and the problem's own metrics."""
    fields = [name for name in Row.__slots__ if name not in ("on_front", "metrics")]
    return [*fields, *(rows[0].metrics if rows else ())]


WORDS = ("criterion and allocation", "blocks removed")
"""Heads of the last columns in a table of the front, those of `words`."""
_WORDS_ROOM = 16
"""Characters that a column of words has at least, if its words need them."""
_LESS_WANTED = (*reversed(WORDS), "params", "share")
"""Heads of the columns that narrow terminals do without, in this order."""


def number_heads(dense_metrics: Mapping[str, float]) -> list[str]:
    """Returns the heads of the first columns, those of `numbers`.

    Args:
        dense_metrics: What was measured of the dense network.
    """
    timed = ["latency"] if "latency" in dense_metrics else []
    own = own_metrics(dense_metrics)
    return ["trial", "MACs", "share", "params", "loss", "accuracy", *own, *timed]


def numbers(row: Row) -> list[str]:
    """Returns a row's cells under `number_heads`."""
    return [
        str(row.trial),
        format_count(row.macs),
        format_percent(row.macs_ratio),
        format_count(row.params),
        *_quality(row.loss, row.accuracy),
        *_own(row.metrics),
        *_timed(row.latency),
    ]


def dense_numbers(dense: Cost, metrics: Mapping[str, float]) -> list[str]:
    """Returns the dense network's cells under `number_heads`."""
    costs = [format_count(dense.macs), "100.0 %", format_count(dense.params)]
    measured = _quality(metrics["loss"], metrics.get("accuracy"))
    own = _own(own_metrics(metrics))
    return ["dense", *costs, *measured, *own, *_timed(metrics.get("latency"))]


def words(row: Row, most_blocks: int) -> list[str]:
    """Returns a row's cells under `WORDS`, with at most so many blocks by name."""
    about = {"seed": " one-shot", LAYER: ", a layer", NEURONS: ", neurons"}
    decided = f"{row.criterion} {row.allocation}{about.get(row.origin, '')}"
    named = row.removed[:most_blocks]
    if len(row.removed) > most_blocks:
        named = (*row.removed[: most_blocks - 1], f"{len(row.removed) - most_blocks + 1} more")
    return [decided, ", ".join(named) or "none"]


def _quality(loss: float, accuracy: float | None) -> list[str]:
    return [f"{loss:.4f}", "–" if accuracy is None else format_percent(accuracy, 2)]


def _own(metrics: Mapping[str, float]) -> list[str]:
    return [f"{value:.4g}" for value in metrics.values()]


def _timed(latency: float | None) -> list[str]:
    return [] if latency is None else [f"{latency:.3g} ms"]


def front_table(
    rows: Sequence[Row], dense: Cost, dense_metrics: Mapping[str, float]
) -> FrontTable:
    """Returns a table of at most 100 columns with the dense network as its first line.

    Args:
        rows: Rows of the front, MACs falling.
        dense: Cost of the dense network.
        dense_metrics: Its `loss` and `accuracy` on the search split.
    """
    heads = number_heads(dense_metrics)
    lines = [dense_numbers(dense, dense_metrics), *map(numbers, rows)]
    if any(row.finetuned_loss is not None or row.finetuning_error for row in rows):
        heads.append("fine-tuned")
        for line, cell in zip(lines, ("–", *map(_finetuned, rows)), strict=True):
            line.append(cell)
    texts = [["–", "–"], *(words(row, most_blocks=2) for row in rows)]
    whole = [[*line, *text] for line, text in zip(lines, texts, strict=True)]
    return FrontTable((*heads, *WORDS), whole)


@dataclass(frozen=True, slots=True)
class FrontTable:
    """A table for rich that leaves out whole columns where there is no room, and cuts no number.

    Attributes:
        heads: Of the columns.
        lines: Cells under them; those of the dense network first.
    """

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        absent: list[str] = []
        for head in _LESS_WANTED:
            needed = [self._width(one) for one in self.heads if one not in absent]
            if sum(needed) + 2 * len(needed) - 1 > options.max_width:  # with what lies between
                absent.append(head)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for head in self.heads:
            if head in WORDS and head not in absent:
                table.add_column(head, overflow="fold")
            elif head not in absent:
                table.add_column(head, justify="right", no_wrap=True)
        for number, line in enumerate(self.lines):
            cells = dict(zip(self.heads, line, strict=True))
            shown = [cell for head, cell in cells.items() if head not in absent]
            table.add_row(*shown, style=None if number else "dim")
        yield table
        if absent:
            yield Text(f"without room for: {', '.join(absent)}", "dim")

    def _width(self, head: str) -> int:
        """Returns how many characters a column needs; words are put below each other."""
        at = self.heads.index(head)
        cells = [head, *(line[at] for line in self.lines)]
        if head in WORDS:
            parts = [part for cell in cells for part in cell.split()]
            return min(_WORDS_ROOM, max(map(len, parts)))
        return max(len(part) for cell in cells for part in cell.splitlines())


def kept_units(
    record: Record, sizes: Mapping[str, int], blocks: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """Returns how many units of each group a record keeps; 0 where the group's block is removed.

    Args:
        record: A record; without a plan it keeps everything.
        sizes: Units per group of the dense network.
        blocks: Groups inside each removable block; they go with it.
    """
    plan = record.plan or PruningPlan()
    gone = {name for block in plan.removed for name in blocks.get(block, ())}
    return {
        name: 0 if name in gone else len(plan.kept.get(name, range(size)))
        for name, size in sizes.items()
    }


def quality(metrics: Mapping[str, float], ranked_by: str) -> tuple[str, str]:
    """Returns the name and the value of what tells people most of how good a network is.

    That is what ranks, where it is a metric of the problem's own; else accuracy, or loss.

    Args:
        metrics: What was measured of it.
        ranked_by: Name of the first objective.
    """
    if ranked_by in own_metrics(metrics):
        return ranked_by, f"{metrics[ranked_by]:.4g}"
    if "accuracy" in metrics:
        return "accuracy", format_percent(metrics["accuracy"], 2)
    return "loss", f"{metrics['loss']:.4f}"


def quality_of(record: Record, ranked_by: str) -> str:
    """Returns the quality of the network that a record hands out, in words."""
    when = ""
    if record.finetuned_metrics:
        taken = record.finetuning_taken
        when = " after fine-tuning" if taken else " before fine-tuning (worse after it)"
    return f"{' '.join(quality(record.handed_out, ranked_by))}{when}"


def _finetuned(row: Row) -> str:
    """Returns accuracy after fine-tuning and below it the one before.

    Loss where there is no accuracy, or where it was not taken for its loss alone.
    """
    if row.finetuned_loss is None:
        return "–" if row.finetuning_error is None else "failed"
    before, after = row.finetuned_accuracy_before, row.finetuned_accuracy
    worse = "" if row.finetuning_taken else ", not taken"
    if before is None or after is None or (worse and after >= before):
        return f"loss {row.finetuned_loss:.4f}{worse}\nfrom {row.finetuned_loss_before:.4f}"
    return f"{format_percent(after, 2)}{worse}\nfrom {format_percent(before, 2)}"


def pruning_ratios(
    record: Record, sizes: Mapping[str, int], blocks: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Returns the share of each group's units that a record removes, from 0 to 1.

    Args:
        record: A record; without a plan it decided nothing.
        sizes: Units per group of the dense network.
        blocks: Groups inside each removable block; they go with it.
    """
    if record.plan is None:
        return {}
    kept = kept_units(record, sizes, blocks)
    return {name: 1 - kept[name] / size for name, size in sizes.items()}


def stage_of(names: Sequence[str]) -> dict[str, str]:
    """Returns the stage of each group.

    A stage is the first part of a group's name where that gives two to six stages, else one
    third of the network.
    """
    stages = {name: name.split(".")[0] for name in names}
    if 2 <= len(set(stages.values())) <= 6:
        return stages
    thirds = ("first third", "second third", "last third")
    return {name: thirds[3 * at // len(names)] for at, name in enumerate(names)}


def stage_ratios(ratios: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Returns the mean pruning ratio of each stage, every unit counting once."""
    stages = stage_of(list(ratios))
    totals: dict[str, list[float]] = {}
    for name, ratio in ratios.items():
        removed, units = totals.setdefault(stages[name], [0.0, 0.0])
        totals[stages[name]] = [removed + ratio * sizes[name], units + sizes[name]]
    return {stage: removed / units for stage, (removed, units) in totals.items()}

"""What `search --report` measures at the end: the best network beside the dense one."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from paretoprune.experiments.exporting.export import handed_out
from paretoprune.experiments.measuring.reports import REPORTS
from paretoprune.experiments.runs import write_json
from paretoprune.search import Problem, Record
from paretoprune.search.weights import Weights
from paretoprune.surgery import trace
from paretoprune.surgery.progress import Progress

FILE = "reports.json"
"""In a run's folder."""


def report_best(
    problem: Problem,
    record: Record,
    names: Sequence[str],
    folder: Path,
    *,
    seed: int,
    progress: Progress,
) -> tuple[list[str], Mapping[str, float]]:
    """Returns lines and metrics of reports on the network that an export would hand out.

    The run's folder keeps it, so that a resumed search measures again only where another network
    is the best now.

    Args:
        problem: The problem of the search.
        record: The best of the front.
        names: Keys of `REPORTS`.
        folder: Of the run.
        seed: Of the search.
        progress: Told the stages, and how far each is.
    """
    file = folder / FILE
    finetuned = dict(record.finetuned_metrics)
    what = {"trial": record.number, "reports": list(names), "finetuned": finetuned}
    before = json.loads(file.read_text()) if file.exists() else {}
    if {name: before.get(name) for name in what} == what:
        return before["lines"], before["metrics"]
    graph = trace(problem.model, problem.example_inputs)
    weights = Weights.of_run(folder)
    small = handed_out(problem, graph, record, weights=weights, seed=seed, progress=progress)
    dense = copy.deepcopy(problem.model).cpu().eval()
    found = [REPORTS[name](problem, dense, small, progress) for name in names]
    metrics = {key: value for report in found for key, value in report.metrics.items()}
    lines = [report.line for report in found]
    write_json(file, {**what, "lines": lines, "metrics": metrics})
    return lines, metrics

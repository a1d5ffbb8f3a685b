"""Search: decisions in, a Pareto front out. Imports Optuna and Ray only when a search runs."""

from paretoprune.search.candidate import Candidate
from paretoprune.search.checks import SAMPLERS
from paretoprune.search.errors import (
    NothingCompleted,
    RunLocked,
    SearchInterrupted,
    SearchStuck,
    StoreFailed,
)
from paretoprune.search.finetuning import Finetuning
from paretoprune.search.front import ParetoFront, hypervolume, non_dominated
from paretoprune.search.listener import Listener, SearchInfo
from paretoprune.search.loop import read_run, search
from paretoprune.search.metrics import evaluate
from paretoprune.search.problem import Batch, Direction, Metric, Objective, Problem
from paretoprune.search.record import (
    Completed,
    Failed,
    Failure,
    Infeasible,
    Outcome,
    Record,
    Stopped,
)
from paretoprune.search.space import SearchSpace

__all__ = [
    "SAMPLERS",
    "Batch",
    "Candidate",
    "Completed",
    "Direction",
    "Failed",
    "Failure",
    "Finetuning",
    "Infeasible",
    "Listener",
    "Metric",
    "NothingCompleted",
    "Objective",
    "Outcome",
    "ParetoFront",
    "Problem",
    "Record",
    "RunLocked",
    "SearchInfo",
    "SearchInterrupted",
    "SearchSpace",
    "SearchStuck",
    "Stopped",
    "StoreFailed",
    "evaluate",
    "hypervolume",
    "non_dominated",
    "read_run",
    "search",
]

"""traced_problem: what commands that need no search begin with."""

from __future__ import annotations

from paretoprune.experiments.commands.progress import long_step, progress_console
from paretoprune.experiments.recipes import build_problem
from paretoprune.search import Problem
from paretoprune.search.fit import check_problem
from paretoprune.surgery import PruningGraph, trace


def traced_problem(
    model: str, *, data: str | None, weights: str | None, seed: int, quiet: bool
) -> tuple[Problem, PruningGraph]:
    """Returns a problem and the graph of its network, and shows how far that is.

    Args:
        model: Recipe or reference, see `build_problem`.
        data: Reference of the data, likewise.
        weights: Reference of the weights, likewise.
        seed: Of the splits.
        quiet: Shows nothing.

    Raises:
        UnsupportedModel: If the network cannot be traced.
        ValueError: If an argument cannot be meant, or the data does not fit the network.
    """
    console = progress_console()
    with long_step(console, f"Preparing {model}", quiet=quiet) as progress:
        problem = build_problem(model, data=data, weights=weights, seed=seed, progress=progress)
        check_problem(problem)
    with long_step(console, f"Tracing {model}", quiet=quiet):
        graph = trace(problem.model, problem.example_inputs)
    return problem, graph

"""The command line itself; `main_job` and `research` add its commands.

Both declare, and import what a command does when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import typer

app = typer.Typer(
    name="paretoprune",
    help="Search for smaller networks: a FLOPs target in, a Pareto front out. "
    "FLOPs are counted as MACs (one multiply-accumulate = 1), as the papers do.",
    no_args_is_help=True,
    epilog="Exit status: 0 done; 1 the search found no network; 2 bad input, said in one "
    "sentence; 130 interrupted, and nothing that was done is lost.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

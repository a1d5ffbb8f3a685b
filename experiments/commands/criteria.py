"""`paretoprune criteria`: the table of criteria."""

from __future__ import annotations

from rich.table import Table

from paretoprune.criteria import CRITERIA
from paretoprune.experiments.commands.progress import results_console


def criteria() -> None:
    """Prints the table of criteria."""
    table = Table(box=None, pad_edge=False)
    table.add_column("criterion", no_wrap=True)
    for head in ("what it measures", "what it needs", "paper"):
        table.add_column(head, overflow="fold")
    for name, kind in CRITERIA.items():
        table.add_row(name, kind.summary, str(kind.cost), kind.paper)
    results_console().print(table)

"""What listeners are told at the start of a made-up search."""

from __future__ import annotations

from paretoprune.experiments.showing.view import SearchView
from paretoprune.search import Record, SearchInfo


def info_of(view: SearchView, records: tuple[Record, ...] = (), trials: int = 7) -> SearchInfo:
    return SearchInfo(
        problem=view.name,
        dense=view.dense,
        metrics=view.dense_metrics,
        target=view.target,
        trials=trials,
        objectives=view.objectives,
        criteria=("l2", "taylor"),
        sizes=view.sizes,
        blocks={name: tuple(groups) for name, groups in view.blocks.items()},
        records=records,
    )

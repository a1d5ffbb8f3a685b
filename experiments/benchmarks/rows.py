"""What benchmarks share: rows of a result file, and the examples that a row is measured on."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paretoprune.search import Batch

RESULTS = Path(__file__).parents[1] / "results"


def read(file: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV; none where there is no file."""
    if not file.exists():
        return []
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def has(file: Path, values: Mapping[str, Any]) -> bool:
    """Whether a CSV has a row with these values."""
    return any(
        all(row.get(key) == str(value) for key, value in values.items()) for row in read(file)
    )


def append(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV once all of them are measured; all have the same fields."""
    measured = list(rows)
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(measured[0]))
        if new:
            writer.writeheader()
        writer.writerows(measured)


def first_batches(batches: Iterable[Batch], examples: int) -> list[Batch]:
    """Returns the first `examples` examples, batch by batch; all where there are fewer.

    Args:
        batches: (inputs, targets); inputs are one tensor.
        examples: How many.
    """
    taken: list[Batch] = []
    for inputs, targets in batches:
        if examples <= 0:
            break
        taken.append((inputs[:examples], targets[:examples]))
        examples -= len(targets)
    return taken

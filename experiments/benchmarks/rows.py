"""Rows of a result file: read, looked up, and added as soon as they are measured."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read(file: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV; none where there is no file."""
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def has(file: Path, values: Mapping[str, Any]) -> bool:
    """Whether a CSV has a row with these values."""
    return any(
        all(row.get(key) == str(value) for key, value in values.items()) for row in read(file)
    )


def append(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV once all of them are measured; all have the same fields."""
    measured = list(rows)
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(measured[0]))
        if new:
            writer.writeheader()
        writer.writerows(measured)

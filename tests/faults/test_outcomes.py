"""Whatever goes wrong in one evaluation is an outcome of its trial, and the search goes on."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from paretoprune.search import Batch, Completed, Failed, ParetoFront, Record, SearchInfo
from paretoprune.search import search as run_search
from tests.toy import local_ray, noise

TRIALS = 16
LIMIT = 30.0  # far above the 0.1 s of an evaluation, far below what hangs


@dataclass
class Faulty:
    """A data loader that goes wrong once for every fault, from the moment it is armed.

    Attributes:
        batches: What it yields.
        folder: Where a fault is noted, with the process that it befell.
        faults: What is to happen, in order.
    """

    batches: list[Batch]
    folder: Path
    faults: tuple[str, ...]

    def __iter__(self) -> Iterator[Batch]:
        fault = self._claim() if (self.folder / "armed").exists() else None
        if fault == "raises":
            raise OSError("a sector cannot be read")
        if fault == "memory":
            bytearray(2**62)
        if fault == "torch memory":
            torch.empty(2**60, dtype=torch.uint8)
        if fault == "hangs":
            time.sleep(3600)
        for inputs, targets in self.batches:
            yield inputs * torch.nan if fault == "nan" else inputs, targets

    def _claim(self) -> str | None:
        for fault in self.faults:
            with suppress(FileExistsError), (self.folder / fault).open("x") as note:
                note.write(str(os.getpid()))
                return fault
        return None


@dataclass
class Arming:
    """A listener that arms the loader when the trials begin, and keeps the records."""

    folder: Path
    records: list[Record]

    def started(self, info: SearchInfo) -> None:
        (self.folder / "armed").touch()

    def finished(self, record: Record, front: ParetoFront) -> None:
        self.records.append(record)

    def ended(self, error: BaseException | None) -> None: ...


def search(folder: Path, faults: tuple[str, ...], workers: int, limit: float | None) -> list[str]:
    """Runs a search with faults; returns a word for the outcome of every plan."""
    problem = noise()
    batches = [*problem.validation]
    problem = replace(problem, validation=Faulty(batches, folder, faults))
    heard = Arming(folder, [])
    front = run_search(
        problem,
        0.5,
        TRIALS,
        criteria=("l2", "taylor", "obs"),
        workers=workers,
        trial_timeout=limit,
        run_dir=folder / "run",
        listeners=[heard],
    )
    assert sorted(record.number for record in heard.records) == list(range(TRIALS))
    assert front.records
    assert all(isinstance(record.outcome, Completed) for record in front.records)
    words: list[str] = []
    plans = set()  # trials that came to a known plan take its outcome
    for record in heard.records:
        if record.plan in plans:
            continue
        plans.add(record.plan)
        match record.outcome:
            case Failed(error=error, kind=kind):
                assert "\n" not in error
                words.append(kind)
            case outcome:
                words.append(type(outcome).__name__.lower())
    return words


def test_in_this_process(tmp_path: Path) -> None:
    words = search(tmp_path, ("raises", "memory", "torch memory", "nan"), 0, None)
    assert words[:4] == ["error", "memory", "memory", "not finite"]
    assert set(words[4:]) == {"completed"}


def test_on_ray_also_what_hangs(tmp_path: Path) -> None:
    with local_ray(__name__):
        faults = ("hangs", "raises", "memory", "torch memory", "nan")
        words = Counter(search(tmp_path, faults, 2, LIMIT))
        hung = int((tmp_path / "hangs").read_text())
        assert not _is_running(hung)
    assert words.pop("completed") > 0
    assert words == {"timeout": 1, "error": 1, "memory": 2, "not finite": 1}


def _is_running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"

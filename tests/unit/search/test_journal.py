"""The journal: one writer, whole lines, whatever happens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paretoprune.search import RunLocked, StoreFailed
from paretoprune.search.journal import JournalFile

LINES = [{"n": n, "text": "a\nb é"} for n in range(5)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.log"


def written(path: Path, *, durable: bool = False) -> JournalFile:
    journal = JournalFile(path)
    journal.append(LINES, durable=durable)
    return journal


def test_reads_what_was_appended_from_any_line_on(path: Path) -> None:
    journal = written(path, durable=True)
    for start in (0, 3, 1, 5, 0, 9):
        assert list(journal.read(start)) == LINES[start:]
    journal.append([{"n": 5}], durable=False)
    assert list(journal.read(5)) == [{"n": 5}]
    journal.close()


def test_lines_survive_without_closing(path: Path) -> None:
    journal = written(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == LINES
    journal.close()


@given(cut=st.integers(0, 200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "torn.log"
    path.unlink(missing_ok=True)
    written(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    left = path.read_bytes().count(b"\n")

    journal = JournalFile(path)
    assert list(journal.read(0)) == LINES[:left]
    journal.append([{"new": True}], durable=False)
    assert list(journal.read(0)) == [*LINES[:left], {"new": True}]
    journal.close()


def test_a_second_writer_is_refused_in_one_sentence(path: Path) -> None:
    journal = written(path)
    with pytest.raises(RunLocked, match=r"another search is running in .*; wait until it ends"):
        JournalFile(path)
    journal.close()
    JournalFile(path).close()


def test_a_reader_needs_no_lock_and_changes_nothing(path: Path) -> None:
    journal = written(path)
    with path.open("ab") as file:
        file.write(b'{"half": ')
    before = path.read_bytes()
    reader = JournalFile(path, read_only=True)
    assert list(reader.read(0)) == LINES
    with pytest.raises(RuntimeError, match="for reading only"):
        reader.append(LINES, durable=False)
    reader.close()
    journal.close()
    assert path.read_bytes() == before


def test_a_failed_write_leaves_no_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = written(path)

    def full(file: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreFailed, match="No space left"):
            journal.append([{"lost": True}], durable=True)
    assert list(journal.read(0)) == LINES
    journal.append([{"n": 5}], durable=True)
    assert list(journal.read(0)) == [*LINES, {"n": 5}]
    journal.close()


@pytest.mark.parametrize("line", ["not json", "[1]"])
def test_a_damaged_line_is_named(path: Path, line: str) -> None:
    written(path).close()
    with path.open("a") as file:
        file.write(f"{line}\n")
    journal = JournalFile(path)
    with pytest.raises(ValueError, match="damaged: line 6 is not"):
        list(journal.read(0))
    journal.close()

"""JournalFile: lines of JSON that one process appends to and that a kill cannot spoil.

The default home of a study. Three properties matter, and Optuna's own file backend has none of
them: a lock that dies with its holder (`flock`; the kernel frees it even after SIGKILL), a torn
last line that is healed on opening, and no fsync per parameter. The line format is the same, so
Optuna's tools read the file.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from paretoprune.search.errors import RunLocked, StoreFailed


def lock(file: BinaryIO, path: Path) -> None:
    """Makes this process the only writer, until `file` is closed or the process ends.

    Raises:
        RunLocked: If another process is.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunLocked(
            f"another search is running in {path.parent}; wait until it ends or stop it first."
        ) from error


def _unwritable(path: Path, error: OSError) -> StoreFailed:
    return StoreFailed(
        f"{path} cannot be written ({error.strerror}); the trials that it has are kept, and the "
        f"search goes on from them once it can be."
    )


class JournalFile:
    """An append-only file of JSON objects, one a line.

    Args:
        path: The file; created when it does not exist and may be written.
        read_only: Read beside a writer: no lock, and an unfinished last line is left alone.

    Raises:
        RunLocked: If another process writes to the file.
        StoreFailed: If it cannot be opened for writing.
        FileNotFoundError: If it does not exist and `read_only` is set.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        self._read_only = read_only
        self._position = (0, 0)  # number of lines read so far, and where the next one begins
        if read_only:
            self._file: BinaryIO = path.open("rb")
            return
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            lock(self._file, path)
            self._heal()
        except BaseException:
            self._file.close()
            raise

    def _heal(self) -> None:
        """Cuts off what follows the last newline: a line that a kill interrupted."""
        self._file.seek(0)
        whole = end = 0
        while block := self._file.read(1 << 20):
            if (newline := block.rfind(b"\n")) >= 0:
                whole = end + newline + 1
            end += len(block)
        if whole < end:
            self._file.truncate(whole)

    def read(self, start: int) -> Iterator[dict[str, Any]]:
        """Yields the objects from line `start` on, counted from 0.

        Raises:
            ValueError: If a line is not JSON.
        """
        line, offset = self._position if self._position[0] <= start else (0, 0)
        self._file.seek(offset)
        tail = self._file.read()
        for text in tail[: tail.rfind(b"\n") + 1].splitlines(keepends=True):
            line += 1
            offset += len(text)
            if line > start:
                yield self._parse(text, line)
                self._position = (line, offset)

    def _parse(self, text: bytes, line: int) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{self._path} is damaged: line {line} is not JSON.") from error
        if not isinstance(value, dict):
            raise ValueError(f"{self._path} is damaged: line {line} is not a JSON object.")
        return value

    def append(self, objects: Sequence[Mapping[str, Any]], *, durable: bool) -> None:
        """Adds lines; after return a kill of this process loses none of them.

        Args:
            objects: What to add.
            durable: Whether they must survive a loss of power too.

        Raises:
            StoreFailed: If they cannot be written; then none is in the file.
        """
        if self._read_only:
            raise RuntimeError(f"{self._path} was opened for reading only.")
        data = b"".join(
            json.dumps(item, separators=(",", ":")).encode() + b"\n" for item in objects
        )
        before = self._file.seek(0, os.SEEK_END)
        try:
            while data:  # a write to a raw file may take only a part
                data = data[self._file.write(data) :]
            if durable:
                os.fsync(self._file)
        except BaseException as error:
            self._file.truncate(before)  # a full disk or Ctrl-C must not leave half a line
            if isinstance(error, OSError):
                raise _unwritable(self._path, error) from error
            raise

    def close(self) -> None:
        """Gives the file and its lock free."""
        self._file.close()

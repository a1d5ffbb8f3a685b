"""Drafts: files that are written whole or not at all, and what killed writers leave of them."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DRAFT = re.compile(r"\.draft-(?P<host>.+)-(?P<process>\d+)$")


@contextmanager
def drafted(file: Path) -> Iterator[Path]:
    """Yields a draft that takes the name of a file when the block ends, or vanishes on an error.

    Its name says who writes it: the worker of a killed driver may write the same file as its
    successor, and nodes of a cluster may share a folder.

    Args:
        file: The file; its folder exists.
    """
    draft = file.with_suffix(f".draft-{socket.gethostname()}-{os.getpid()}")
    try:
        yield draft
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def remove_dead_drafts(folder: Path) -> None:
    """Deletes the drafts of processes that are no more; those of other machines stay.

    Args:
        folder: May be absent. This process writes nothing in it meanwhile.
    """
    for draft in folder.glob("*.draft-*"):
        written = _DRAFT.search(draft.name)
        if written is None or written["host"] != socket.gethostname():
            continue
        process = int(written["process"])
        if process == os.getpid() or not _lives(process):
            draft.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True

"""How long work tells how far it is: three kinds of listener, and the one that shows nothing."""

from __future__ import annotations

from collections.abc import Callable

Parts = Callable[[int, int], None]
"""Called with (parts done, parts in all, or 0 where that is not known)."""
Lines = Callable[[str], None]
"""Receives one line of text per step."""
Progress = Callable[[str, int, int], None]
"""Called with (what is done, parts done, parts in all, or 0 where that is not known)."""


def silent(*_step: object) -> None:
    """Shows no progress, of any kind."""

"""check_folder: whether a folder can be written, asked before long work."""

from __future__ import annotations

import os
from pathlib import Path


def check_folder(folder: Path) -> None:
    """Verifies that a folder can be written, or made where it is not there; makes nothing.

    Raises:
        ValueError: If a file is in its place or above it, or this user may not write there.
    """
    above = (folder, *folder.absolute().parents)
    nearest = next(place for place in above if os.path.lexists(place))
    if not nearest.is_dir():
        raise ValueError(f"{folder} cannot be a folder, because {nearest} is none.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written, because {nearest} is read-only.")

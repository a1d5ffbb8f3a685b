"""interrupted: trainings stop once their first epoch is in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from paretoprune.criteria.checkpoint import Checkpoint


@contextmanager
def interrupted() -> Iterator[None]:
    """Interrupts every training within, as Ctrl-C would, after an epoch."""
    write = Checkpoint.write

    def stopped(*given: Any) -> None:
        write(*given)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Checkpoint, "write", stopped)
        yield

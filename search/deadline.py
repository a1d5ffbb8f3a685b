"""deadline: ends this process when a piece of work goes on for too long.

Nothing else stops work that hangs: an exception reaches Python code alone, and a thread cannot be
ended. Where the process is a worker, another one takes its place.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_GRACE = 5.0
"""Seconds after the limit until the process ends even where no Python code can run."""


@contextmanager
def deadline(seconds: float | None, last_words: Callable[[], None]) -> Iterator[None]:
    """Kills this process if the block takes longer than it may; one block at a time.

    Args:
        seconds: The limit; None sets none.
        last_words: Called before the end, in another thread, unless code that holds Python's
            lock keeps all threads from running; then the process ends five seconds later.
    """
    if seconds is None:
        yield
        return

    def end() -> None:
        with suppress(Exception):  # whatever it is, the process must end
            last_words()
        os.kill(os.getpid(), signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    with Path(os.devnull).open("w") as nowhere:
        faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=nowhere)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()

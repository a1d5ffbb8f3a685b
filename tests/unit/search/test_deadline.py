"""A process that works for too long ends, whatever it is doing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from paretoprune.search.deadline import deadline

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from paretoprune.search import deadline
deadline._GRACE = 0.5
words = Path(sys.argv[1])
with deadline.deadline(0.2, lambda: words.write_text("said") and None):
    {work}
print("never")
"""


@pytest.mark.parametrize(
    ("work", "said", "status"),
    [
        ("time.sleep(60)", True, -signal.SIGKILL),
        ("while True: pass", True, -signal.SIGKILL),
        ("ctypes.PyDLL(None).sleep(60)", False, 1),  # no other thread can run meanwhile
    ],
)
def test_what_hangs_is_ended(tmp_path: Path, work: str, said: bool, status: int) -> None:
    words = tmp_path / "words"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(work=work), str(words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert (done.stdout, words.exists(), done.returncode) == ("", said, status)


def test_words_that_raise_do_not_keep_it_alive(tmp_path: Path) -> None:
    program = PROGRAM.format(work="time.sleep(60)")
    done = subprocess.run(  # the words are to be written into a folder that is not there
        [sys.executable, "-c", program, str(tmp_path / "none" / "words")],
        check=False,
        timeout=50,
    )
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_work_in_time_goes_on(seconds: float | None) -> None:
    said: list[str] = []
    for _ in range(2):
        with deadline(seconds, lambda: said.append("late")):
            pass
    with pytest.raises(ValueError, match="its own"), deadline(seconds, lambda: None):
        raise ValueError("its own")
    assert said == []

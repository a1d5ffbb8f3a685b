"""What killed writers leave is cleared away by the next driver; what others write stays."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from paretoprune.criteria.drafts import drafted
from paretoprune.search import Problem, search

WRITER = """
import sys, time
from pathlib import Path
from paretoprune.criteria.drafts import drafted

with drafted(Path(sys.argv[1])) as draft:
    draft.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


@contextmanager
def writing(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of writing a file."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        yield writer
    finally:
        writer.kill()
        writer.communicate(timeout=300)


def test_drafts_of_killed_writers_are_cleared_away(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    other = weights / "plan-finetuned.draft-another.machine-7"
    other.write_text("half")
    with writing(weights / "dead.safetensors") as writer:
        writer.send_signal(signal.SIGKILL)
        writer.wait(60)
    assert len([*weights.glob("dead.draft-*")]) == 1
    with writing(weights / "living.part"):
        inputs = torch.randn(8, 4)
        batches = [(inputs, torch.arange(8) % 2)]
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        problem = Problem(net, inputs[:2], batches, batches)
        search(problem, 0.5, 1, criteria=("l2",), workers=0, run_dir=tmp_path)
        assert {*weights.iterdir()} == {other, *weights.glob("living.draft-*")}
        assert len([*weights.glob("living.draft-*")]) == 1
    assert not [*weights.glob("*.safetensors")]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text("old")

    def written(text: str) -> None:
        with drafted(file) as draft:
            draft.write_text(text)
            if text == "broken":
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        written("broken")
    assert file.read_text() == "old"
    written("new")
    assert file.read_text() == "new"
    assert [*tmp_path.iterdir()] == [file]

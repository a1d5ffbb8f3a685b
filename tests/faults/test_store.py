"""A full disk and a read-only one: the command says one sentence, and goes on once it can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from paretoprune.search import ParetoFront, Problem, Record, StoreFailed, read_run, search

TRIALS = 400


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if mount(folder, "size=64m") != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=60)


def mount(folder: Path, options: str) -> int:
    """Mounts a file system in memory, or mounts it again; returns the exit status."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True, timeout=60).returncode


def fill(folder: Path) -> Path:
    """Returns a file that takes all the space that is left."""
    file = folder / "other"
    with file.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            return file


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if "MLFLOW" not in name}
    return subprocess.Popen(
        [sys.executable, "-m", "paretoprune.experiments", *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Returns the exit status of a command and the lines that it says on stderr."""
    _, said = process.communicate(timeout=200)
    return process.returncode, said.splitlines()


def records(folder: Path) -> tuple[Record, ...]:
    try:
        return read_run(folder).records
    except ValueError:  # it has only just begun
        return ()


def test_a_read_only_disk_is_said_and_nothing_is_lost(disk: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    batches = [(torch.randn(16, 4), torch.arange(16))]
    problem = Problem(model.eval(), batches[0][0][:2], batches, batches)

    def run(trials: int) -> ParetoFront:
        return search(problem, 0.5, trials, criteria=("l2",), workers=0, run_dir=disk / "one")

    run(3)
    before = records(disk / "one")
    assert mount(disk, "remount,ro") == 0
    with pytest.raises(StoreFailed) as refusal:
        run(6)
    assert str(refusal.value) == unwritable(disk, "Read-only file system")
    assert records(disk / "one") == before
    assert mount(disk, "remount,rw") == 0
    run(6)
    after = records(disk / "one")
    assert [record.number for record in after] == list(range(6))
    assert after[:3] == before


@pytest.mark.slow
def test_a_disk_that_fills_up_and_one_that_is_read_only(disk: Path) -> None:
    place = ["--runs-dir", str(disk), "--quiet"]
    options = ["--flops", "50%", "--workers", "0", "--run", "one", "--trials", str(TRIALS)]
    command = start("search", "digits", *options, *place)
    limit = time.monotonic() + 300
    while len(records(disk / "one")) < 3:
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < limit, "nothing happens"
        time.sleep(0.1)
    other = fill(disk)
    status, lines = ended(command)
    assert status == 2
    assert lines[-1] == f"error: {unwritable(disk, 'No space left on device')}"
    assert len(lines) <= 2  # MLflow's store lies on the same disk, which is said once
    assert all("does not work" in line for line in lines[:-1])
    before = records(disk / "one")
    assert len(before) >= 3

    assert mount(disk, "remount,ro") == 0
    refused = (2, [f"error: {unwritable(disk, 'Read-only file system')}"])
    assert ended(start("resume", "one", *place)) == refused
    assert records(disk / "one") == before

    assert mount(disk, "remount,rw") == 0
    other.unlink()
    spec = json.loads((disk / "one" / "run.json").read_text())  # the rest would take a minute
    trials = len(before) + 3
    (disk / "one" / "run.json").write_text(json.dumps({**spec, "trials": trials}))
    assert ended(start("resume", "one", *place)) == (0, [])
    after = records(disk / "one")
    assert [record.number for record in after] == list(range(trials))
    assert after[: len(before)] == before


def unwritable(disk: Path, reason: str) -> str:
    return (
        f"{disk / 'one' / 'journal.log'} cannot be written ({reason}); the trials that it has are "
        f"kept, and the search goes on from them once it can be."
    )

"""A search is killed while it trains, goes on within an epoch, and ends with the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paretoprune.search import Completed, Record, read_run

DRIVER = Path(__file__).with_name("training_driver.py")
EPOCHS = 12


def start(folder: Path, strategy: str, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(folder), strategy, str(workers)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def trained(folder: Path) -> list[str]:
    """The epochs that were trained, by file, such as `NAME 3/12`."""
    return [
        f"{log.stem} {line.split()[3].rstrip(',')}"
        for log in sorted((folder / "weights").glob("*.log"))
        for line in log.read_text().splitlines()
    ]


def kill_after(folder: Path, strategy: str, workers: int, epochs: int) -> None:
    """Kills a driver once so many epochs were trained in all."""
    driver = start(folder, strategy, workers)
    limit = time.monotonic() + 300
    while len(trained(folder)) < epochs:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < limit, "nothing happens"
        time.sleep(0.005)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate(timeout=300)


def finish(folder: Path, strategy: str, workers: int) -> list[Record]:
    out, _ = start(folder, strategy, workers).communicate(timeout=180)
    assert out == ""
    return list(read_run(folder).records)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "weights").glob("*.safetensors")}


def metrics(record: Record) -> tuple[object, ...]:
    assert isinstance(record.outcome, Completed)
    return record.number, record.plan, dict(record.outcome.metrics), dict(record.finetuned_metrics)


@pytest.mark.parametrize(
    ("strategy", "kills"),
    [
        ("optuna", (5,)),
        pytest.param("optuna", (2, 11, 16), marks=pytest.mark.slow),
        pytest.param("everything", (1, 15, 20), marks=pytest.mark.slow),
    ],
)
def test_a_killed_training_ends_with_the_same_weights(
    tmp_path: Path, strategy: str, kills: tuple[int, ...]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    expected = finish(whole, strategy, 0)
    for epochs in kills:
        kill_after(run, strategy, 0, epochs)
    records = finish(run, strategy, 0)
    assert [metrics(one) for one in records] == [metrics(one) for one in expected]
    assert files(run) == files(whole)
    assert len(trained(whole)) % EPOCHS == 0
    # at a kill the log may have an epoch whose checkpoint was not written yet
    assert len(trained(run)) <= len(trained(whole)) + len(kills)


@pytest.mark.slow
def test_workers_that_are_killed_train_no_epoch_twice(tmp_path: Path) -> None:
    kill_after(tmp_path, "optuna", 2, 8)
    time.sleep(3)  # its workers end by themselves
    before = len(trained(tmp_path))
    records = finish(tmp_path, "optuna", 2)
    info = read_run(tmp_path)
    best = info.front.leading(2, info.target)  # one where a trial dominates all others
    done = [one.number for one in records if isinstance(one.finetuned, Completed)]
    assert sorted(done) == sorted(one.number for one in best)
    assert len(trained(tmp_path)) <= len(best) * EPOCHS + 2
    assert before >= 8
    left = {file.suffix for file in (tmp_path / "weights").iterdir()}
    assert left == {".safetensors", ".log", ".json"}

"""What each worker gets of a cluster, without Ray."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError, RayActorError

from paretoprune.search import Completed
from paretoprune.search import workers as module
from paretoprune.search.errors import WorkersFailed
from paretoprune.search.record import outcome_to_json
from paretoprune.search.workers import _cores, _share, _TuneSearch

NODES = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([0.0, 0.0, 1.0, 2.0, 8.0])),
    min_size=1,
    max_size=5,
)


def placed(nodes: list[tuple[int, float]], cores: int, gpus: float) -> int:
    """Returns how many workers Ray places at a time, one after the other on whichever node."""
    count = 0
    for free, there in nodes:
        per_gpu = [1.0] * int(there)
        while free >= cores:
            if gpus:
                index = next((at for at, left in enumerate(per_gpu) if left + 1e-9 >= gpus), None)
                if index is None:
                    break
                per_gpu[index] -= gpus
            free -= cores
            count += 1
    return count


@given(NODES, st.none() | st.integers(1, 20), st.none() | st.just(0.0) | st.just(0.25))
def test_as_many_workers_run_at_a_time_as_can_with_all_the_cores_that_leaves(
    nodes: list[tuple[int, float]], workers: int | None, wanted: float | None
) -> None:
    if wanted and not any(gpus for _, gpus in nodes):
        with pytest.raises(ValueError, match=r"to have 0\.25 GPUs, but the node with most has 0"):
            _share(nodes, workers, wanted)
        return
    share = _share(nodes, workers, wanted)
    assert share.workers == (workers or share.workers)
    together = placed(nodes, share.cores, share.gpus)
    assert together > 0
    if together >= share.workers:
        assert placed(nodes, share.cores + 1, share.gpus) < share.workers
    else:  # more than there is room for
        assert share.cores == 1
        assert workers is not None
    if wanted is None and any(gpus for _, gpus in nodes):
        assert share.gpus > 0


@pytest.mark.parametrize(
    ("nodes", "tasks", "expected"),
    [
        ([(64, 0.0), (16, 1.0)], None, (4, 4, 0.25)),
        ([(64, 0.0), (16, 1.0)], 1, (1, 16, 1.0)),
        ([(64, 0.0), (16, 4.0)], 3, (3, 5, 1.0)),
        ([(2, 1.0), (64, 0.0)], None, (2, 1, 0.5)),
        ([(4, 0.0)] * 3, 4, (4, 2, 0.0)),
        ([(8, 0.0)], None, (8, 1, 0.0)),
    ],
)
def test_cores_are_counted_where_the_gpus_are(
    nodes: list[tuple[int, float]], tasks: int | None, expected: tuple[int, int, float]
) -> None:
    share = _share(nodes, None, None, tasks)
    assert (share.workers, share.cores, share.gpus) == expected


def test_a_cluster_without_room_is_refused_with_what_it_has() -> None:
    with pytest.raises(ValueError, match="nodes have 0 cores with 1 and 8 cores with 0 GPUs"):
        _share([(0, 1.0), (8, 0.0)], None, None)
    assert _share([(0, 1.0), (8, 0.0)], None, 0.0).workers == 8


@pytest.mark.parametrize(
    ("said", "limit"),
    [("max 100000", math.inf), ("150000 100000", 1), ("50000 100000", 1), ("", math.inf)],
)
def test_cores_are_those_that_a_container_may_use(
    said: str, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_QUOTA", tmp_path / "absent")
    cores = _cores()
    (tmp_path / "cpu.max").write_text(said)
    monkeypatch.setattr(module, "_QUOTA", tmp_path / "cpu.max")
    assert _cores() == min(cores, limit)


def test_a_worker_that_is_out_of_reach_costs_its_evaluation_no_try(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray goes on to place evaluations on a node that is dead until it notices that."""
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    file = tmp_path / "error"
    trial: Any = SimpleNamespace(trial_id="first", pickled_error_file=str(file), max_failures=2)
    nothing: Any = SimpleNamespace()
    search = _TuneSearch(nothing, 1)
    file.write_bytes(cloudpickle.dumps(ActorUnavailableError("socket closed", None)))
    search.failed(trial)
    assert trial.max_failures == 3
    file.write_bytes(cloudpickle.dumps(RayActorError("killed")))
    search.failed(trial)
    assert trial.max_failures == 3
    trial.max_failures = 60
    file.write_bytes(cloudpickle.dumps(ActorUnavailableError("socket closed", None)))
    search.failed(trial)
    assert trial.max_failures == 60, "not for ever"


def test_workers_that_cannot_start_end_a_search_that_has_found_nothing_yet(
    analytic: Any, searcher_of: Any, open_study: Any, tmp_path: Path
) -> None:
    """Later it may be one node that is wrong, and its evaluation is tried elsewhere."""
    file = tmp_path / "error"
    file.write_bytes(cloudpickle.dumps(RayActorError("no such module", actor_init_failed=True)))
    trial: Any = SimpleNamespace(trial_id="first", pickled_error_file=str(file))
    study = open_study()
    search = _TuneSearch(searcher_of(study, analytic, 2), 1)
    outcome = Completed({"loss": 1.0, "macs": 1.0}, 0.0)
    search.suggest("first")
    search.on_trial_complete("first", {"outcome": json.dumps(outcome_to_json(outcome))})
    search.failed(trial)
    study.close()
    nothing: Any = SimpleNamespace()
    with pytest.raises(WorkersFailed, match="the workers cannot start: "):
        _TuneSearch(nothing, 1).failed(trial)

"""Searches on a cluster of several nodes: real ones of Ray, all on this machine."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

import paretoprune.search
from paretoprune.search import Completed
from paretoprune.search.workers import RayWorkers
from paretoprune.surgery import PruningPlan
from tests.toy import by_value, metrics_of, searched, units_of


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and two more nodes, of one core each; one of them says that it has a GPU."""
    with by_value(__name__):
        started = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        started.add_node(num_cpus=1)
        started.add_node(num_cpus=1, num_gpus=1)
        started.wait_for_nodes()
        yield started
        ray.shutdown()
        started.shutdown()


@dataclass
class Evaluation:
    """Writes a line per start into `log`: units, node, GPUs, and where the package lies.

    Attributes:
        log: The file.
        seconds: How long it takes.
        nodes: It waits until so many nodes evaluate.
    """

    log: Path
    seconds: float
    nodes: int

    def __call__(self, plan: PruningPlan, seed: int) -> dict[str, float]:
        node = ray.get_runtime_context().get_node_id()
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or "none"
        with self.log.open("a") as file:
            file.write(f"{units_of(plan)} {node} {gpus} {paretoprune.search.__file__}\n")
        time.sleep(self.seconds)
        limit = time.monotonic() + 300
        while len({line[1] for line in self.lines()}) < self.nodes:
            assert time.monotonic() < limit, "some node does nothing"
            time.sleep(0.1)
        return metrics_of(plan)

    def lines(self) -> list[list[str]]:
        if not self.log.exists():
            return []
        return [line.split(maxsplit=3) for line in self.log.read_text().splitlines()]


@dataclass
class Search:
    """A search in a folder, and what is to happen after some of its records."""

    folder: Path
    trials: int
    seconds: float
    nodes: int = 1
    kill: int = 10**9

    def run(self, workers: RayWorkers, cluster: Cluster | None = None) -> Evaluation:
        """Returns the evaluation after exactly the trials that were asked for completed."""
        evaluation = Evaluation(self.folder / "log", self.seconds, self.nodes)
        finished = 0

        def heard(record: object) -> None:
            nonlocal finished
            finished += 1
            if finished == self.kill and cluster is not None:
                nodes = cluster.list_all_nodes()
                cluster.remove_node(nodes[1], allow_graceful=False)

        records = searched(self.folder, workers, evaluation, self.trials, finished=heard)
        others = [one.outcome for one in records if not isinstance(one.outcome, Completed)]
        assert not others
        return evaluation


def test_workers_share_a_gpu_as_they_are_told(cluster: Cluster, tmp_path: Path) -> None:
    workers = RayWorkers(address=cluster.address, gpus=0.25)
    with pytest.raises(ValueError, match="to have 2 GPUs, but the node with most has 1"):
        Search(tmp_path, 1, 0).run(RayWorkers(address=cluster.address, gpus=2))
    lines = Search(tmp_path, 6, 0.2).run(workers).lines()
    assert len({line[1] for line in lines}) == 1  # of three nodes with one core each
    assert {line[2] for line in lines} == {"0"}


def test_trials_run_on_all_nodes_with_the_driver_s_code_and_a_dead_node_loses_none(
    cluster: Cluster, tmp_path: Path
) -> None:
    search = Search(tmp_path, 24, 0.4, nodes=3, kill=9)
    evaluation = search.run(RayWorkers(address=cluster.address, gpus=0), cluster)
    lines = evaluation.lines()
    nodes = Counter(line[1] for line in lines)
    assert len(nodes) == 3
    sent = {line[3] for line in lines}
    assert all("py_modules" in file for file in sent)
    started = Counter(line[0] for line in lines)
    assert set(started.values()) <= {1, 2}  # what ran on the dead node ran again elsewhere
    assert sum(started.values()) - len(started) <= 1

"""A cluster that does not answer is said at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from paretoprune.search import Problem, search
from paretoprune.search.cluster import reach


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.delenv("RAY_AUTH_MODE")


@pytest.fixture
def port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_nobody_answers(problem: Problem, address: str, port: int) -> None:
    address = address.format(port)
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address}: "):
        search(problem, 0.5, 3, address=address)


def test_a_port_that_cannot_be(port: int) -> None:
    with pytest.raises(ConnectionError, match="no Ray cluster answers at localhost:99999"):
        reach("localhost:99999")


def test_somebody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach(f"127.0.0.1:{server.getsockname()[1]}")
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_token_is_offered(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    reach("auto")
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_cluster_without_workers_is_a_contradiction(problem: Problem) -> None:
    with pytest.raises(ValueError, match="nothing would run on the cluster at auto"):
        search(problem, 0.5, 3, workers=0, address="auto")

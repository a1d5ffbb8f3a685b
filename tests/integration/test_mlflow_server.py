"""A search that is written to a remote MLflow server, a real one on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from paretoprune.experiments.__main__ import main
from paretoprune.experiments.tracking.mlflow_runs import connect

TRIALS = 4


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a new server; it keeps everything in its own folder."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    folder = tmp_path / "server"
    folder.mkdir()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
            "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
            "--artifacts-destination", str(folder / "artifacts"), "--workers", "1",
        ],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    limit = time.monotonic() + 150
    try:
        while not answers(address):
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < limit, "the server does not answer"
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_a_search_is_on_the_server_and_nowhere_else(
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    options = ["--flops", "50%", "--trials", str(TRIALS), "--workers", "0", "--run", "remote"]
    assert main(["search", "digits", *options, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "runs" / "mlflow.db").exists()

    client = connect(server)
    where = json.loads((tmp_path / "runs" / "remote" / "mlflow.json").read_text())
    assert where["uri"] == server
    parent = client.get_run(where["run"])
    assert parent.info.status == "FINISHED"
    children = client.search_runs([where["experiment"]], "tags.kind = 'trial'")
    assert sorted(int(run.data.tags["trial"]) for run in children) == list(range(TRIALS))
    file = client.download_artifacts(where["run"], "pareto/front.json", str(tmp_path))
    assert json.loads(Path(file).read_text())
    assert main(["ui", "remote"]) == 0
    assert f"MLflow at {server} shows remote" in capsys.readouterr().out

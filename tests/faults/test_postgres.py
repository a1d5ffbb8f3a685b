"""A study in PostgreSQL: killed drivers, second drivers, and a server that goes away."""

from __future__ import annotations

import getpass
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from paretoprune.search.study import read_study
from tests.faults.runs import MakeRun, Refusal, ended, kill_at_random


@dataclass
class Server:
    """A server of its own folder, on the loopback address."""

    programs: Path
    folder: Path
    owner: str
    port: int

    @property
    def url(self) -> str:
        return f"postgresql://search:secret@127.0.0.1:{self.port}/postgres"

    def do(self, program: str, *arguments: str) -> None:
        """Runs a program of PostgreSQL, which refuses to be run by root."""
        subprocess.run(
            [str(self.programs / program), *arguments],
            user=self.owner if os.geteuid() == 0 else None,
            cwd=self.folder,
            check=True,
            capture_output=True,
            timeout=120,
        )

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        log = str(self.folder / "log")
        self.do("pg_ctl", "-D", str(self.folder / "data"), "-w", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        self.do("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")


def programs() -> Path | None:
    """Where the server's programs lie: on the path, or where Debian puts them."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A new server; started and stopped by its own folder, which no other server shares."""
    pytest.importorskip("psycopg", reason="needs the extra: pip install 'paretoprune[postgres]'")
    found = programs()
    if found is None:
        pytest.skip("needs PostgreSQL's server, such as Debian's package postgresql")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    owner = "postgres" if os.geteuid() == 0 else getpass.getuser()
    folder = Path(tempfile.mkdtemp(prefix="paretoprune-postgres-"))
    made = Server(found, folder, owner, port)
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, owner)
        password = folder / "password"
        password.write_text("secret")
        password.chmod(0o644)
        made.do(
            "initdb", "-D", str(folder / "data"), "-U", "search", "--no-sync",
            "--auth=scram-sha-256", f"--pwfile={password}",
        )  # fmt: skip
        made.start()
        yield made
        if (folder / "data" / "postmaster.pid").exists():
            made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_study_in_postgres(runs: MakeRun, server: Server) -> None:
    run = runs(12, 0, 0.3)
    run.url = server.url
    kill_at_random(run, 2, random.Random(0))

    run.trials = 400  # more than it will come to
    first = run.start()
    run.wait_for(len(run.started()) + 1, first)
    refused = "another search is running in the database 'postgres'; wait until it ends or stop it"
    assert Refusal.of(run.start()) == Refusal(3, [f"{refused} first."])
    assert first.poll() is None

    server.stop()
    refusal = Refusal.of(first)
    assert refusal.status == 4
    (sentence,) = refusal.lines
    where = f"postgresql://search:***@127.0.0.1:{server.port}/postgres"
    assert sentence.startswith(f"the study in {where} cannot be used (")
    assert sentence.endswith("); the trials that it has are kept.")
    assert "secret" not in sentence
    assert Refusal.of(run.start()).status == 4  # nobody answers

    server.start()
    before, _ = read_study(server.url)
    run.trials = len(before) + 3
    assert ended(run.start()) == 0
    run.check(kills=4)
    after, _ = read_study(server.url)
    assert after[: len(before)] == before


@pytest.mark.slow
def test_the_command_keeps_its_run_when_the_server_goes_away(
    server: Server, tmp_path: Path
) -> None:
    environment = {**os.environ, "PGPASSWORD": "secret", "OMP_NUM_THREADS": "1"}
    where = ["-h", "127.0.0.1", "-p", str(server.port), "-U", "search"]
    subprocess.run(
        [str(server.programs / "createdb"), *where, "one"], env=environment, check=True, timeout=60
    )

    place = ["--quiet", "--runs-dir", str(tmp_path)]

    def command(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "paretoprune.experiments", *arguments, *place],
            env={name: value for name, value in environment.items() if "MLFLOW" not in name},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    url = f"postgresql://search@127.0.0.1:{server.port}/one"
    options = ["--flops", "50%", "--trials", "400", "--workers", "0", "--run", "one"]
    search = command("search", "digits", *options, "--storage", url)
    limit = time.monotonic() + 300
    while len(list((tmp_path / "one" / "evals").glob("*.json"))) < 3:
        assert search.poll() is None, search.communicate()
        assert time.monotonic() < limit, "nothing happens"
        time.sleep(0.1)
    server.stop()
    _, said = search.communicate(timeout=300)
    assert search.returncode == 2
    assert said.splitlines()[0].startswith(f"error: the study in {url} cannot be used (")
    assert len(said.splitlines()) == 1

    server.start()
    file = tmp_path / "one" / "run.json"
    spec = json.loads(file.read_text())
    trials = len(list((tmp_path / "one" / "evals").glob("*.json"))) + 3
    file.write_text(json.dumps({**spec, "trials": trials}))
    resumed = command("resume", "one")
    _, said = resumed.communicate(timeout=200)
    assert (resumed.returncode, said) == (0, "")
    records, _ = read_study(url.replace("search@", "search:secret@"))
    assert [record.number for record in records] == list(range(trials))

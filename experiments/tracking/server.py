"""The MLflow UI over the store of a runs folder, opened on the front of a search."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from paretoprune.experiments.runs import TRACKING_FILE, list_runs, load_run
from paretoprune.experiments.tracking.saved_view import front_link
from paretoprune.experiments.tracking.store import Tracked

_HOST = "127.0.0.1"
_START_SECONDS = 120.0
_END_SECONDS = 3.0


class ServerFailed(RuntimeError):
    """MLflow's server does not come up."""


def tracked(runs_dir: Path, name: str | None) -> Tracked:
    """Returns where a run lies in MLflow; without a name the newest run that was tracked.

    Raises:
        ValueError: If there is no such run, or MLflow has nothing of it.
    """
    for candidate in [name] if name is not None else list_runs(runs_dir):
        folder, spec = load_run(runs_dir, candidate)
        if name is not None or (folder / TRACKING_FILE).exists():
            return Tracked.of(folder, spec)
    raise ValueError(
        f"{runs_dir} holds no run to show; start one with `paretoprune search`, or name the "
        f"folder of your runs with --runs-dir."
    )


def check_port(port: int) -> None:
    """Verifies that a port can be listened on.

    Raises:
        ValueError: If it cannot.
    """
    if not 1 <= port <= 65_535:
        raise ValueError(f"a port is a number from 1 to 65535, but got {port}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            used = error.errno == errno.EADDRINUSE
            reason = "is in use" if used else f"cannot be used ({error.strerror})"
            raise ValueError(f"port {port} {reason}; choose another with --port.") from error


def point_to(found: Tracked, *, browse: bool, say: Callable[[str], None]) -> None:
    """Says where a server that is there already shows a search, and opens it on request."""
    say(f"MLflow at {found.uri} shows {found.name}:\n{found.links(found.uri)}")
    if browse:
        webbrowser.open(front_link(found.uri, found.experiment, found.parent))


def serve(found: Tracked, port: int, *, browse: bool, say: Callable[[str], None]) -> None:
    """Runs MLflow's server on the loopback address until Ctrl-C.

    Args:
        found: What to show.
        port: Port to listen on.
        browse: Whether to open the front in the browser.
        say: Receives the addresses once the server answers.

    Raises:
        ValueError: If the port is in use.
        ServerFailed: If the server does not start.
    """
    check_port(port)
    server = f"http://{_HOST}:{port}"
    with _process(found.uri, port) as (process, log):
        _wait_until_up(process, f"{server}/health", log)
        say(f"MLflow shows {found.name} until Ctrl-C:\n{found.links(server)}")
        if browse:
            webbrowser.open(front_link(server, found.experiment, found.parent))
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()


@contextlib.contextmanager
def _process(uri: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Yields the running server and its log; ends it with its workers."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", _HOST, "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "mlflow.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,  # a server writes into its working folder
                start_new_session=True,
            )
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            yield process, log
        finally:
            signal.signal(signal.SIGTERM, before)
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and its workers; without the force it waits for every browser to leave."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Ends like Ctrl-C, so that the server does not outlive this process."""
    raise KeyboardInterrupt


def _wait_until_up(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise ServerFailed(f"the MLflow server did not start: {(lines or ['no reason'])[-1]}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(health, timeout=5).close()
            return
        time.sleep(0.3)
    raise ServerFailed(f"the MLflow server did not answer within {_START_SECONDS:.0f} s.")

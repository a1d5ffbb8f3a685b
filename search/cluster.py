"""What must be in order before Ray is imported to connect to a cluster."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

_HOST_AND_PORT = re.compile(r"(?:ray://)?(?P<host>[^/:\s]+):(?P<port>\d+)")
_SECONDS = 5.0


def reach(address: str) -> None:
    """Verifies that something answers at the address of a cluster, and offers it our token.

    Left to itself Ray tries for two minutes, and it reads whether to offer a token only when it
    is imported: a cluster that was started with a token refuses a client that does not.

    Args:
        address: `HOST:PORT` or `ray://HOST:PORT`; anything else is left to Ray.

    Raises:
        ConnectionError: If nothing answers.
    """
    parts = _HOST_AND_PORT.fullmatch(address)
    if parts:
        try:
            where = (parts["host"], int(parts["port"]))
            socket.create_connection(where, timeout=_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"no Ray cluster answers at {address}: {error}.") from error
    if (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")

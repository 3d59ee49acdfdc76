"""A probe of network addresses."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def check_listening(address: str, *, timeout_seconds: float) -> None:
    """Connect to an address once, and close the connection.

    Args:
        address: ``HOST:PORT`` or ``SCHEME://HOST:PORT``. An address without host or port, such as ``auto``, is skipped.
        timeout_seconds: Longest wait for the connection.
    Raises:
        OSError: nothing listens there.
        ValueError: the port is not a number from 0 to 65535.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=timeout_seconds).close()

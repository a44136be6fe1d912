"""Ports for servers of the tests."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

PORTS = range(20_000, 32_000, 2)
"""Each with the next one, for enrolment. The kernel gives none of them to connections: they stay free until a server
takes them."""


def free_ports() -> Iterator[int]:
    """Yields ports that nobody listens on, nor on the next one of each."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        try:
            for each in (port, port + 1):
                socket.create_server(("127.0.0.1", each)).close()
        except OSError:
            continue
        yield port


def free_port() -> int:
    """Returns one of them."""
    return next(free_ports())

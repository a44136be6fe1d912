"""Ports for servers of the tests."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)
"""Below those that the kernel gives to connections: one of these stays free until its server takes it."""


def free_port() -> int:
    """Returns a port that nobody listens on, nor on the next one, on which a server takes enrolments."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        try:
            for each in (port, port + 1):
                socket.create_server(("127.0.0.1", each)).close()
        except OSError:
            continue
        return port
    raise RuntimeError(f"no port from {PORTS.start} to {PORTS.stop} is free")

"""Ports for servers of the tests."""

from __future__ import annotations

import os
import random
import socket
from collections import deque
from collections.abc import Iterator

PORTS = range(20_000, 32_000, 2)
"""Each with the next one, for enrolment. The kernel gives none of them to connections: they stay free until a server
takes them."""
MOST_TAKEN = 200
_taken: deque[int] = deque()
"""Descriptors of the newest ports: while a server has not begun, or is restarted, no other test is to draw its port."""


def free_ports() -> Iterator[int]:
    """Yields ports that nobody listens on, nor on the next one of each, and that no other process was given."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        try:
            for each in (port, port + 1):
                socket.create_server(("127.0.0.1", each)).close()
            _take(port)
        except OSError:
            continue
        yield port


def _take(port: int) -> None:
    """Binds the port of UDP with that number, which no server uses: the kernel gives it to one process only."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", port))
        _taken.append(taken.detach())
    if len(_taken) > MOST_TAKEN:
        os.close(_taken.popleft())


def free_port() -> int:
    """Returns one of them."""
    return next(free_ports())

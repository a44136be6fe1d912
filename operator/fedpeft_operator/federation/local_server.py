"""A server on this machine, as a child of a process group."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from fedpeft.api.operator_client import RESPONSE_TIMEOUT_S, OperatorClient
from fedpeft.errors import ServerUnreachable
from fedpeft.process.race import first_of
from fedpeft.rpc import grpc_core
from fedpeft_operator.federation.process_group import ProcessGroup, free_ports

LOOK_PAUSE_S = 0.2
FOR_PEOPLE = ["--log-format", "console"]
"""The logs are read by people, and their last lines are shown when a process dies."""


async def serve(processes: ProcessGroup, folder: Path, port: int = 0, metrics_port: int = 0) -> tuple[str, str]:
    """Starts a server on the loopback interface, in plain text, and waits until it answers.

    Args:
        processes: Its process belongs to them.
        folder: Its data directory.
        port: The server's, 0 for a free one.
        metrics_port: Likewise.

    Returns:
        Its address, and that of its metrics.

    Raises:
        LocalError: If a process of the group ends meanwhile.
        ServerUnreachable: If it does not answer in time.
    """
    free = iter(free_ports(2))
    listen, metrics = f"127.0.0.1:{port or next(free)}", f"127.0.0.1:{metrics_port or next(free)}"
    arguments = ["--data-dir", str(folder), "--listen", listen, "--metrics", metrics]
    processes.start("server", ["-m", "fedpeft_server", *arguments, *FOR_PEOPLE])
    await first_of(_ready(listen), processes.watch())
    return listen, metrics


async def _ready(address: str) -> None:
    """Waits for the server's first answer."""
    grpc_core.configure()
    give_up = time.monotonic() + RESPONSE_TIMEOUT_S
    while True:
        try:
            async with OperatorClient(address, None) as server:
                await server.check()
                return
        except ServerUnreachable:
            if time.monotonic() > give_up:
                raise
        await asyncio.sleep(LOOK_PAUSE_S)

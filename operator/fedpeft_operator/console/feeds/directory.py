"""The runs and clients that there are, asked for regularly while anybody looks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import structlog

from fedpeft.api.operator_client import OperatorClient
from fedpeft.errors import FedpeftError, Unavailable
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_operator.console.feeds.change_signal import ChangeSignal
from fedpeft_operator.console.feeds.disks import DiskFacts, disk_facts
from fedpeft_operator.console.feeds.server_connection import ServerConnection

PAUSE_S = 1.0
"""Pause between two looks, at least `SHARE` times what a look takes: a large federation is not asked all the time."""
SHARE = 10.0
LONGEST_PAUSE_S = 4.0
"""However large it is: with `LOOK_S` of the next look, after so long it is known that the server is away."""

log = structlog.get_logger(__name__)

T = TypeVar("T", run_pb2.Run, pb.Client)


class Directory:
    """The lists of the server as they were at the last look.

    Args:
        connection: Connection to the server.
        signal: Notified when they have changed.
        back: Called when a server that was away is there again.

    Attributes:
        runs: Every run by id, oldest first.
        clients: Every client by id.
        disks: The server's disks; empty if it is too old to say.
        lost: The cause of the last refresh that failed, in a sentence; empty if it succeeded.
        known: True once the server has answered.
        users: Open pages that show the lists.
    """

    def __init__(self, connection: ServerConnection, signal: ChangeSignal, back: Callable[[], None]) -> None:
        self.runs: dict[str, run_pb2.Run] = {}
        self.clients: dict[str, pb.Client] = {}
        self.disks: tuple[DiskFacts, ...] = ()
        self.lost = ""
        self.known = False
        self.users = 0
        self._connection, self._signal, self._back = connection, signal, back
        self._fresh_until = 0.0
        self._refreshing: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps the lists up to date while the block lasts."""
        self.users += 1
        self._wanted.set()
        try:
            yield
        finally:
            self.users -= 1

    async def run(self) -> None:
        """Refreshes the lists repeatedly while a page shows them; never returns."""
        while True:
            if not self.users:
                self._wanted.clear()
                await self._wanted.wait()
            await self.refresh()
            await asyncio.sleep(max(PAUSE_S, self._fresh_until - time.monotonic()))

    async def knows_run(self, run: str) -> bool:
        """Returns True if there is a run; an unknown one is asked for, and one that cannot be asked for may be."""
        await self.refresh(force=run not in self.runs)
        return run in self.runs or bool(self.lost)

    async def knows_client(self, client: str) -> bool:
        """Returns True if a client ever registered, likewise."""
        await self.refresh(force=client not in self.clients)
        return client in self.clients or bool(self.lost)

    async def refresh(self, *, force: bool = False) -> None:
        """Asks the server, unless the last answer is recent; `force` asks all the same.

        A server that is known to be away is asked too, but not waited for: what was known can be shown meanwhile.
        """
        if self._refreshing is None:
            if time.monotonic() < self._fresh_until and not force:
                return
            self._refreshing = asyncio.create_task(self._refresh())
        if force or not self.lost:
            await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        began = time.monotonic()
        before = (self.runs, self.clients, self.disks, self.lost)
        try:
            runs = await self._connection.ask(lambda server: server.runs())
            clients = await self._connection.ask(lambda server: server.clients())
            self.disks = await self._connection.ask(_disks)
            self.runs, self.clients = _by_id(runs), _by_id(clients)
            self.lost, self.known = "", True
        except FedpeftError as error:
            self.lost = error.in_short
        except Exception as error:  # a fault of ours: said on the pages like any other, until the next look
            log.exception("the lists cannot be read")
            self.lost = f"the console cannot read the server's lists: {type(error).__name__}: {error}"
        finally:
            self._refreshing = None
        now = time.monotonic()
        # What a look at a server that is away takes says nothing about the federation's size.
        pause_s = PAUSE_S if self.lost else min(max(PAUSE_S, SHARE * (now - began)), LONGEST_PAUSE_S)
        self._fresh_until = now + pause_s
        if before[-1] and not self.lost:
            self._back()
        if before != (self.runs, self.clients, self.disks, self.lost):
            self._signal.notify()


async def _disks(server: OperatorClient) -> tuple[DiskFacts, ...]:
    try:
        return disk_facts(await server.storage())
    except Unavailable:
        raise
    except FedpeftError:  # of a server that has no such call
        return ()


def _by_id(items: Sequence[T]) -> dict[str, T]:
    return {item.id: item for item in items}

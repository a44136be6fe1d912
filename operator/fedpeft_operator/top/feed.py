"""State that `fedpeft top` shows, kept up to date through restarts of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from fedpeft.api.following import RunSnapshot, follow
from fedpeft.api.operator_client import Connect, for_looking
from fedpeft.errors import FedpeftError, PermissionDenied, RunNotFound, Unauthenticated
from fedpeft.v1 import operator_service_pb2, run_pb2

EVERY_S = 2.0
"""Pause between two looks at all runs and clients; the chosen run is watched, which needs no looking."""
PAUSE_SHARE = 10
"""The pause is at least so many times as long as the look took: of many clients it is dozens of pages."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0


class Feed:
    """Runs, clients and one run in full.

    Attributes:
        runs: All runs, oldest first.
        clients: All clients, by id.
        snapshot: The run that is watched; None until it is known.
        answered: True once the server has said which runs and clients there are.
        lost: Cause of a lost connection, in a sentence; empty while there is one.
        refused: Reason why the server does not let this operator in, in a sentence; empty while it does.

    Args:
        connect: Makes a client of the server.
        changed: Called after every change.
    """

    def __init__(self, connect: Connect, changed: Callable[[], None]) -> None:
        self._connect = for_looking(connect)
        self._changed = changed
        self.runs: list[run_pb2.Run] = []
        self.clients: list[operator_service_pb2.Client] = []
        self.snapshot: RunSnapshot | None = None
        self.answered = False
        self.lost = self.refused = ""

    async def survey(self) -> None:
        """Looks at all runs and clients again and again, for ever."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async with self._connect() as server:
                    while not server.is_stale:
                        began = time.monotonic()
                        self.runs, self.clients = await server.runs(), await server.clients()
                        took_s = time.monotonic() - began
                        self._found()
                        pause_s = FIRST_PAUSE_S
                        await asyncio.sleep(max(EVERY_S, PAUSE_SHARE * took_s))
            except FedpeftError as error:
                self._lose(error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def watch(self, run: str) -> None:
        """Follows one run until it is over, or deleted: `snapshot` is None then."""
        self.snapshot = next((RunSnapshot(known) for known in self.runs if known.id == run), None)
        self._changed()
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async for snapshot in follow(self._connect, run):
                    if not snapshot.lost:
                        self.snapshot, pause_s = snapshot, FIRST_PAUSE_S
                        self._changed()
                return
            except RunNotFound:
                self._forget(run)
                return
            except FedpeftError as error:
                self._lose(error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def pause(self, run: str) -> None:
        """Lets no new round open."""
        async with self._connect() as server:
            await server.pause(run, "paused in fedpeft top")

    async def resume(self, run: str) -> None:
        """Lets rounds open again."""
        async with self._connect() as server:
            await server.resume(run)

    async def stop(self, run: str) -> None:
        """Ends a run for good."""
        async with self._connect() as server:
            await server.stop(run, "stopped in fedpeft top")

    def _found(self) -> None:
        self.answered, self.lost, self.refused = True, "", ""
        if self.snapshot is not None and all(run.id != self.snapshot.run.id for run in self.runs):
            self.snapshot = None
        self._changed()

    def _forget(self, run: str) -> None:
        """Drops a run that was deleted."""
        self.runs, self.snapshot = [each for each in self.runs if each.id != run], None
        self._changed()

    def _lose(self, error: FedpeftError) -> None:
        is_refusal = isinstance(error, PermissionDenied | Unauthenticated)
        self.lost, self.refused = ("", error.in_short) if is_refusal else (error.in_short, "")
        self._changed()

"""Tells the other daemons on the database who waits here and how far clients are, and keeps what they tell of that.

Nothing of it is written: it passes as notices. A daemon tells who came and went since it told last, and every second
that it is there; one that hears of a daemon it does not know asks it for everybody who waits there. A daemon that was
not heard for some seconds is gone, and nobody waits with it any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog

from fedpeft.errors import FedpeftError
from fedpeft_server.background import Background
from fedpeft_server.runs.lobby import Lobby
from fedpeft_server.runs.progress import Report
from fedpeft_server.runs.progress_watch import ProgressWatch
from fedpeft_server.sharing.seats import Seat
from fedpeft_server.store.notices.notices import Notice, Topic
from fedpeft_server.store.store import Store
from fedpeft_server.timing import Timing

log = structlog.get_logger()


class Presence:
    """The other daemons, and the clients that wait with them.

    Args:
        store: Its database tells the others.
        lobby: The clients that wait here, and those elsewhere.
        progress: Progress of the clients that hold tickets.
        uploading: Returns the clients whose updates are arriving here.
        background: Watches over the telling.
        timing: Pauses, and time after which a daemon is gone.
    """

    def __init__(
        self,
        store: Store,
        lobby: Lobby,
        progress: ProgressWatch,
        uploading: Callable[[], list[str]],
        background: Background,
        timing: Timing,
    ) -> None:
        self._store = store
        self._lobby = lobby
        self._progress = progress
        self._uploading = uploading
        self._background = background
        self._timing = timing
        self._heard: dict[str, float] = {}  # the other daemons, by id: when they were heard last, monotonic
        self._asked: set[str] = set()  # those that are to be asked who waits there
        self._greets = True
        self._tells_all = True
        self._has_left = False

    def began(self) -> None:
        """Begins anew, for what was told before may be lost: everybody is asked, and told."""
        for daemon in list(self._heard):
            self._forget(daemon)
        self._greets = self._tells_all = True
        self._lobby.moved.set()

    def heard(self, notice: Notice) -> None:
        """Takes up what another daemon tells; any word of it says that it is there."""
        daemon = notice.sender
        if daemon not in self._heard and notice.topic not in (Topic.ALL_SEATS, Topic.BYE):
            self._asked.add(daemon)
            self._lobby.moved.set()
            self._welcome(daemon)
        self._heard[daemon] = time.monotonic()
        match notice.topic:
            case Topic.HELLO if not notice.keys or self._store.db.transactions.notices.sender in notice.keys:
                self._tells_all = True
                self._lobby.moved.set()
            case Topic.ALL_SEATS:
                self._lobby.vacate(daemon)
            case Topic.SEATS:
                self._lobby.seat_elsewhere(daemon, map(_seat, notice.keys))
            case Topic.ALIVE:
                self._progress.upload_elsewhere(daemon, notice.keys)
            case Topic.PROGRESS:
                for ticket, *report in notice.keys:
                    self._progress.follow_report(ticket, Report(*report))
            case Topic.BYE:
                self._forget(daemon)

    async def tell(self) -> None:
        """Tells the others, without end, who waits here and that this daemon is there."""
        pause_s, alive_at = self._timing.daemon_alive_s, 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, alive_at + pause_s - time.monotonic())):
                    await self._lobby.moved.wait()
            await asyncio.sleep(self._timing.notices_gather_s)
            self._lobby.moved.clear()
            self._expire()
            if self._has_left:
                alive_at = time.monotonic()
                continue
            told = False
            with self._background.attempt("seats"):
                if time.monotonic() >= alive_at + pause_s:
                    alive_at = time.monotonic()
                    await self._tell_progress()
                await self._tell_news()
                told = True
            if not told:  # some of it may be lost
                self._tells_all = True
                await asyncio.sleep(self._timing.listen_retry_s)

    async def leave(self) -> None:
        """Tells the others that nobody waits here any more, if they can be told."""
        self._has_left = True
        with suppress(FedpeftError):
            await self._tell(Topic.BYE)

    async def _tell_progress(self) -> None:
        await self._tell(Topic.ALIVE, self._uploading())
        if reports := self._progress.take_reports():
            await self._tell(Topic.PROGRESS, [(ticket, *report) for ticket, report in reports.items()])

    async def _tell_news(self) -> None:
        if self._greets:
            await self._tell(Topic.HELLO)
            self._greets = False
        elif self._asked:
            asked = sorted(self._asked)
            await self._tell(Topic.HELLO, asked)
            self._asked.difference_update(asked)
        if self._tells_all:
            self._tells_all = False
            seats: Mapping[str, Seat | None] = self._lobby.seats()
            await self._tell(Topic.ALL_SEATS)
        else:
            seats = self._lobby.take_moved()
        if seats:
            await self._tell(Topic.SEATS, [_key(client, seat) for client, seat in seats.items()])

    async def _tell(self, topic: Topic, keys: Sequence[Any] = ()) -> None:
        await self._store.transact(self._store.db.tell, topic, keys)

    def _expire(self) -> None:
        gone = time.monotonic() - self._timing.daemon_gone_s
        for daemon in [daemon for daemon, at in self._heard.items() if at < gone]:
            log.warning("another server on this database is gone", server=daemon)
            self._forget(daemon)

    def _forget(self, daemon: str) -> None:
        self._heard.pop(daemon, None)
        self._lobby.vacate(daemon)
        self._progress.upload_elsewhere(daemon, ())

    def _welcome(self, daemon: str) -> None:
        log.info("another server is on this database", server=daemon)
        here = [place.name for place in self._store.places if place.is_folder]
        if here or len(self._store.places) == 1:
            log.error(
                "other servers on this database do not reach the updates or versions here, unless the folder is "
                "shared; name an object store",
                places=here or ["--updates"],
            )


def _key(client: str, seat: Seat | None) -> list[Any]:
    return [client] if seat is None else [client, seat.run, sorted(seat.left_out)]


def _seat(key: Sequence[Any]) -> tuple[str, Seat | None]:
    client, *rest = key
    return client, Seat(rest[0], frozenset(rest[1])) if rest else None

"""Tells the other daemons on the database who waits here and how far clients are, and keeps what they tell of that.

Nothing of it is written: it passes as notices. A daemon tells who came and went since it told last, and every second
that it is there; one that hears of a daemon it does not know asks it for everybody who waits there. A daemon that was
not heard for some seconds is gone, and nobody waits with it any more.

Daemons that keep files in different places cannot hold one federation: the one that began later ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog

from fedpeft.errors import FedpeftError, SettingsInvalid
from fedpeft_server.background import Background
from fedpeft_server.daemons.setup import Setup
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
        kept: Flags that say which files are kept.
        background: Watches over the telling.
        timing: Pauses, and time after which a daemon is gone.
    """

    def __init__(
        self,
        store: Store,
        lobby: Lobby,
        progress: ProgressWatch,
        uploading: Callable[[], list[str]],
        kept: str,
        background: Background,
        timing: Timing,
    ) -> None:
        self._store = store
        self._lobby = lobby
        self._progress = progress
        self._uploading = uploading
        self._kept = kept
        self._setup: Setup | None = None
        self._setups: dict[str, Setup] = {}  # of the others, as they were last told
        self._background = background
        self._timing = timing
        self._heard: dict[str, float] = {}  # the other daemons, by id: when they were heard last, monotonic
        self._asked: set[str] = set()  # those that are to be asked who waits there
        self._greets = True
        self._tells_all = True
        self._has_left = False
        if store.db.is_shared:
            store.agreed.clear()

    async def agree(self) -> None:
        """Tells the others, once, where this daemon keeps files, and lets rounds be folded after they could object."""
        if self._setup is not None:
            return
        try:
            places = await self._store.version(self._store.identities)
        except FedpeftError as error:  # it is tried again
            log.warning("no round is folded here until the places of files answer", message=error.message)
            return
        self._setup = Setup(self._store.clock.time(), places, self._kept)
        self._greets = self._tells_all = True  # what the others told before was compared with nothing
        self._lobby.moved.set()
        await asyncio.sleep(self._timing.daemons_object_s)
        self._store.agreed.set()

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
            log.info("another server is on this database", server=daemon)
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
            case Topic.SETUP:
                self._compare(daemon, Setup.of(notice.keys))

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
            if self._setup is not None:
                await self._tell(Topic.SETUP, self._setup.keys())
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
        self._setups.pop(daemon, None)
        self._lobby.vacate(daemon)
        self._progress.upload_elsewhere(daemon, ())

    def _compare(self, daemon: str, theirs: Setup) -> None:
        """Ends this daemon if another one was there before it and keeps files elsewhere."""
        own = self._setup
        if own is None or self._setups.get(daemon) == theirs:
            return
        self._setups[daemon] = theirs
        for here, there in own.other_places(theirs):
            if (own.since, self._store.db.transactions.notices.sender) < (theirs.since, daemon):
                log.error("another server on this database keeps files elsewhere, and ends", here=here, there=there)
                continue
            self._background.give_up(
                SettingsInvalid(
                    f"{here}: another server on this database, which was there before, has {there}; all of them keep "
                    "adapter versions and updates in the same places: name that one, or another --database"
                )
            )
        if own.kept != theirs.kept:
            log.warning(
                "another server on this database keeps other files; what one removes is gone for all",
                here=own.kept,
                there=theirs.kept,
            )


def _key(client: str, seat: Seat | None) -> list[Any]:
    return [client] if seat is None else [client, seat.run, sorted(seat.left_out)]


def _seat(key: Sequence[Any]) -> tuple[str, Seat | None]:
    client, *rest = key
    return client, Seat(rest[0], frozenset(rest[1])) if rest else None

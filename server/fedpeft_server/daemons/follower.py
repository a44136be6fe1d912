"""Takes up what other daemons on the database change: a notice says what to read anew, and what follows is done here.

Notices are taken up in their order, those of one kind together. Whenever listening began anew, and whenever something
could not be read, everything is looked at that another daemon may have changed; and once in a while the revisions of
the runs that go on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from operator import attrgetter
from typing import Any, Protocol

import structlog

from fedpeft.errors import DatabaseUnavailable, RunNotFound
from fedpeft.identity.subject import Subject
from fedpeft_server.access.admission import Admission
from fedpeft_server.background import Background
from fedpeft_server.daemons.presence import Presence
from fedpeft_server.rpc.sessions import Sessions
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.runs.runs import Runs
from fedpeft_server.store.notices.notices import Notice, Topic
from fedpeft_server.store.rows import SERVER, AnswerRow, ClientRow, IdentityRow
from fedpeft_server.store.store import Store
from fedpeft_server.timing import Timing

log = structlog.get_logger()

EVALUATOR = "evaluator"
_PASSING = frozenset({Topic.HELLO, Topic.ALIVE, Topic.PROGRESS, Topic.SEATS, Topic.ALL_SEATS, Topic.BYE, Topic.SETUP})
SHARE = 1
"""Others' changes are taken up again after so many times as long as it took: this daemon has work of its own."""


class Dismiss(Protocol):
    """Takes seat and tickets from somebody who is refused from now on."""

    async def __call__(self, subject: Subject, by: str, reason: str) -> int:
        """Does it; returns how many tickets were open."""


class Follower:
    """Keeps what this daemon knows as others make it.

    Args:
        store: The database.
        runs: The runs.
        sessions: Sessions of the clients.
        admission: Knows who is refused.
        dismiss: Takes seat and tickets from somebody who is refused from now on.
        presence: The other daemons.
        background: Watches over the following.
        timing: Pauses.
    """

    def __init__(
        self,
        store: Store,
        runs: Runs,
        sessions: Sessions,
        admission: Admission,
        dismiss: Dismiss,
        presence: Presence,
        background: Background,
        timing: Timing,
    ) -> None:
        self._store = store
        self._runs = runs
        self._sessions = sessions
        self._admission = admission
        self._dismiss = dismiss
        self._presence = presence
        self._background = background
        self._timing = timing
        self._news = asyncio.Event()
        self._notices: list[Notice] = []
        self._everything = False
        self._handlers: Mapping[Topic, Callable[[Sequence[Any]], Awaitable[None]]] = {
            Topic.RUN: self._follow_runs,
            Topic.CLIENT: self._follow_clients,
            Topic.ANSWER: self._follow_answers,
            Topic.IDENTITY: self._follow_identities,
            Topic.SCORED: self._follow_scores,
            Topic.EVALUATOR: self._follow_evaluators,
            Topic.REMOVED: self._follow_removals,
        }

    def began(self) -> None:
        """Has everything looked at: what others told before may be lost."""
        self._presence.began()
        self._everything = True
        self._news.set()

    def heard(self, notice: Notice) -> None:
        """Takes a notice of another daemon."""
        self._presence.heard(notice)
        if notice.topic not in _PASSING:
            self._notices.append(notice)
            self._news.set()

    async def follow(self) -> None:
        """Takes up what was heard, without end."""
        while True:
            await self._news.wait()
            self._news.clear()
            began, done = time.monotonic(), False
            everything, self._everything = self._everything, False
            notices, self._notices = self._notices, []
            with self._background.attempt("notices"):
                if everything:
                    await self._follow_everything()
                for topic, keys in _merged(notices):
                    if self._background.fault is None:
                        await self._handlers[topic](keys)
                done = True
            if not done:
                self._everything = True
                self._news.set()
                await asyncio.sleep(self._timing.listen_retry_s)
            await asyncio.sleep(min(self._timing.daemon_alive_s, SHARE * (time.monotonic() - began)))

    async def check_runs(self) -> None:
        """Looks at the revisions of the runs that go on, and whether the database is as new as it was."""
        await self._look_at_runs(active=True)

    async def _look_at_runs(self, *, active: bool) -> None:
        found = await self._store.transact(self._store.db.revisions, active=active)
        # A run may be over here, and go on in a database that is older than it was.
        behind = [e for run, revision in found.items() if (e := self._runs.find(run)) and revision < e.run.revision]
        await asyncio.gather(*map(self._give_up_if_older, behind))
        if await self._store.transact(self._store.db.transactions.went_back):
            self._give_up("an entry of the audit log that it has seen is not there any more")
        if self._background.fault is None:
            await self._runs.follow_all(found, active=active)

    async def _give_up_if_older(self, engine: RunEngine) -> None:
        """Pauses a run that the database has an older state of than is known here, and has the server end.

        Its commands may wait for an object store; this one comes to its turn though nobody waits for it any more.
        """

        async def look() -> None:
            if await engine.actor.pause_older():
                self._give_up(f"{engine.run.id} went back; such runs are paused where rounds were going on")

        with suppress(RunNotFound, TimeoutError):  # it was deleted meanwhile
            async with asyncio.timeout(self._timing.follow_run_s):
                await engine.actor.call(look)

    def _give_up(self, evidence: str) -> None:
        """Has the server end, once, because the database is older than it was."""
        known = "the database is older than it was, and what this server knows of it is of no use any more"
        if self._background.fault is None:
            self._background.give_up(DatabaseUnavailable(f"{known}: {evidence}; start it again"))

    async def _follow_everything(self) -> None:
        db = self._store.db
        await self._look_at_runs(active=False)
        if self._background.fault is not None:
            return  # nor is anything else taken up of a database that is older: a revoked certificate would count again
        await self._take_up_clients(await self._store.read(db.clients))
        answers, known = await self._store.read(db.answers), self._runs.participation.answer
        await self._take_up_answers([a for a in answers if not _is_same(known(a.run, a.client), a)])
        identities = await self._store.read(db.identities.after, ("", ""))
        refused_until = self._admission.refused_until
        await self._take_up_identities([i for i in identities if refused_until(i.subject) != i.refused_until])
        self._runs.scoring.reread_all()

    async def _follow_runs(self, keys: Sequence[Any]) -> None:
        for run in dict.fromkeys(keys):
            await self._runs.follow(run)

    async def _follow_clients(self, keys: Sequence[Any]) -> None:
        clients = list(dict.fromkeys(keys))
        await self._take_up_clients(await self._store.transact(self._store.db.clients_named, clients))

    async def _take_up_clients(self, rows: Sequence[ClientRow]) -> None:
        for row in rows:
            if (registered := self._sessions.follow(row)) is not None:
                self._runs.follow_registration(registered.client, registered.before, registered.role)

    async def _follow_answers(self, keys: Sequence[Any]) -> None:
        pairs = list(dict.fromkeys(keys))
        await self._take_up_answers(await self._store.transact(self._store.db.answers_of, pairs))

    async def _take_up_answers(self, answers: Sequence[AnswerRow]) -> None:
        for answer in answers:
            if self._runs.find(answer.run) is None:
                await self._runs.follow(answer.run)
            if (engine := self._runs.find(answer.run)) is None:
                continue  # it was deleted meanwhile
            self._runs.follow_answer(answer)
            if self._sessions.known_role(answer.client) == EVALUATOR:
                scoring = self._runs.scoring
                (scoring.takes_part if answer.accepted else scoring.leaves)(answer.run, answer.client)
                self._runs.show_backlog(engine)
            if not answer.accepted and engine.open_ticket(answer.client):
                self._background.begin("notices", self._withdraw(answer))

    async def _withdraw(self, answer: AnswerRow) -> None:
        """Gives up a ticket of a client that declined its run, if the daemon that it told did not know of it."""
        await asyncio.sleep(self._timing.daemon_alive_s)
        with self._background.attempt("notices"):
            engine = self._runs.find(answer.run)
            ticket = engine.open_ticket(answer.client) if engine else None
            if engine and ticket and self._runs.participation.declined(answer.run, answer.client):
                await engine.withdraw(ticket, "; ".join(answer.reasons), SERVER)

    async def _follow_identities(self, keys: Sequence[Any]) -> None:
        subjects = [Subject(role, name) for role, name in dict.fromkeys(keys)]
        found = [await self._store.transact(self._store.db.identities.of, subject) for subject in subjects]
        await self._take_up_identities([row for row in found if row is not None])

    async def _take_up_identities(self, rows: Sequence[IdentityRow]) -> None:
        for row in rows:
            self._admission.know(row)
            if row.is_revoked:
                self._admission.revoke(row.subject)
                log.warning("identity revoked with another server", subject=str(row.subject), reason=row.reason)
                self._background.begin("notices", self._forget_revoked(row))

    async def _forget_revoked(self, row: IdentityRow) -> None:
        await asyncio.sleep(self._timing.daemon_alive_s)  # the daemon that revoked it is to withdraw its tickets
        with self._background.attempt("notices"):
            if self._admission.is_refused(row.subject):
                await self._dismiss(row.subject, SERVER, "its certificate was revoked")

    async def _follow_scores(self, keys: Sequence[Any]) -> None:
        newest: dict[str, int] = {}
        for run, version, evaluator, _ in keys:
            self._runs.scoring.note_scored(run, evaluator, version)
            newest[run] = max(version, newest.get(run, 0))
        for run, version in newest.items():
            await self._runs.show_scores(run, version)

    async def _follow_evaluators(self, keys: Sequence[Any]) -> None:
        for evaluator in dict.fromkeys(keys):
            self._runs.scoring.reread(evaluator)
            for run in self._runs.scoring.runs_of(evaluator):
                self._runs.watchers.announce(run)

    async def _follow_removals(self, keys: Sequence[Any]) -> None:
        versions: dict[str, list[int]] = {}
        for run, version in keys:
            versions.setdefault(run, []).append(version)
        for run, removed in versions.items():
            self._runs.note_removed(run, removed)
            self._store.soon(self._store.download_cache.forget_versions, run, removed)  # waits for no fold


def _merged(notices: Sequence[Notice]) -> Iterator[tuple[Topic, list[Any]]]:
    """Yields the keys of notices of one kind in a row together; runs first, each once: their order says nothing."""
    runs = [key for notice in notices if notice.topic is Topic.RUN for key in notice.keys]
    if runs:
        yield Topic.RUN, runs
    rest = [notice for notice in notices if notice.topic is not Topic.RUN]
    for topic, same in groupby(rest, attrgetter("topic")):
        yield topic, [key for notice in same for key in notice.keys]


def _is_same(known: AnswerRow | None, answer: AnswerRow) -> bool:
    return known is not None and (known.accepted, known.at) == (answer.accepted, answer.at)

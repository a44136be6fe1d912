"""Admission: whether a call may be made, asked before its handler and again with every message that is sent.

Notable: a revocation does not wait for the next message. The calls of the one that was revoked are ended where they
stand, whatever they wait for.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any

from fedpeft.errors import (
    CertificateInvalid,
    CertificateMissing,
    CertificateRevoked,
    Draining,
    FedpeftError,
    RoleMayNot,
)
from fedpeft.identity.audit import Detail
from fedpeft.identity.subject import Role, Subject
from fedpeft.rpc.wire import CLIENT_KEY
from fedpeft_server.access.call import LOCAL, Call, Caller, Party, caller_of
from fedpeft_server.access.pacing import Pacing
from fedpeft_server.access.peers import FORWARDED_KEY, address_of
from fedpeft_server.access.rights import RIGHTS
from fedpeft_server.access.throttle import Throttle
from fedpeft_server.store.rows import AuditEvent, IdentityRow
from fedpeft_server.store.store import Store
from fedpeft_server.timing import Timing

Context = Any
"""gRPC's context of a call, of which the connection and the metadata are looked at."""

MOST_NAME = 64
"""Characters of a client's id."""

WITHOUT_END = frozenset(
    {
        "/fedpeft.v1.OperatorService/WatchRun",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)
"""Calls that wait for news as long as their caller likes; a server that shuts down ends them."""


class Admission:
    """Knows who is refused, and which calls are under way.

    Args:
        store: Store in which callers and refusals are written.
        known: The identities of the database.
        timing: Delays of calls and refusals, and the time for which a refusal is not written again.
        secured: True if the server has certificates; without, everybody may do everything but enroll.
        enrolls: True if it issues those of the callers, so that one who was revoked is told how to come back.
    """

    def __init__(
        self, store: Store, known: Iterable[IdentityRow], timing: Timing, *, secured: bool, enrolls: bool
    ) -> None:
        self._store = store
        self._secured = secured
        self._enrolls = enrolls
        self._known: set[Subject] = set()  # to be in the database
        self._refused_until: dict[Subject, float] = {}
        for row in known:
            self.know(row)
        self._open: dict[Subject | None, dict[asyncio.Task[object], Call]] = defaultdict(dict)
        self._draining = False
        self._refusals: Throttle[tuple[str, str, str]] = Throttle(timing.refusal_quiet_s)
        self._pacing = Pacing(timing)

    @asynccontextmanager
    async def paced(self, call: Call, context: Context) -> AsyncIterator[None]:
        """Counts a call for its caller as long as the block lasts, and says in it who makes it.

        Raises:
            CertificateInvalid: If its certificate names nobody.
            TooManyCalls: If its caller makes too many.
        """
        call.party = Party(None, _address(context))  # until more is known
        try:
            call.caller = caller_of(context.auth_context()) if self._secured else LOCAL
        except CertificateInvalid:
            async with self._pacing.paced(call.party, call.method):
                raise
        call.party = _party(call.caller, context)
        async with self._pacing.paced(call.party, call.method):
            yield

    @asynccontextmanager
    async def admitted(self, call: Call, context: Context) -> AsyncIterator[None]:
        """Admits a call for as long as the block lasts.

        Raises:
            TooManyCalls: If its caller makes too many.
            CertificateMissing: If it needs a certificate and has none.
            CertificateInvalid: If its certificate names nobody.
            CertificateExpired: If its certificate has ended.
            CertificateRevoked: If its name was revoked, before the block or in it, and this certificate is refused.
            RoleMayNot: If its role has no right to it.
            NameInUse: If it makes its first call and its name is the id of another.
            Draining: If the server shuts down, before the block or in it, and the call has no end of its own.
            DiskFull: If it makes its first call and cannot be written down; likewise StateInvalid.
        """
        async with self.paced(call, context):
            self.check(call)
            if self._draining and call.method in WITHOUT_END:
                raise _draining()
            with self._opened(call):
                if call.caller.subject:
                    await self._write_down(call.caller.subject)
                yield

    @contextmanager
    def _opened(self, call: Call) -> Iterator[None]:
        """Makes a call one that can be ended, for as long as the block lasts.

        Raises:
            FedpeftError: What it was ended with.
        """
        subject, task = call.caller.subject, asyncio.current_task()
        assert task is not None
        self._open[subject][task] = call
        try:
            yield
        except asyncio.CancelledError:
            if call.ended:
                task.uncancel()
                raise call.ended from None
            raise
        finally:
            del self._open[subject][task]
            if not self._open[subject]:
                del self._open[subject]

    async def delay_refusal(self) -> None:
        """Holds a refusal back, so that who repeats at once what cost the server something does so seldom."""
        await self._pacing.delay_refusal()

    def check(self, call: Call) -> None:
        """Checks whether a call may be made, or go on.

        Raises:
            FedpeftError: As `admitted`.
        """
        caller = call.caller
        if caller.plain:
            return
        role = caller.subject.role if caller.subject else None
        allowed = RIGHTS.get(call.method, frozenset())
        caller.check_time()
        if caller.subject and caller.begins_at <= self.refused_until(caller.subject):
            raise self._revocation(caller.subject, caller.begins_at)
        if role in allowed:
            return
        name = call.method.rpartition("/")[2]
        if role is None:
            raise CertificateMissing(f"{name} needs a certificate; this port only enrolls devices: call the other one")
        may = " or ".join(sorted(each for each in allowed if each))
        raise RoleMayNot(f"{name} may be called by {may or 'nobody'}, not by {caller}")

    def revoke(self, subject: Subject, sparing: asyncio.Task[object] | None = None) -> None:
        """Refuses a subject whatever it brings, and ends its calls, before and after that is written.

        Before, for nothing may slip in meanwhile; after, for a restoration may have come between.

        Args:
            subject: Subject that is refused.
            sparing: The call that asked for it, which is still answered.
        """
        self._refused_until[subject] = math.inf
        for task, call in self._open.get(subject, {}).items():
            if task is not sparing:
                _end(task, call, self._revocation(subject, call.caller.begins_at))

    def drain(self) -> None:
        """Ends the calls that have no end of their own, and takes no more of them: the server shuts down."""
        self._draining = True
        for calls in self._open.values():
            for task, call in calls.items():
                if call.method in WITHOUT_END:
                    _end(task, call, _draining())

    def know(self, row: IdentityRow) -> None:
        """Takes up what the database has of somebody."""
        self._known.add(row.subject)
        self._refused_until[row.subject] = row.refused_until

    def refused_until(self, subject: Subject) -> float:
        """Returns up to when certificates of a subject begin that are refused; infinite if all are."""
        return self._refused_until.get(subject, -math.inf)

    def is_refused(self, subject: Subject) -> bool:
        """Returns True if a subject is refused whatever it brings."""
        return self.refused_until(subject) == math.inf

    def take_back(self, subject: Subject, refused_until: float) -> None:
        """Takes back a revocation that was not written; `refused_until` is what was known before it."""
        self._refused_until[subject] = refused_until

    async def refused(self, call: Call, error: FedpeftError, peer: str) -> None:
        """Writes a refusal into the audit log, unless the same one was written a moment ago."""
        unsaid = self._refusals.suppressed((str(call.caller), error.reason, call.method))
        if unsaid is not None:
            words: dict[str, Detail] = {"reason": error.reason, "message": error.message}
            audit_event = AuditEvent(
                str(call.caller), "call.refused", call.method, {**words, "peer": peer, "unsaid_before": unsaid}
            )
            await self._store.transact(self._store.db.transactions.write, audit_event)

    async def _write_down(self, subject: Subject) -> None:
        """Sees to it that whoever is let in is in the database, and so can be listed and revoked."""
        if subject not in self._known:
            await self._store.transact(self._store.db.identities.seen, subject)
            self._known.add(subject)

    def _revocation(self, subject: Subject, begins_at: float) -> CertificateRevoked:
        until, whose = self.refused_until(subject), f"the certificates of {subject}"
        who = "the operator" if subject.role in (Role.CLIENT, Role.EVALUATOR) else "another operator"
        token = f"ask {who} for a new enrolment token, and enroll anew with it"
        if until < math.inf:
            another = token if self._enrolls else "get one that begins later"
            return CertificateRevoked(
                f"{whose} that begin before {_moment(until)} were revoked, and this one begins at "
                f"{_moment(begins_at)}; {another}"
            )
        another = token if self._enrolls else f"ask {who} to restore the name, then get another certificate"
        return CertificateRevoked(f"{whose} were revoked; {another}")


def _moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _party(caller: Caller, context: Context) -> Party:
    """Returns whom the calls of a caller are counted for."""
    if caller.subject:
        return Party(caller.subject.role, caller.subject.name)
    if not caller.plain:
        return Party(None, _address(context))
    claimed = str(dict(context.invocation_metadata() or ()).get(CLIENT_KEY, ""))[:MOST_NAME]
    return Party(Role.CLIENT, claimed) if claimed else Party(Role.OPERATOR, str(caller))


def _address(context: Context) -> str:
    return address_of(peer_of(context))


def peer_of(context: Context) -> str:
    """Returns where a call comes from; one to the port for enrolment was forwarded, with a note of that."""
    peer = str(context.peer())
    if not peer.startswith("unix:"):
        return peer
    return str(dict(context.invocation_metadata() or ()).get(FORWARDED_KEY, peer))


def _end(task: asyncio.Task[object], call: Call, error: FedpeftError) -> None:
    call.ended = error
    task.cancel()


def _draining() -> Draining:
    return Draining("the server is shutting down; try again after a pause")

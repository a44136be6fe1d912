"""Admission: whether a call may be made, asked before its handler and again with every message that is sent.

Notable: a revocation does not wait for the next message. The calls of the one that was revoked are ended where they
stand, whatever they wait for.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from fedpeft.audit import Detail
from fedpeft.errors import CertificateMissing, CertificateRevoked, FedpeftError, RoleMayNot
from fedpeft.identity.subject import Role, Subject
from fedpeft_server.access.rights import RIGHTS
from fedpeft_server.call import LOCAL, Call, Properties, caller_of
from fedpeft_server.store.rows import Deed, IdentityRow
from fedpeft_server.store.store import Store

QUIET_S = 60.0
"""The same refusal of the same caller is in the audit log once in so long: it must not be a way to fill the disk."""
MOST_REFUSALS = 1000
"""Kinds of refusals that are remembered for that."""


class Admission:
    """Knows who was revoked, and which calls are under way.

    Args:
        store: Where who called and who was refused is written.
        known: The identities of the database.
        secured: Whether the server has certificates; without, everybody may do everything but enroll.
    """

    def __init__(self, store: Store, known: Iterable[IdentityRow], *, secured: bool) -> None:
        self._store = store
        self._secured = secured
        self._known: set[Subject] = set()  # to be in the database
        self._revoked: dict[Subject, float] = {}
        for row in known:
            self._known.add(row.subject)
            if row.revoked_at is not None:
                self._revoked[row.subject] = row.revoked_at
        self._open: dict[Subject, dict[asyncio.Task[object], Call]] = defaultdict(dict)
        self._refusals: dict[tuple[str, str, str], tuple[float, int]] = {}

    @asynccontextmanager
    async def admitted(self, call: Call, connection: Properties) -> AsyncIterator[None]:
        """Admits a call for as long as the block lasts, and says in it who makes it.

        Raises:
            CertificateMissing: If it needs a certificate and has none.
            CertificateInvalid: If its certificate names nobody.
            CertificateExpired: If its certificate has ended.
            CertificateRevoked: If its certificate was revoked, before the block or in it.
            RoleMayNot: If its role has no right to it.
            DiskFull: If it makes its first call and cannot be written down; likewise StateInvalid.
        """
        call.caller = caller_of(connection) if self._secured else LOCAL
        self.check(call)
        subject = call.caller.subject
        if subject is None:
            yield
            return
        task = asyncio.current_task()
        assert task is not None
        self._open[subject][task] = call
        try:
            await self._write_down(subject)
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
        if caller.subject and caller.begins_at <= self._revoked.get(caller.subject, -math.inf):
            raise _revoked(caller.subject)
        if role in allowed:
            return
        name = call.method.rpartition("/")[2]
        if role is None:
            raise CertificateMissing(f"{name} needs a certificate; this port only enrolls devices: call the other one")
        may = " or ".join(sorted(each for each in allowed if each))
        raise RoleMayNot(f"{name} may be called by {may or 'nobody'}, not by {caller}")

    def revoke(self, subject: Subject, at: float) -> None:
        """Refuses the certificates of a subject that begin at `at` or before, and ends its calls.

        This comes before the revocation is written: nothing may slip in meanwhile.
        """
        self._revoked[subject] = at
        for task, call in self._open.get(subject, {}).items():
            call.ended = _revoked(subject)
            task.cancel()

    def revoked_at(self, subject: Subject) -> float | None:
        """Returns when the certificates that a subject had were revoked; None if they never were."""
        return self._revoked.get(subject)

    def spare(self, subject: Subject) -> None:
        """Takes the revocation of a subject back, because nobody is known by it."""
        self._revoked.pop(subject, None)

    async def refused(self, call: Call, error: FedpeftError, peer: str) -> None:
        """Writes a refusal into the audit log, unless the same one was written a moment ago."""
        key, now = (str(call.caller), error.reason, call.method), time.monotonic()
        last, unsaid = self._refusals.pop(key, (-math.inf, 0))
        quiet = now - last < QUIET_S
        self._refusals[key] = (last, unsaid + 1) if quiet else (now, 0)
        if len(self._refusals) > MOST_REFUSALS:
            del self._refusals[next(iter(self._refusals))]
        if not quiet:
            words: dict[str, Detail] = {"reason": error.reason, "message": error.message}
            deed = Deed(key[0], "call.refused", call.method, {**words, "peer": peer, "unsaid_before": unsaid})
            await self._store.call(self._store.db.transactions.write, deed)

    async def _write_down(self, subject: Subject) -> None:
        """Sees to it that whoever is let in is in the database, and so can be listed and revoked."""
        if subject not in self._known:
            await self._store.call(self._store.db.identities.seen, subject)
            self._known.add(subject)


def _revoked(subject: Subject) -> CertificateRevoked:
    again = "the operator" if subject.role in (Role.CLIENT, Role.EVALUATOR) else "another operator"
    return CertificateRevoked(f"the certificates of {subject} were revoked; ask {again} for a new enrolment token")

"""Client sessions: a client's id and instance from the metadata, and the live instance that holds the id."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any, cast

from fedpeft import ids
from fedpeft.errors import (
    ClientIdInUse,
    ClientIdInvalid,
    ClientMoved,
    NotRegistered,
    RoleMayNot,
    TooManyClients,
)
from fedpeft.identity.subject import Role, Subject
from fedpeft.rpc.wire import CLIENT_KEY, INSTANCE_KEY, PROCESS_KEY
from fedpeft_server.access.call import CALL
from fedpeft_server.store.rows import ClientRow
from fedpeft_server.store.store import Store
from fedpeft_server.tasks import ended, succeeded
from fedpeft_server.timing import Timing
from fedpeft_server.uploads.incoming import Context

AT_ONCE = 1000
"""Clients that are counted before other work has its turn."""
_CERTIFIED = {"trainer": Role.CLIENT, "evaluator": Role.EVALUATOR}


class Silence(StrEnum):
    """Time since a registered client last called, in classes."""

    PRESENT = "present"
    SILENT = "silent"
    GONE = "gone"


@dataclass
class Session:
    """Session of a client: its state between calls.

    Attributes:
        instance: State directory that holds the id.
        process: Process on it that registered last; empty if it did not say.
        role: Role of its registration; empty before.
        seen: Begin or end of its last call, on the monotonic clock; 0 if there was none since this process began.
        seen_at: The same in seconds since the epoch, calls to earlier processes included.
        calls: Calls in progress.
        scoring: Run and version that an evaluator was given and has not scored.
        moved: Begin of its last call, or time of its last message, on the monotonic clock; 0 if none came since this
            process began. Unlike `seen`, it does not move when the server gives a call up.
        dismissed: True if it left or was revoked since it registered.
    """

    instance: str
    process: str = ""
    role: str = ""
    seen: float = 0.0
    seen_at: float = 0.0
    calls: int = 0
    scoring: tuple[str, int] | None = None
    moved: float = 0.0
    dismissed: bool = False

    def note_activity(self) -> None:
        """Records that a call or message of the client arrived."""
        self.moved = time.monotonic()


@dataclass(frozen=True, slots=True)
class Registered:
    """A registration that another daemon took.

    Attributes:
        client: The client.
        before: Role that was known of it; empty if none was.
        role: Its role now.
    """

    client: str
    before: str
    role: str


class Sessions:
    """The sessions of the clients, by client id.

    Args:
        known: The clients of the database, which need not register again after a restart of the server.
        limit: Clients that may be registered.
        timing: Time for which an instance holds its id, and after which a client counts as silent, or as gone.
        now: The clock, in seconds since the epoch.
    """

    def __init__(
        self, known: list[ClientRow], limit: int, timing: Timing, now: Callable[[], float] = time.time
    ) -> None:
        self._now = now
        self._limit = limit
        self._timing = timing
        self._sessions = {row.id: Session(row.instance, row.process, row.role, seen_at=row.last_seen) for row in known}
        self._registered = sum(1 for row in known if row.role)
        self._touched: dict[str, float] = {}

    def claimed(self, context: Context) -> str:
        """Returns the client that a call says it is, or that its certificate names.

        Raises:
            ClientIdInvalid: As `identify`.
        """
        return _caller(context)[0]

    def is_strange(self, context: Context) -> bool:
        """Returns True if a call is not what is known of its client: it may have registered with another daemon.

        Raises:
            ClientIdInvalid: As `identify`.
        """
        client, instance, process = _caller(context)
        session = self._sessions.get(client)
        if session is None or session.instance != instance or (process and process != session.process):
            return True
        return not session.role and not session.dismissed

    def follow(self, row: ClientRow) -> Registered | None:
        """Takes up what the database has of a client; returns what is new of it, None if nothing is."""
        known = self._sessions.get(row.id)
        session = self._sessions.setdefault(row.id, Session(row.instance))
        session.seen_at = max(session.seen_at, row.last_seen)
        before = session.role
        is_same = known and (session.instance, session.process) == (row.instance, row.process)
        if is_same and (before == row.role or session.dismissed):
            return None
        self._registered += bool(row.role) - bool(before)
        session.instance, session.process, session.role = row.instance, row.process, row.role
        session.dismissed = False
        return Registered(row.id, before, row.role)

    def refuse_another(self, context: Context, row: ClientRow, now: float, *, waits: bool) -> None:
        """Refuses a call of another instance than the one that holds the id with another daemon.

        Args:
            context: The call.
            row: Its client, as the database has it.
            now: Time on the database's clock.
            waits: True if the client waits with another daemon.

        Raises:
            ClientIdInUse: If that one is live.
        """
        client, instance, _ = _caller(context)
        if row.instance != instance and (waits or now - row.last_seen < self._timing.session_alive_s):
            raise self._in_use(client)

    def identify(self, context: Context, *, registers: bool = False, earlier: Collection[str] = ()) -> str:
        """Returns the id of the client that calls, and holds it for the call's instance until the call ends.

        Args:
            context: The call.
            registers: True for a call that a process begins its life with, and that so takes the id over from an
                older process on the same state, which is gone as a rule.
            earlier: For such a call, the processes that its state knows of.

        Raises:
            ClientIdInvalid: If the metadata is missing or malformed.
            ClientIdInUse: If another live instance, or a younger process of this one, holds the id.
            ClientMoved: If the state was left behind.
        """
        client, instance, process = _caller(context)
        self._refuse_new_option(client)
        session = self._sessions.setdefault(client, Session(instance))
        self._refuse_other_instance(client, session, instance)
        if registers:
            _refuse_left_behind(client, session, instance, process, earlier)
        if registers or not session.process or session.instance != instance:
            session.process = process
        elif process and process != session.process:
            theirs = "device a token" if CALL.get().caller.subject else "client an id"
            raise ClientIdInUse(
                f"another process has registered as client {client} since with the same {INSTANCE_KEY}, as happens on "
                f"a copy of a state directory; give each {theirs} and a state directory of its own, and do not copy one"
            )
        session.instance = instance
        session.calls += 1
        session.seen = session.moved = time.monotonic()
        session.seen_at = self._touched[client] = self._now()
        context.add_done_callback(cast(Any, partial(self._ended, client, session)))
        call = CALL.get()
        call.client, call.moved = client, partial(self._note_activity, client, session)
        return client

    def register(self, client: str, role: str) -> str:
        """Remembers the role of a client; returns the one that it had before, empty if none.

        Raises:
            RoleMayNot: If its certificate is that of another role.
            TooManyClients: If the server takes no more.
        """
        _refuse_other_role(client, role)
        self._refuse_one_too_many(client)
        session = self._sessions[client]
        before = session.role
        self._registered += not before
        session.role = role
        session.dismissed = False
        session.scoring = None
        return before

    def dismiss(self, subject: Subject) -> None:
        """Counts a client that left or was revoked as registered no more; coming back, it registers again."""
        session = self._sessions.get(subject.name)
        if session and session.role and _CERTIFIED[session.role] is subject.role:
            session.role = ""
            session.dismissed = True
            session.scoring = None
            self._registered -= 1

    def check_registration(self, context: Context, role: str, earlier: Collection[str] = ()) -> str:
        """Returns the id of the client that calls, raises what `identify` and `register` would, remembers nothing."""
        client, instance, process = _caller(context)
        self._refuse_new_option(client)
        if client in self._sessions:
            self._refuse_other_instance(client, self._sessions[client], instance)
            _refuse_left_behind(client, self._sessions[client], instance, process, earlier)
        _refuse_other_role(client, role)
        self._refuse_one_too_many(client)
        return client

    def _refuse_new_option(self, client: str) -> None:
        """Refuses a new name that commands take for an option; with a certificate, its token was the place for that."""
        if ids.is_option(client) and client not in self._sessions and CALL.get().caller.subject is None:
            raise ClientIdInvalid(f"the client id {client!r} begins with a hyphen, which a new one must not")

    def role(self, client: str) -> str:
        """Returns the role that a client registered with.

        Raises:
            NotRegistered: If it did not, or another did by this name with a certificate of the other role.
        """
        role, subject = self._sessions[client].role, CALL.get().caller.subject
        if not role or (subject and subject.role is not _CERTIFIED[role]):
            raise NotRegistered(f"client {client} is not registered; call Register first")
        return role

    def known_role(self, client: str) -> str:
        """Returns the role that a client registered with; empty if it did not."""
        session = self._sessions.get(client)
        return session.role if session else ""

    def scores(self, client: str, task: tuple[str, int] | None) -> None:
        """Remembers which version of which run an evaluator was given to score, or that there is none for it."""
        self._sessions[client].scoring = task

    def scored(self, client: str, task: tuple[str, int]) -> None:
        """Forgets what an evaluator was given, if it is this one that it scored."""
        if self._sessions[client].scoring == task:
            self._sessions[client].scoring = None

    def scoring(self, client: str) -> tuple[str, int] | None:
        """Returns the run and the version that an evaluator was given and has not answered for, if there is one."""
        session = self._sessions.get(client)
        return None if session is None else session.scoring

    def last_activity(self, client: str) -> float:
        """Returns the time of a client's last call or message, on the monotonic clock; 0 if there was none."""
        session = self._sessions.get(client)
        return 0.0 if session is None else session.moved

    def evaluators(self) -> list[str]:
        """Returns the clients that registered as evaluators; looks at every client, so it is for the start."""
        return [client for client, session in self._sessions.items() if session.role == "evaluator"]

    def holder(self, client: str) -> tuple[str, str]:
        """Returns the instance that holds the id of a client, and its process; that is empty if it did not say."""
        session = self._sessions[client]
        return session.instance, session.process

    def note_seen(self, seen: Mapping[str, float]) -> None:
        """Takes up when clients were last seen, by whichever daemon."""
        ahead = time.monotonic() - self._now()
        for client, at in seen.items():
            session = self._sessions.get(client)
            if session is not None:
                session.seen_at = max(session.seen_at, at)
                session.moved = max(session.moved, at + ahead)

    async def silences(
        self, now: float, waits_elsewhere: Callable[[str], bool] = lambda _: False
    ) -> Counter[tuple[str, str]]:
        """Returns how many clients registered in each role, by how long they have not called at time `now`.

        One that waits with another daemon is present there, however long ago its call began. Other work has its turn
        between the clients, so those that come or go meanwhile may be counted or not.
        """
        silent, gone = now - self._timing.session_silent_s, now - self._timing.session_gone_s
        counts: Counter[tuple[str, str]] = Counter()
        for number, client in enumerate(list(self._sessions), 1):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            session = self._sessions.get(client)
            if session is None or not session.role:
                continue
            if session.seen_at > silent or session.calls or waits_elsewhere(client):
                silence = Silence.PRESENT
            else:
                silence = Silence.GONE if session.seen_at <= gone else Silence.SILENT
            counts[session.role, silence] += 1
        return counts

    async def write(self, store: Store) -> None:
        """Writes when clients called since it was written last; what could not be written waits for the next time.

        Raises:
            FedpeftError: If it could not.
        """
        touched, self._touched = self._touched, {}
        if not touched:
            return

        def take_back(written: asyncio.Task[None]) -> None:
            if not succeeded(written):
                self._touched = {**touched, **self._touched}

        writing = store.begin(store.db.touch_clients, touched)
        writing.add_done_callback(take_back)  # also where the caller has left by then
        await ended(writing)

    def _note_activity(self, client: str, session: Session) -> None:
        session.note_activity()
        self._touched[client] = self._now()  # a transfer may take long, and other daemons are not to think it gone

    def _refuse_one_too_many(self, client: str) -> None:
        known = self._sessions.get(client)
        if not (known and known.role) and self._registered >= self._limit:
            raise TooManyClients(
                f"{self._registered} clients are registered, the most this server takes; its operator can raise that"
            )

    def _refuse_other_instance(self, client: str, session: Session, instance: str) -> None:
        if session.instance == instance:
            return
        since = time.monotonic() - session.seen
        if session.calls or (session.seen and since < self._timing.session_alive_s):
            raise self._in_use(client)

    def _in_use(self, client: str) -> ClientIdInUse:
        another = "a token of its own" if CALL.get().caller.subject else "another id"
        return ClientIdInUse(
            f"another instance of client {client} is connected, by its {INSTANCE_KEY}; give this one {another}, or "
            f"stop the other and wait {self._timing.session_alive_s:.0f} s"
        )

    def _ended(self, client: str, session: Session, _: object) -> None:
        session.calls -= 1
        session.seen = time.monotonic()
        session.seen_at = self._now()
        # Who never registered is forgotten, so that made-up ids cost no memory.
        if not session.role and not session.calls and self._sessions.get(client) is session:
            del self._sessions[client]


def _refuse_left_behind(client: str, session: Session, instance: str, process: str, earlier: Collection[str]) -> None:
    """Refuses a state that does not know of the process that registered last: a copy of it has gone on elsewhere."""
    last = session.process
    if not earlier or not last or session.instance != instance or last in (process, *earlier):
        return
    seen_at = datetime.fromtimestamp(session.seen_at, UTC)
    raise ClientMoved(
        f"client {client} has gone on with a copy of this state, which called last at {seen_at:%Y-%m-%d %H:%M} UTC; "
        "this copy was left behind, so run the client where it went on"
    )


def _refuse_other_role(client: str, role: str) -> None:
    """Refuses a trainer with an evaluator's certificate, and the other way round."""
    subject = CALL.get().caller.subject
    if subject and subject.role is not _CERTIFIED[role]:
        raise RoleMayNot(f"{client} registers as {role}, which needs a certificate of the role {_CERTIFIED[role]}")


def _caller(context: Context) -> tuple[str, str, str]:
    """Returns the client, which a certificate decides where there is one, its instance and process (may be empty).

    Raises:
        ClientIdInvalid: If one is missing or malformed, or the metadata name another client than the certificate.
    """
    metadata = dict(context.invocation_metadata() or ())
    client, instance, process = (str(metadata.get(key, "")) for key in (CLIENT_KEY, INSTANCE_KEY, PROCESS_KEY))
    subject = CALL.get().caller.subject
    if subject and client not in ("", subject.name):
        raise ClientIdInvalid(f"the metadata {CLIENT_KEY} say {client[:64]!r}, the certificate is that of {subject}")
    client = subject.name if subject else client
    if not ids.CLIENT.fullmatch(client):
        raise ClientIdInvalid(f"the metadata {CLIENT_KEY} must be {ids.CLIENT_FORM}")
    if not ids.INSTANCE.fullmatch(instance):
        raise ClientIdInvalid(f"the metadata {INSTANCE_KEY} must be 32 hexadecimal digits")
    if process and not ids.INSTANCE.fullmatch(process):
        raise ClientIdInvalid(f"the metadata {PROCESS_KEY} must be 32 hexadecimal digits, or absent")
    return client, instance, process

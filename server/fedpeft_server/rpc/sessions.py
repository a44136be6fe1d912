"""Callers: a client's id and instance from the metadata, and whether another live instance holds the id."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection
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
from fedpeft_server.uploads.incoming import Context

ALIVE_S = 30.0
"""An instance holds its client id for so long after its last call."""
SILENT_S = 120.0
"""A client that waits or trains calls every 20 seconds; one that has not for so long has a trouble."""
GONE_S = 86_400.0
"""A client that has not called for a day was switched off, and is nobody's alarm any more."""

_CERTIFIED = {"trainer": Role.CLIENT, "evaluator": Role.EVALUATOR}


class Silence(StrEnum):
    """Time since a registered client last called, in classes."""

    PRESENT = "present"
    SILENT = "silent"
    GONE = "gone"


@dataclass
class Presence:
    """State of a client between its calls.

    Attributes:
        instance: Which state directory holds the id.
        process: Which process on it registered last; empty if it did not say.
        role: What it registered as; empty before.
        seen: When its last call began or ended, on the monotonic clock; 0 if none did since this process began.
        heard: The same in seconds since the epoch, calls to earlier processes included.
        calls: Calls in progress.
        scoring: Run and version that an evaluator was given and has not scored.
        moved: When a call of it last began or a message of one passed, on the monotonic clock; 0 if none did since this
            process began. Unlike `seen`, it does not move when the server gives a call up.
    """

    instance: str
    process: str = ""
    role: str = ""
    seen: float = 0.0
    heard: float = 0.0
    calls: int = 0
    scoring: tuple[str, int] | None = None
    moved: float = 0.0

    def moves(self) -> None:
        """Notes that something was heard of the client."""
        self.moved = time.monotonic()


class Callers:
    """The clients that call, by id.

    Args:
        known: The clients of the database, which need not register again after a restart of the server.
        limit: Clients that may be registered.
    """

    def __init__(self, known: list[ClientRow], limit: int) -> None:
        self._limit = limit
        self._presence = {row.id: Presence(row.instance, row.process, row.role, heard=row.last_seen) for row in known}
        self._registered = sum(1 for row in known if row.role)
        self._touched: dict[str, float] = {}

    def identify(self, context: Context, *, registers: bool = False, earlier: Collection[str] = ()) -> str:
        """Returns the id of the client that calls, and holds it for the call's instance until the call ends.

        Args:
            context: The call.
            registers: Whether the call is one that a process begins its life with, and so takes the id over from an
                older process on the same state, which is gone as a rule.
            earlier: For such a call, the processes that its state knows of.

        Raises:
            ClientIdInvalid: If the metadata is missing or malformed.
            ClientIdInUse: If another live instance, or a younger process of this one, holds the id.
            ClientMoved: If the state was left behind.
        """
        client, instance, process = _caller(context)
        self._refuse_new_option(client)
        presence = self._presence.setdefault(client, Presence(instance))
        self._refuse_other_instance(client, presence, instance)
        if registers:
            _refuse_left_behind(client, presence, instance, process, earlier)
        if registers or not presence.process or presence.instance != instance:
            presence.process = process
        elif process and process != presence.process:
            theirs = "device a token" if CALL.get().caller.subject else "client an id"
            raise ClientIdInUse(
                f"another process has registered as client {client} since with the same {INSTANCE_KEY}, as happens on "
                f"a copy of a state directory; give each {theirs} and a state directory of its own, and do not copy one"
            )
        presence.instance = instance
        presence.calls += 1
        presence.seen = presence.moved = time.monotonic()
        presence.heard = self._touched[client] = time.time()
        context.add_done_callback(cast(Any, partial(self._ended, client, presence)))
        call = CALL.get()
        call.client, call.moved = client, presence.moves
        return client

    def register(self, client: str, role: str) -> str:
        """Remembers the role of a client; returns the one that it had before, empty if none.

        Raises:
            RoleMayNot: If its certificate is that of another role.
            TooManyClients: If the server takes no more.
        """
        _refuse_other_role(client, role)
        self._refuse_one_too_many(client)
        presence = self._presence[client]
        before = presence.role
        self._registered += not before
        presence.role = role
        presence.scoring = None
        return before

    def dismiss(self, subject: Subject) -> None:
        """Counts a client that left or was revoked as registered no more; coming back, it registers again."""
        presence = self._presence.get(subject.name)
        if presence and presence.role and _CERTIFIED[presence.role] is subject.role:
            presence.role = ""
            presence.scoring = None
            self._registered -= 1

    def rehearse(self, context: Context, role: str, earlier: Collection[str] = ()) -> str:
        """Returns the id of the client that calls, raises what `identify` and `register` would, remembers nothing."""
        client, instance, process = _caller(context)
        self._refuse_new_option(client)
        if client in self._presence:
            self._refuse_other_instance(client, self._presence[client], instance)
            _refuse_left_behind(client, self._presence[client], instance, process, earlier)
        _refuse_other_role(client, role)
        self._refuse_one_too_many(client)
        return client

    def _refuse_new_option(self, client: str) -> None:
        """Refuses a new name that commands take for an option; with a certificate, its token was the place for that."""
        if ids.is_option(client) and client not in self._presence and CALL.get().caller.subject is None:
            raise ClientIdInvalid(f"the client id {client!r} begins with a hyphen, which a new one must not")

    def role(self, client: str) -> str:
        """Returns the role that a client registered with.

        Raises:
            NotRegistered: If it did not, or another did by this name with a certificate of the other role.
        """
        role, subject = self._presence[client].role, CALL.get().caller.subject
        if not role or (subject and subject.role is not _CERTIFIED[role]):
            raise NotRegistered(f"client {client} is not registered; call Register first")
        return role

    def scores(self, client: str, task: tuple[str, int] | None) -> None:
        """Remembers which version of which run an evaluator was given to score, or that there is none for it."""
        self._presence[client].scoring = task

    def scored(self, client: str, task: tuple[str, int]) -> None:
        """Forgets what an evaluator was given, if it is this one that it scored."""
        if self._presence[client].scoring == task:
            self._presence[client].scoring = None

    def scoring(self, client: str) -> tuple[str, int] | None:
        """Returns the run and the version that an evaluator was given and has not answered for, if there is one."""
        presence = self._presence.get(client)
        return None if presence is None else presence.scoring

    def heard(self, client: str) -> float:
        """Returns when anything was last heard of a client, on the monotonic clock; 0 if nothing was so far."""
        presence = self._presence.get(client)
        return 0.0 if presence is None else presence.moved

    def evaluators(self) -> list[str]:
        """Returns the clients that registered as evaluators; looks at every client, so it is for the start."""
        return [client for client, presence in self._presence.items() if presence.role == "evaluator"]

    def holder(self, client: str) -> tuple[str, str]:
        """Returns the instance that holds the id of a client, and its process; that is empty if it did not say."""
        presence = self._presence[client]
        return presence.instance, presence.process

    def silences(self, now: float) -> Counter[tuple[str, str]]:
        """Returns how many clients registered in each role, by how long they have not called at time `now`."""
        silent, gone = now - SILENT_S, now - GONE_S
        present = Counter(p.role for p in self._presence.values() if p.role and (p.calls or p.heard > silent))
        lost = Counter(p.role for p in self._presence.values() if p.role and not p.calls and p.heard <= gone)
        known = Counter(p.role for p in self._presence.values() if p.role)
        counts: Counter[tuple[str, str]] = Counter()
        for role, number in known.items():
            counts[role, Silence.PRESENT] = present[role]
            counts[role, Silence.GONE] = lost[role]
            counts[role, Silence.SILENT] = number - present[role] - lost[role]
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
            if written.cancelled() or written.exception() is not None:
                self._touched = {**touched, **self._touched}

        writing = store.begin(store.db.touch_clients, touched)
        writing.add_done_callback(take_back)  # also where the caller has left by then
        await asyncio.shield(writing)

    def _refuse_one_too_many(self, client: str) -> None:
        known = self._presence.get(client)
        if not (known and known.role) and self._registered >= self._limit:
            raise TooManyClients(
                f"{self._registered} clients are registered, the most this server takes; its operator can raise that"
            )

    def _refuse_other_instance(self, client: str, presence: Presence, instance: str) -> None:
        if presence.instance == instance:
            return
        since = time.monotonic() - presence.seen
        if presence.calls or (presence.seen and since < ALIVE_S):
            another = "a token of its own" if CALL.get().caller.subject else "another id"
            raise ClientIdInUse(
                f"another instance of client {client} is connected, by its {INSTANCE_KEY}; give this one {another}, or "
                f"stop the other and wait {ALIVE_S:.0f} s"
            )

    def _ended(self, client: str, presence: Presence, _: object) -> None:
        presence.calls -= 1
        presence.seen = time.monotonic()
        presence.heard = time.time()
        # Who never registered is forgotten, so that made-up ids cost no memory.
        if not presence.role and not presence.calls and self._presence.get(client) is presence:
            del self._presence[client]


def _refuse_left_behind(client: str, presence: Presence, instance: str, process: str, earlier: Collection[str]) -> None:
    """Refuses a state that does not know of the process that registered last: a copy of it has gone on elsewhere."""
    last = presence.process
    if not earlier or not last or presence.instance != instance or last in (process, *earlier):
        return
    heard = datetime.fromtimestamp(presence.heard, UTC)
    raise ClientMoved(
        f"client {client} has gone on with a copy of this state, which called last at {heard:%Y-%m-%d %H:%M} UTC; this "
        "copy was left behind, so run the client where it went on"
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

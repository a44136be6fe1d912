"""Notices: what a transaction changed, told to the other daemons on the same database as it commits.

A notice names what changed, and a daemon that hears it reads that from the database: so it may be told twice, or come
late. PostgreSQL passes them on (`NOTIFY`), in the order of the commits; one that is undone tells nothing. SQLite has
nobody to tell: one daemon uses the file.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import structlog
from pydantic import NonNegativeInt, TypeAdapter
from sqlalchemy import Connection, text

from fedpeft.identity.subject import Role

log = structlog.get_logger()

PAYLOAD_BYTES = 7900
"""Longest payload; PostgreSQL takes less than 8000 bytes."""
CHANNEL = "fedpeft_"
"""Name of the channel, before that of the schema: two federations may share a database."""

_TELL = text(f"SELECT pg_notify('{CHANNEL}' || current_schema(), :payload)")


class Topic(StrEnum):
    """Subjects of notices, with the form of their keys.

    The form of a topic does not change: keys of another form are another topic, which older daemons pass over.
    """

    RUN = "run"
    """A run was made, changed or deleted: its id."""
    CLIENT = "client"
    """A client registered: its id."""
    ANSWER = "answer"
    """A client answered the offer of a run: [run, client]."""
    IDENTITY = "identity"
    """An identity was enrolled, revoked or restored: [role, name]."""
    SCORED = "scored"
    """An evaluator scored a version: [run, version, evaluator, split]."""
    EVALUATOR = "evaluator"
    """An evaluator cannot score a version: the evaluator's id."""
    REMOVED = "removed"
    """The files of a version are about to be removed: [run, version]."""
    HELLO = "hello"
    """A daemon wants to know who waits with the one whose id this is."""
    ALIVE = "alive"
    """A daemon is there, and updates of these clients are arriving."""
    PROGRESS = "progress"
    """A client said how far the training for its ticket is: [ticket, step, steps, updates, wanted]."""
    SEATS = "seats"
    """A client waits with the daemon: [client, run, runs left out]; or no more: [client]."""
    ALL_SEATS = "all seats"
    """The same, and nobody waits there who was not told of since: the first of several may have none."""
    BYE = "bye"
    """A daemon shuts down."""
    SETUP = "setup"
    """Settings of a daemon that the others must have too: [subject, value, words, since], of `daemons.setup`."""


_FORMS: Mapping[Topic, TypeAdapter[Any]] = {
    Topic.RUN: TypeAdapter(tuple[str, ...]),
    Topic.CLIENT: TypeAdapter(tuple[str, ...]),
    Topic.ANSWER: TypeAdapter(tuple[tuple[str, str], ...]),
    Topic.IDENTITY: TypeAdapter(tuple[tuple[Role, str], ...]),
    Topic.SCORED: TypeAdapter(tuple[tuple[str, NonNegativeInt, str, str], ...]),
    Topic.EVALUATOR: TypeAdapter(tuple[str, ...]),
    Topic.REMOVED: TypeAdapter(tuple[tuple[str, NonNegativeInt], ...]),
    Topic.HELLO: TypeAdapter(tuple[str, ...]),
    Topic.ALIVE: TypeAdapter(tuple[str, ...]),
    Topic.PROGRESS: TypeAdapter(tuple[tuple[str, NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt], ...]),
    Topic.SEATS: TypeAdapter(tuple[tuple[str] | tuple[str, str, tuple[str, ...]], ...]),
    Topic.ALL_SEATS: TypeAdapter(tuple[()]),
    Topic.BYE: TypeAdapter(tuple[()]),
    Topic.SETUP: TypeAdapter(tuple[tuple[str, str, str, float], ...]),
}
"""Form of the keys of each topic."""
_TEXT = TypeAdapter(tuple[str, Topic, list[Any]])


@dataclass(frozen=True, slots=True)
class Notice:
    """News from one daemon to the others.

    Attributes:
        sender: Id of the daemon.
        topic: Subject of it.
        keys: Names of it, in the form that the topic says.
    """

    sender: str
    topic: Topic
    keys: tuple[Any, ...]

    def payloads(self) -> Iterator[str]:
        """Yields it as texts that PostgreSQL takes; a key that is too long for one is left out, and logged."""
        room = PAYLOAD_BYTES - len(_text(self.sender, self.topic, []))
        some: list[Any] = []
        taken = 0
        for key in self.keys:
            size = len(json.dumps(key, separators=(",", ":"))) + 1  # JSON's escapes leave only ASCII
            if size > room:
                log.error("a notice to other servers is too long", topic=self.topic, bytes=size)
                continue
            if some and taken + size > room:
                yield _text(self.sender, self.topic, some)
                some, taken = [], 0
            some.append(key)
            taken += size
        yield _text(self.sender, self.topic, some)

    @classmethod
    def parse(cls, payload: str) -> Notice | None:
        """Returns the notice of a text; None if it is none that this release knows: anybody may write to a channel."""
        try:
            sender, topic, keys = _TEXT.validate_json(payload)
            return cls(sender, topic, _FORMS[topic].validate_python(keys))
        except ValueError:
            return None


class Notices:
    """Tells the other daemons what transactions of this one change.

    Args:
        dialect: Name of the database's kind.

    Attributes:
        sender: Id of this daemon, drawn for the life of the process.
        are_heard: True if other daemons may use the database.
    """

    def __init__(self, dialect: str) -> None:
        self.sender = secrets.token_hex(6)
        self.are_heard = dialect == "postgresql"

    def tell(self, connection: Connection, topic: Topic, keys: Iterable[Any]) -> None:
        """Has the others told once the transaction commits."""
        if self.are_heard:
            for payload in Notice(self.sender, topic, tuple(keys)).payloads():
                connection.execute(_TELL, {"payload": payload})


def _text(sender: str, topic: Topic, keys: Sequence[Any]) -> str:
    return json.dumps([sender, topic, keys], separators=(",", ":"))
